"""Start pipeline commands as forked children of a process that has imported everything and computed nothing.

So a test can start and kill a hundred workers without a hundred imports of torch. Reads one JSON list of arguments
per line, answers with the child's pid; a child leads a process group of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress

import torch
import open_clip  # noqa: F401  imported for the children, like torch


from pipeline.cli import main


def _child(arguments: list[str]) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    torch.set_num_threads(1)
    sys.stdin.close()
    sys.stdout = sys.stderr
    return main(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps them
    print("ready", flush=True)
    for line in sys.stdin:
        if not (pid := os.fork()):
            os.setpgid(0, 0)
            os._exit(_child(json.loads(line)))
        with suppress(OSError):  # whoever comes first, child or we: the group must be there before its number is told
            os.setpgid(pid, pid)
        print(pid, flush=True)
