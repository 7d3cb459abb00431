"""A function in another interpreter yields, fails and ends as it would here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.support.elsewhere import yielded_elsewhere
from pipeline.support.errors import UserError


def counted(last: int) -> Iterator[tuple[int, int]]:
    print("a library may print what it likes")
    yield from ((number, os.getpid()) for number in range(last))


def mistaken(number: int) -> Iterator[int]:
    yield number
    raise UserError("the cup is empty", "kitchen", "fill it")


def broken() -> Iterator[int]:
    yield 1
    raise RuntimeError("not a mistake of the user")


def endless(file: Path) -> Iterator[int]:
    file.write_text(str(os.getpid()))
    yield 1
    time.sleep(600)


@pytest.fixture(autouse=True)
def tests_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))


def test_yields_come_from_another_process() -> None:
    found = list(yielded_elsewhere(sys.executable, "tests.support.test_elsewhere:counted", 3))
    assert [number for number, _ in found] == [0, 1, 2]
    assert len({process for _, process in found} | {os.getpid()}) == 2


def test_a_mistake_of_the_user_arrives_whole_after_what_was_yielded_before() -> None:
    found = yielded_elsewhere(sys.executable, "tests.support.test_elsewhere:mistaken", 7)
    assert next(found) == 7
    with pytest.raises(UserError) as caught:
        next(found)
    assert (caught.value.what, caught.value.where, caught.value.do) == ("the cup is empty", "kitchen", "fill it")


def test_any_other_end_is_told_with_its_code(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="ended with 1"):
        list(yielded_elsewhere(sys.executable, "tests.support.test_elsewhere:broken"))
    assert "RuntimeError: not a mistake of the user" in capfd.readouterr().err


@pytest.mark.parametrize("python", ["/nowhere/python", __file__])
def test_an_interpreter_that_cannot_be_started_is_named(python: str) -> None:
    with pytest.raises(UserError, match="cannot start") as caught:
        list(yielded_elsewhere(python, "tests.support.test_elsewhere:counted", 1))
    assert caught.value.where == python


def test_whoever_stops_listening_ends_the_process(tmp_path: Path) -> None:
    found = yielded_elsewhere(sys.executable, "tests.support.test_elsewhere:endless", tmp_path / "pid")
    assert next(found) == 1
    found.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_killed_listener_takes_the_process_with_it(tmp_path: Path) -> None:
    script = ("import sys; from pathlib import Path\nfrom pipeline.support.elsewhere import yielded_elsewhere\n"
              "found = yielded_elsewhere(sys.executable, 'tests.support.test_elsewhere:endless', Path(sys.argv[1]))\n"
              "next(found); print('listening', flush=True); next(found)")
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "pid")], stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None and listener.stdout.readline() == b"listening\n"
        listener.kill()
    other = int((tmp_path / "pid").read_text())
    for _ in range(200):
        if not _is_running(other):
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
