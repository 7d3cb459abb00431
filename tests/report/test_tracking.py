"""Tracking never costs a result: whatever goes wrong is one warning."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Experiment, load
from pipeline.plan import make_plan
from pipeline.report.tables import score_rows
from pipeline.report.tracking import Tracker


@pytest.fixture
def tracked(tmp_path: Path, small_arguments: list[str]) -> Experiment:
    return load("quickstart", [f"work_dir={tmp_path}", "log.wandb=plumbline-test", *small_arguments])


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    caplog.set_level(logging.WARNING, "pipeline")
    return caplog


def ours(warnings: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in warnings.records if record.name == "pipeline"]


class _Run:
    """Stands in for a run of wandb's."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, float] = {}
        self.codes: list[int] = []

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append(values if step is None else {**values, "step": step})

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> _Run:
    import wandb
    found = _Run()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **_: found)
    return found


def test_without_a_project_wandb_is_not_imported() -> None:
    script = ("import sys; from pipeline.config import load; from pipeline.report.tracking import Tracker\n"
              "with Tracker(load('quickstart')) as tracker:\n"
              "    tracker.stage('embed', 1.0, 1.0, 1); tracker.scores([])\n"
              "assert not {'wandb', 'torch'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_numbers_of_a_training_are_sent_by_its_first_process_only(tracked: Experiment, run: _Run,
                                                                      tmp_path: Path) -> None:
    for enabled in (True, False):
        with Tracker(tracked, "training", tmp_path / "trainings", enabled) as tracker:
            tracker.numbers({"loss": 0.5, "validation/average": 0.25}, 40)
    assert run.logged == [{"loss": 0.5, "validation/average": 0.25, "step": 40}] and run.codes == [0]


def test_what_is_sent(tracked: Experiment, quick_run: Experiment, run: _Run) -> None:
    rows = score_rows(make_plan(quick_run))
    with Tracker(tracked) as tracker:
        tracker.stage("embed", 12.5, 2.0, 3)
        tracker.scores(rows)
    assert run.logged[0] == {"embed/rows_per_second": 12.5, "embed/seconds": 2.0, "embed/units_made": 3}
    row = rows[0]
    assert run.summary[f"{row.encoder}/{row.task}/local/hit@5"] == row.metrics["hit@5"].mean
    local = [row.value.mean for row in rows if row.pool == "local"]
    assert run.summary[f"{row.encoder}/average/local"] == pytest.approx(sum(local) / len(local))
    table = run.logged[1]["scores"]
    assert len(table.data) == len(rows) and all(len(line) == len(table.columns) for line in table.data)
    assert run.codes == [0]


def test_a_failed_run_is_marked_as_failed(tracked: Experiment, run: _Run) -> None:
    with pytest.raises(KeyError), Tracker(tracked):
        raise KeyError("from the run itself")
    assert run.codes == [1]


def test_a_failing_start_is_one_warning(tracked: Experiment, monkeypatch: pytest.MonkeyPatch,
                                        warnings: pytest.LogCaptureFixture) -> None:
    import wandb

    def fail(**_: Any) -> None:
        raise wandb.errors.CommError("no way\nto the server")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", fail)
    with Tracker(tracked) as tracker:
        tracker.stage("embed", 1.0, 1.0, 1)
        tracker.scores([])
    assert ours(warnings) == ["Weights & Biases: no way; the run goes on without it"]


def test_a_failure_in_between_is_one_warning(tracked: Experiment, run: _Run, monkeypatch: pytest.MonkeyPatch,
                                             warnings: pytest.LogCaptureFixture) -> None:
    def fail(_: dict[str, Any]) -> None:
        raise RuntimeError("gone")
    monkeypatch.setattr(run, "log", fail)
    with Tracker(tracked) as tracker:
        for stage in ("collect", "embed"):
            tracker.stage(stage, 1.0, 1.0, 1)
    assert len(ours(warnings)) == 1


def test_not_installed_is_a_warning(tracked: Experiment, monkeypatch: pytest.MonkeyPatch,
                                    warnings: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Tracker(tracked) as tracker:
        tracker.stage("embed", 1.0, 1.0, 1)
    assert len(ours(warnings)) == 1 and "wandb" in ours(warnings)[0]


def _alone(work_dir: Path, arguments: list[str],
           environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Track in a process of its own, without any login: wandb keeps state and children per process."""
    script = ("import sys, logging; logging.basicConfig()\n"
              "from pipeline.config import load; from pipeline.report import tracking\n"
              "tracking.INIT_SECONDS = 3.0; tracking.FINISH_SECONDS = 3.0\n"
              "with tracking.Tracker(load('quickstart', sys.argv[1:])) as tracker:\n"
              "    tracker.stage('embed', 1.0, 1.0, 1)\n"
              "print('the run went on')")
    overrides = [f"work_dir={work_dir}", "log.wandb=plumbline-test", *arguments]
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(work_dir), "NETRC": str(work_dir / "netrc")}
    return subprocess.run([sys.executable, "-c", script, *overrides], env={**clean, **environment}, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, timeout=240)


def test_a_real_offline_run_is_written_to_the_experiment(tmp_path: Path, small_arguments: list[str]) -> None:
    done = _alone(tmp_path, small_arguments, {"WANDB_MODE": "offline"})
    assert done.returncode == 0 and done.stdout.endswith("the run went on\n"), done.stderr
    assert "the run goes on without it" not in done.stderr
    written = list((tmp_path / "experiments" / "quickstart" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 1 and written[0].stat().st_size > 0


def test_without_a_login_nobody_is_asked(tmp_path: Path, small_arguments: list[str]) -> None:
    done = _alone(tmp_path, small_arguments, {"WANDB_MODE": "online"})
    assert done.returncode == 0 and "the run went on" in done.stdout
    assert "not logged in" in done.stderr


def test_an_unreachable_server_is_a_warning(tmp_path: Path, small_arguments: list[str]) -> None:
    with socket.socket() as unused:  # bound but not listening: connections are refused at once
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done = _alone(tmp_path, small_arguments, {
            "WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40})
    assert done.returncode == 0 and "the run went on" in done.stdout
    assert done.stderr.count("the run goes on without it") == 1, done.stderr
