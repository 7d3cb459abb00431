"""Why must this job run? Its identity beside the one it had when this experiment last ran."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, canonical_json, write_json
from pipeline.plan import Plan
from pipeline.stages import STAGES


def record(plan: Plan) -> None:
    """Remember what every job of the experiment is now."""
    jobs = {f"{artifact.identity.stage}/{artifact.name}": artifact.identity.as_json() for artifact in plan.artifacts()}
    write_json(plan.experiment.directory / "plan.json", jobs)


def recorded(directory: Path) -> dict[str, Any]:
    """Identities by `stage/name` when the experiment last ran; empty if it never did."""
    try:
        return dict(json.loads((directory / "plan.json").read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def why(plan: Plan) -> dict[str, str]:
    """For every job that has something to do, by the label of its artifact: the reason in a few words."""
    before, found = recorded(plan.experiment.directory), {}
    for stage in STAGES:
        for job in plan.jobs[stage]:
            missing = plan.missing_units(job, stage)
            if missing or not job.artifact.is_complete():
                found[job.artifact.label] = _reason(plan, job.artifact, len(missing), before)
    return found


def _reason(plan: Plan, artifact: Artifact, num_missing: int, before: Mapping[str, Any]) -> str:
    present = len(artifact.present())
    if present:
        return f"{num_missing} missing, {present} there" if num_missing else "all there, not sealed"
    earlier = before.get(f"{artifact.identity.stage}/{artifact.name}")
    now = json.loads(canonical_json(artifact.identity.as_json()))  # as it was recorded: tuples become lists
    if earlier is None:
        return "new"
    changes = [*_changes(plan, earlier, now)]
    return "; ".join(changes[:3]) if changes else "was deleted"


def _changes(plan: Plan, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    stage = now["stage"]
    if earlier["version"] != now["version"]:
        yield f"{stage} means something new: version {earlier['version']} -> {now['version']}"
    old, new = _flat(earlier["params"]), _flat(now["params"])
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            where = plan.experiment.origins.get(f"{stage}.{key}")
            yield f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}" + (f" ({where})" if where else "")
    for name in sorted(earlier["inputs"].keys() | now["inputs"].keys()):
        if earlier["inputs"].get(name) != now["inputs"].get(name):
            yield f"input changed: {name}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
