"""Children of tests/fork_server.py: start pipeline commands at once, and kill them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Forks:
    """Handle of tests/fork_server.py."""

    def __init__(self, server: subprocess.Popen[str]):
        self.server = server
        assert self._answer() == "ready"

    def start(self, arguments: list[str]) -> int:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(arguments) + "\n")
        self.server.stdin.flush()
        return int(self._answer())

    def finish(self, arguments: list[str]) -> None:
        group = self.start(arguments)
        while alive(group):
            time.sleep(0.01)

    def _answer(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()


@contextmanager
def fork_server() -> Iterator[Forks]:
    with subprocess.Popen([sys.executable, str(Path(__file__).with_name("fork_server.py"))], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          env=dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent))) as server:
        try:
            yield Forks(server)
        finally:
            server.terminate()


def alive(group: int) -> bool:
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    while alive(group):
        time.sleep(0.002)
