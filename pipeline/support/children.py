"""Processes that we start do not outlive us, and what they print goes to stderr: stdout is for a command's results."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_STDERR = 2


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """`options` are those of Popen; OSError if there is no such program."""
    return subprocess.Popen(command, stdout=_STDERR, preexec_fn=_end_with_parent, **options)


def _end_with_parent() -> None:
    """Ask the system to end this child when its parent dies of a signal that leaves the parent no time (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG: prctl(2)
