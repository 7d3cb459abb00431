"""Results made ahead come in order, not too many at once, and failures come where they belong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from pipeline.support.ahead import made_ahead, read_ahead


def test_results_come_in_order_and_few_are_held() -> None:
    started: list[int] = []

    def task(number: int) -> int:
        started.append(number)
        return number

    for expected, number in enumerate(made_ahead((partial(task, number) for number in range(50)), most=2)):
        assert number == expected
        assert len(started) <= expected + 4
    assert sorted(started) == list(range(50))


def test_a_failure_comes_at_its_place_and_stops_the_rest() -> None:
    done: list[int] = []

    def task(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        done.append(number)
        return number

    results = made_ahead(partial(task, number) for number in range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert len(done) < 20


def test_items_are_fetched_while_the_caller_works() -> None:
    fetched = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        fetched.set()
        yield 2

    found = read_ahead(items())
    assert next(found) == 1
    assert fetched.wait(10)
    assert list(found) == [2]


@pytest.mark.parametrize("function", [read_ahead, lambda items: made_ahead(partial(int, item) for item in items)])
def test_nothing_gives_nothing_and_false_items_pass(function: Callable[[Iterator[int]], Iterator[int]]) -> None:
    assert list(function(iter([]))) == []
    assert list(function(iter([0, 0, 1]))) == [0, 0, 1]


def test_a_failing_iterator_fails_in_the_caller() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("after one")

    found = read_ahead(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="after one"):
        next(found)
