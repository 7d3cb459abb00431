"""Where an experiment stands, derived from disk alone: right from any machine that sees the files.

Never imports torch and reads only manifests, directory listings and file times.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.artifacts import damages
from pipeline.plan import MODULES, Plan
from pipeline.stages import STAGES

_RECENT = 50       # units that the rate is taken over
_STALL = 5.0       # so many median gaps without a unit, and the stage is called stalled
_PATIENCE = 60.0   # but never before so many seconds


@dataclass(frozen=True)
class StageStatus:
    """Units done and known so far; `waiting` jobs are not known yet. Times in seconds, rate in units per second."""

    stage: str
    done: int
    total: int
    waiting: int
    state: str
    rate: float | None
    seconds_left: float | None
    seconds_since_last: float | None


def status_of(plan: Plan) -> list[StageStatus]:
    found: list[StageStatus] = []
    for stage in STAGES:
        found.append(_stage(plan, stage, found[-1] if found else None))
    return found


def _stage(plan: Plan, stage: str, earlier: StageStatus | None) -> StageStatus:
    jobs = plan.jobs[stage]
    total = sum(len(MODULES[stage].units(job)) for job in jobs)
    done = total - sum(len(plan.missing_units(job, stage)) for job in jobs)
    landed = sorted(_times(jobs, stage)) if done < total else []
    rate, since = _pace(landed)
    left = (total - done) / rate if rate and done < total else None
    state = _state(plan, stage, done, earlier, landed, since)
    return StageStatus(stage, done, total, len(plan.waiting[stage]), state, rate, left, since)


def _times(jobs: list[Any], stage: str) -> list[float]:
    times = []
    for job in jobs:
        for unit in MODULES[stage].units(job):
            try:
                times.append(job.artifact.path(unit).stat().st_mtime)
            except FileNotFoundError:
                continue
    return times


def _pace(landed: list[float]) -> tuple[float | None, float | None]:
    if not landed:
        return None, None
    recent = landed[-_RECENT:]
    span = recent[-1] - recent[0]
    return ((len(recent) - 1) / span if span > 0 else None), time.time() - landed[-1]


def _state(plan: Plan, stage: str, done: int, earlier: StageStatus | None, landed: list[float],
           since: float | None) -> str:
    if plan.is_done(stage):
        return "done"
    if earlier is not None and earlier.state != "done":
        return f"waits for {earlier.stage}" if done == 0 else f"partly done; waits for {earlier.stage}"
    if since is None:
        return "not started"
    gaps = [later - sooner for sooner, later in zip(landed, landed[1:])]
    patience = max(_PATIENCE, _STALL * statistics.median(gaps)) if gaps else _PATIENCE
    return f"stalled: nothing for {since:,.0f} s" if since > patience else "running"


def as_json(found: list[StageStatus]) -> list[dict[str, Any]]:
    return [asdict(stage) for stage in found]


def warnings_of(plan: Plan) -> list[str]:
    """What the audits and the manifests of finished stages say that a reader of the scores must know."""
    found = []
    for job in plan.jobs["collect"]:
        if job.artifact.is_complete() and (missing := job.artifact.manifest().get("missing_images")):
            if count := missing["count"]:
                found.append(f"{job.artifact.name}: {count} images are missing (first: {missing['first'][0]})")
    for job in plan.jobs["embed"]:
        if job.artifact.is_complete() and (flaws := job.artifact.manifest()["flaws"])["count"]:
            found.append(f"{job.artifact.name}: {flaws['count']} items are flawed (first: {flaws['first'][0]})")
    for scored in plan.scored:
        if scored.job.audit.is_complete():
            found.extend(_audit_warnings(f"{scored.task.name} on {scored.pool}", scored.job.audit.manifest()))
    return list(dict.fromkeys(found))


def _audit_warnings(subject: str, audit: dict[str, Any]) -> list[str]:
    found = []
    if audit["relevant_outside_pool"]:
        share = audit["relevant_outside_pool"] / max(audit["relevant"], 1)
        found.append(f"{subject}: {share:.1%} of the relevant candidates are not in the pool "
                     "(see the ceilings in the report)")
    if count := audit["unanswerable_queries"]["count"]:
        found.append(f"{subject}: {count} queries have no relevant candidate in the pool")
    if audit["qrels_of_unknown_queries"]:
        found.append(f"{subject}: {audit['qrels_of_unknown_queries']} qrels name queries that are not in the task")
    return found


def all_damages(plan: Plan) -> list[str]:
    """Every file of every finished artifact whose bytes are not those that were written (status --deep)."""
    return [line for artifact in plan.artifacts() if artifact.is_complete() for line in damages(artifact.directory)]
