"""When, where and how fast each stage was made, derived from the times of its files.

Nothing keeps a stopwatch: a stage may be made in pieces, on several machines, days apart. What is known is when each
file landed. The time of work is the sum of the gaps between them, those left out that are too long to be work.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.artifacts import MADE, Artifact
from pipeline.plan import MODULES, Plan, manifest_of
from pipeline.stages import STAGES

_PATIENCE = 60.0  # seconds without a file that are work in any case
_STALL = 5.0      # else so many median gaps


@dataclass(frozen=True)
class Timing:
    """rows: of tables; from `retrieve` on, queries. rate: rows per second of work; None where it cannot be known."""

    stage: str
    artifacts: int
    files: int
    rows: int
    bytes: int
    first: str
    last: str
    hosts: tuple[str, ...]
    seconds: float
    rate: float | None


def timings(plan: Plan) -> list[Timing]:
    """One per stage, of artifacts that are complete."""
    return [_timing(stage, [job for job in plan.jobs[stage] if job.artifact.is_complete()]) for stage in STAGES]


def _timing(stage: str, jobs: list[Any]) -> Timing:
    made = [_made(job.artifact) for job in jobs]
    times = sorted(str(entry["time"]) for entry in made if "time" in entry)
    landed = sorted(time for job in jobs for time in _times(stage, job))
    seconds, rows = _working_seconds(landed), sum(_rows(stage, job) for job in jobs)
    # The first file's own time is not known: its rows are left out, as if all files held as many.
    counted = rows * (1 - 1 / len(landed)) if landed else 0
    return Timing(stage, len(jobs), len(landed), rows, sum(_bytes(job.artifact) for job in jobs),
                  times[0] if times else "", times[-1] if times else "",
                  tuple(sorted({str(entry["host"]) for entry in made if "host" in entry})), seconds,
                  counted / seconds if seconds >= 1 and counted else None)


def _made(artifact: Artifact) -> dict[str, Any]:
    try:
        found = json.loads(artifact.path(MADE).read_text())
    except (OSError, ValueError):  # no number depends on it
        return {}
    return found if isinstance(found, dict) else {}


def _times(stage: str, job: Any) -> Iterator[float]:
    for unit in MODULES[stage].units(job):
        try:
            yield job.artifact.path(unit).stat().st_mtime
        except FileNotFoundError:
            continue


def _working_seconds(landed: list[float]) -> float:
    gaps = [later - sooner for sooner, later in zip(landed, landed[1:])]
    longest = max(_PATIENCE, _STALL * statistics.median(gaps)) if gaps else _PATIENCE
    return sum(gap for gap in gaps if gap <= longest)


def _rows(stage: str, job: Any) -> int:
    if stage == "retrieve":
        return int(manifest_of(job.queries.directory)["rows"])
    manifest = manifest_of(job.artifact.directory)
    return int(manifest["scores"]["queries"] if stage == "score" else manifest.get("rows", 0))


def _bytes(artifact: Artifact) -> int:
    return sum(int(entry["bytes"]) for entry in manifest_of(artifact.directory)["files"])
