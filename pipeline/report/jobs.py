"""Plain text for submitted jobs: what each is doing, what it waits for, and the last lines of what failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.queue import State, tail
from pipeline.submission import Submitted

# Slurm's words for what a job waits for, where they do not speak for themselves: squeue(1), JOB REASON CODES.
_REASONS = {
    "Dependency": "waits for the stage before it", "Priority": "others come first",
    "Resources": "waits for a free place", "JobArrayTaskLimit": "so many run already as `at_once` allows",
    "DependencyNeverSatisfied": "the stage before it failed", "BeginTime": "was put back and starts again soon"}
_SHOWN = 3  # failures of one job in `status`; `logs` has them all


def jobs_text(states: Sequence[State]) -> str:
    """A line per job; below it what has failed, and in which log."""
    return "\n".join(line for state in states for line in _lines(state))


def _lines(state: State) -> Iterator[str]:
    job, size = state.job, f", {state.job.elements} elements" if state.job.elements else ""
    counts = ", ".join(f"{count} {name.lower()}" for name, count in sorted(state.counts.items())) or "unknown"
    reasons = "; ".join(f"{reason}: {_REASONS[reason]}" if reason in _REASONS else reason for reason in state.reasons)
    yield f"slurm      {job.stage:<9} job {job.job}{size}: {counts}" + (f"  ({reasons})" if reasons else "")
    for failure in state.failures[:_SHOWN]:
        yield f"failed     {failure.name} ({failure.state.lower()}): {failure.line}"
        yield f"           {failure.log}"
    if len(state.failures) > _SHOWN:
        yield f"           and {len(state.failures) - _SHOWN} more"


def jobs_json(states: Sequence[State]) -> list[dict[str, Any]]:
    """The same as plain values."""
    return [{"stage": state.job.stage, "job": state.job.job, "elements": state.job.elements,
             "states": dict(state.counts), "reasons": state.reasons,
             "failures": [{**failure._asdict(), "log": str(failure.log)} for failure in state.failures]}
            for state in states]


def submitted_text(name: str, submitted: Sequence[Submitted]) -> str:
    """What was submitted, and how to watch it."""
    lines = [f"submitted  {job.stage:<9} job {job.job}" + (f", {job.elements} elements" if job.elements else "")
             for job in submitted]
    return "\n".join([*lines, f"watch      python -m pipeline status {name}",
                      f"logs       python -m pipeline logs {name}", f"cancel     python -m pipeline cancel {name}"])


def logs_text(states: Sequence[State], directory: Path, stage: str | None, count: int) -> str:
    """The ends of the logs that matter: of failed elements, else the newest of each stage."""
    failed = [failure.log for state in states for failure in state.failures if stage in (None, failure.stage)]
    chosen = failed or list(_newest(directory / "logs", stage))
    return "\n".join(line for log in chosen for line in (f"==> {log} <==", *tail(log, count), ""))


def _newest(logs: Path, stage: str | None) -> Iterator[Path]:
    by_stage: dict[str, list[Path]] = {}
    for path in logs.rglob("*.log"):
        by_stage.setdefault(path.name.partition(".")[0], []).append(path)
    for name, paths in sorted(by_stage.items()):
        if stage in (None, name):
            yield max(paths, key=lambda path: path.stat().st_mtime)
