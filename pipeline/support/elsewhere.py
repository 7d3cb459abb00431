"""Call a function of ours in the interpreter of another environment, for libraries that do not go with ours.

Arguments and results are pickled through pipes between two processes of this same program; a mistake of the user over
there is raised here. The trade: that environment needs the imports of what is called as well.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.support.children import start
from pipeline.support.errors import UserError

_ROOT = Path(__file__).resolve().parents[2]


def yielded_elsewhere(python: str, function: str, *arguments: Any) -> Iterator[Any]:
    """What the generator function "module:name" yields when `python` runs it; UserError if that does not go well."""
    reading, writing = os.pipe()
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    try:
        process = start([python, "-m", "pipeline.support.elsewhere", function, str(writing)], stdin=subprocess.PIPE,
                        pass_fds=[writing], env={**os.environ, "PYTHONPATH": path})
    except OSError as error:
        os.close(reading)
        raise UserError(f"cannot start this interpreter: {error}", python) from None
    finally:
        os.close(writing)
    with open(reading, "rb") as answers, process:
        try:
            _tell(process, arguments)
            yield from _received(answers)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise UserError(f"this interpreter ended with {process.returncode}; its messages stand above", python,
                        "the same command goes on from what is on disk")


def _tell(process: subprocess.Popen[bytes], arguments: tuple[Any, ...]) -> None:
    assert process.stdin is not None
    try:
        pickle.dump(arguments, process.stdin)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended already, and its exit code says so


def _received(answers: BinaryIO) -> Iterator[Any]:
    while True:
        try:
            answer = pickle.load(answers)
        except (EOFError, pickle.UnpicklingError):  # it has ended, or was ended in the middle of an answer
            return
        if isinstance(answer, UserError):
            raise answer
        yield answer


def _serve(function: str, answers: BinaryIO) -> None:
    """The other process."""
    module, name = function.split(":")
    try:
        for answer in getattr(importlib.import_module(module), name)(*pickle.load(sys.stdin.buffer)):
            pickle.dump(answer, answers)
            answers.flush()
    except UserError as error:
        pickle.dump(error, answers)


if __name__ == "__main__":
    from pipeline.support.logs import configure

    configure(None)
    with open(int(sys.argv[2]), "wb") as stream:
        _serve(sys.argv[1], stream)
