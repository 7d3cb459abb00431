"""Results in order, made ahead of their use by threads: for what leaves Python's lock, as reading and arithmetic do."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def made_ahead(tasks: Iterable[Callable[[], Result]], most: int = 4) -> Iterator[Result]:
    """What each task returns, in order; as many are under way or waiting as there are cores, `most` at most."""
    threads = max(1, min(most, len(os.sched_getaffinity(0))))
    coming: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for task in tasks:
                coming.append(pool.submit(task))
                if len(coming) > threads:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:  # nobody wants the rest if the caller or a task has failed
            for future in coming:
                future.cancel()


def read_ahead(items: Iterator[Result], count: int = 1) -> Iterator[Result]:
    """The same items; the next `count` are fetched, by one other thread, while the caller works on the present one."""
    end: Any = object()
    reader = ThreadPoolExecutor(1)
    try:
        coming = deque(reader.submit(next, items, end) for _ in range(count))
        while (item := coming.popleft().result()) is not end:
            coming.append(reader.submit(next, items, end))
            yield item
    finally:
        reader.shutdown(cancel_futures=True)
