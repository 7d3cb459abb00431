"""What loader processes of torch need wherever they are started."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Sequence
from typing import Any


def as_bytes(rows: Sequence[Any]) -> bytes:
    """A batch as plain bytes: torch would send every tensor as a shared file of its own, and run out of handles."""
    return pickle.dumps(rows, protocol=5)


def let_waiting_threads_sleep() -> None:
    """OpenMP's threads spin while they wait for each other: with loaders on the same cores that trebles the time.

    Asked of the library before torch loads it; afterwards this changes nothing. A user's own choice stays.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def one_thread(_: int) -> None:
    """For each loader process: it would fight with the others, and forked from a busy pool of threads it would hang."""
    import torch
    torch.set_num_threads(1)


def one_deaf_thread(number: int) -> None:
    """`one_thread`, for a loader whose parent ends it: signals to the whole group, as Control-C sends them, pass by."""
    one_thread(number)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
