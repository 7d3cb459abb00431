"""Calls in threads over a stream: each item once, few taken ahead, and an end that leaves nothing behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.support.streams import as_they_end


@pytest.mark.parametrize("concurrency", [1, 3, 16])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_every_item_comes_back_once(concurrency: int, count: int) -> None:
    calls = as_they_end(lambda item: item * 2, range(count), concurrency, threading.Event())
    found = {item: call.result() for item, call in calls}
    assert found == {item: item * 2 for item in range(count)}


def test_few_are_taken_ahead_and_so_many_run_together() -> None:
    taken, running, most, lock = [0], [0], [0], threading.Lock()

    def items() -> Iterator[int]:
        for item in range(60):
            taken[0] += 1
            yield item

    def call(item: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.002)
        with lock:
            running[0] -= 1
        return item
    for back, _ in enumerate(as_they_end(call, items(), 4, threading.Event())):
        assert taken[0] <= back + 8
    assert most[0] == 4


def test_a_call_that_fails_is_a_value() -> None:
    ends = dict(as_they_end(lambda item: 1 // item, [0, 1], 2, threading.Event()))
    assert isinstance(ends[0].exception(), ZeroDivisionError) and ends[1].result() == 1


def test_after_stop_what_was_begun_still_comes_and_nothing_else() -> None:
    stop, found = threading.Event(), []
    for item, _ in as_they_end(lambda item: item, iter(range(1000)), 2, stop):
        found.append(item)
        stop.set()
    assert sorted(found) == list(range(len(found))) and len(found) <= 4


def test_a_caller_that_leaves_sets_stop() -> None:
    stop = threading.Event()
    calls = as_they_end(lambda item: stop.wait(0.01 * item), range(1000), 2, stop)
    next(calls)
    calls.close()
    assert stop.is_set()
