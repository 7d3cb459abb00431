"""Being asked to stop: Control-C, or the SIGTERM of a scheduler, ends a training after its step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Within: the first signal is remembered, and told by the function; a second one takes its usual course."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield asked.is_set
        return
    usual = {number: signal.getsignal(number) for number in _SIGNALS}

    def remember(number: int, _: Any) -> None:
        asked.set()
        _restore(usual)

    for number in _SIGNALS:
        signal.signal(number, remember)
    try:
        yield asked.is_set
    finally:
        _restore(usual)


def _restore(usual: dict[signal.Signals, Any]) -> None:
    for number, handler in usual.items():
        signal.signal(number, handler)
