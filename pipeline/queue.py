"""What Slurm and the logs say of the jobs that were submitted for an experiment."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline import slurm
from pipeline.slurm import Element
from pipeline.submission import Submitted, noted
from pipeline.support.errors import UserError

_ENDED = re.compile(r"^plumbline: \S+ \S+ \S+ ended with (\d+)$")
_TAIL = 65_536  # bytes of a log that are read for its end


class Failure(NamedTuple):
    """An element that ended badly, its log, and the line of it that says why."""

    stage: str
    name: str
    state: str
    log: Path
    line: str


class State(NamedTuple):
    """One submitted job: how many elements are in which state, what the pending ones wait for, what has failed."""

    job: Submitted
    counts: Counter[str]
    reasons: list[str]
    failures: list[Failure]


def states(directory: Path) -> list[State]:
    """Of the jobs of the last submission; without Slurm on this machine, from the logs alone."""
    jobs = last_submission(directory)
    try:
        known = slurm.elements_of(job.job for job in jobs)
    except UserError:  # the disk is visible from machines that are not part of the cluster
        known = []
    return [_state(job, [element for element in known if element.job == job.job] or list(_from_logs(job)))
            for job in jobs]


def last_submission(directory: Path) -> list[Submitted]:
    """The newest job of each stage; an earlier one of the same stage is history."""
    return list({job.stage: job for job in noted(directory)}.values())


def _state(job: Submitted, elements: list[Element]) -> State:
    counts = Counter(element.state for element in elements)
    reasons = sorted({each.reason for each in elements if each.state == "PENDING" and each.reason not in ("", "None")})
    return State(job, counts, reasons, [_failure(job, each) for each in elements if _has_failed(each)])


def _has_failed(element: Element) -> bool:
    return not element.is_active and element.state not in ("COMPLETED", "CANCELLED")


def _failure(job: Submitted, element: Element) -> Failure:
    log = job.log_of(element.task)
    name = job.job if element.task is None else f"{job.job}_{element.task}"
    return Failure(job.stage, name, element.state, log, telling_line(log))


def _from_logs(job: Submitted) -> Iterator[Element]:
    """For jobs that Slurm has forgotten: each log ends with the code its element ended with."""
    for number in range(max(1, job.elements)):
        task = str(number) if job.elements else None
        found = [_ENDED.match(line) for line in tail(job.log_of(task), 50)]
        codes = [int(match[1]) for match in found if match]
        yield Element(job.job, task, "UNKNOWN" if not codes else "FAILED" if codes[-1] else "COMPLETED", "")


def telling_line(log: Path) -> str:
    """The last line that names an error, else the last of all."""
    lines = [line for line in tail(log, 200) if line.strip()]
    errors = [line for line in lines if re.match(r"(error|failed|slurmstepd: error|\w*Error\b)", line)]
    return (errors or lines or ["(no log)"])[-1]


def tail(path: Path, count: int) -> list[str]:
    """The last lines of a log; none if it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            return file.read().decode("utf-8", "replace").splitlines()[-count:]
    except FileNotFoundError:
        return []
