"""Slurm's commands and what they say: submit, ask, cancel. Nothing here knows what is computed.

Promises: a command that is missing or refuses is told with its own words. Without an accounting database the states of
jobs come from the controller alone, which forgets them some minutes after their end; then the logs say how they ended.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.support.errors import UserError

_SECONDS = 60
ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESIZING", "SUSPENDED",
          "SIGNALING", "STAGE_OUT", "STOPPED")


class Element(NamedTuple):
    """A job, or one element of its array (`task`); `reason` says what a pending one waits for."""

    job: str
    task: str | None
    state: str
    reason: str

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE


def submit(line: Sequence[str]) -> str:
    """Run an `sbatch --parsable` line; the id of the job."""
    return _run(line).strip().partition(";")[0]


def cancel(jobs: Sequence[str]) -> None:
    _run(["scancel", *jobs])


def max_array_size() -> int:
    """How many elements an array may have here."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run(["scontrol", "show", "config"]), re.MULTILINE)
    return int(found[1]) if found else 1001  # Slurm's own default


def elements_of(jobs: Iterable[str]) -> list[Element]:
    """What Slurm knows of these jobs; those that it has forgotten are left out."""
    wanted = set(jobs)
    found = _queue(wanted) if wanted else []
    return [*found, *_accounted(wanted - {each.job for each in found})]


def _queue(jobs: set[str]) -> list[Element]:
    """squeue refuses a list in which one job is unknown, so all of this user's are asked for."""
    text = _run(["squeue", "--noheader", "--me", "--states=all", "--array", "--format=%F|%K|%T|%r"])
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 3]
    return [Element(job, None if task in ("N/A", "") else task, state, reason)
            for job, task, state, reason in rows if job in jobs]


def _accounted(jobs: set[str]) -> list[Element]:
    if not jobs:
        return []
    try:
        text = _run(["sacct", "-X", "--noheader", "--parsable2", "--format=JobID,State", "--jobs", ",".join(jobs)])
    except UserError:  # no accounting here
        return []
    found = []
    for line in text.splitlines():
        name, _, state = line.partition("|")
        job, _, task = name.partition("_")
        if state:
            found.append(Element(job, task or None, state.split()[0], ""))
    return found


def _run(line: Sequence[str]) -> str:
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError:
        raise UserError(f"Slurm's `{line[0]}` is not on this machine", None,
                        "run this on a login node of the cluster, or without --on slurm") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"Slurm's `{line[0]}` did not answer within {_SECONDS} seconds", None,
                        "see whether the controller is up: scontrol ping") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise UserError(f"Slurm's `{line[0]}` refuses: {said}", None, "the line was: " + " ".join(line))
    return done.stdout
