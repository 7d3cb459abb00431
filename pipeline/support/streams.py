"""Calls that wait for others, several at a time, over a stream that may be longer than memory.

Promise: at most twice `concurrency` items are taken before their results are given back, and all that was begun is
given back, in the order it ends. The trade: threads, so calls should wait (for a network), not compute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def as_they_end(call: Callable[[Item], Result], items: Iterable[Item], concurrency: int,
                stop: threading.Event) -> Generator[tuple[Item, Future[Result]], None, None]:
    """Each item with its call, which has ended. After `stop` is set nothing more is taken; a caller that leaves
    sets it."""
    waiting: dict[Future[Result], Item] = {}
    remaining = iter(items)
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            while True:
                while len(waiting) < 2 * concurrency and not stop.is_set():
                    try:
                        item = next(remaining)
                    except StopIteration:
                        break
                    waiting[pool.submit(call, item)] = item
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future
        finally:
            stop.set()
            for future in waiting:
                future.cancel()
