"""Plain text for `plan`, `status`, `config` and `list`: quick, without torch, reading no table."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Experiment
from pipeline.pieces import CONFIGS, available
from pipeline.plan import Plan
from pipeline.report.forecast import StageForecast, forecast, free_bytes
from pipeline.status import StageStatus
from pipeline.support.errors import UserError

# What `plan` and `status` print stands in columns of these widths.
_PLAN = "{:<9}  {:>12}  {:>13}  {:>7}  {}"
_STATUS = "{:<9}  {:>13}  {:>14}  {:>8}  {}"
_KINDS = ("experiments", "benchmarks", "encoders", "training", "metrics")


def plan_json(plan: Plan) -> dict[str, Any]:
    """Per stage what is to do and why; bytes and rows are null where they cannot be known yet."""
    stages, free = forecast(plan), free_bytes(plan.experiment.work_dir)
    return {"experiment": plan.experiment.name, "work_dir": plan.experiment.settings.work_dir,
            "stages": [vars(stage) for stage in stages], "free_bytes": free, "needed_bytes": _needed(stages),
            "fits": _fits(stages, free)}


def plan_text(plan: Plan) -> str:
    stages = forecast(plan)
    lines = [_PLAN.format("stage", "to do", "rows", "disk", "why")]
    for stage in stages:
        first, *others = list(_reasons(stage)) or ["nothing to do"]
        lines.append(_PLAN.format(stage.stage, _to_do(stage), _rows(stage), _disk(stage), first))
        lines.extend(_PLAN.format("", "", "", "", reason) for reason in others)
    return "\n".join([*lines, _room(plan, stages)])


def _reasons(stage: StageForecast) -> Iterator[str]:
    for reason, count in stage.reasons.items():
        yield reason + (f"  [{count} jobs]" if count > 1 else "")
    for awaited, count in stage.waits_for.items():
        yield f"waits for {awaited}" + (f"  [{count} jobs]" if count > 1 else "")


def _to_do(stage: StageForecast) -> str:
    return f"{stage.to_do} of {stage.units}" + ("+?" if stage.waits_for else "")


def _rows(stage: StageForecast) -> str:
    if stage.rows is None:
        return "?"
    return "" if not stage.rows else f"{stage.rows:,}" if stage.rows_are_exact else f"~{_rounded(stage.rows)}"


def _rounded(number: int) -> str:
    """Two digits say enough of an estimate."""
    return f"{float(f'{number:.2g}'):,.0f}"


def _disk(stage: StageForecast) -> str:
    return "?" if stage.bytes is None else size_text(stage.bytes) if stage.bytes else ""


def size_text(count: float) -> str:
    """Bytes as people read them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit takes everything")


def _needed(stages: Sequence[StageForecast]) -> int | None:
    """None if what some stage takes cannot be told yet."""
    known = [stage.bytes for stage in stages if stage.bytes is not None]
    return sum(known) if len(known) == len(stages) else None


def _fits(stages: Sequence[StageForecast], free: int) -> bool | None:
    """False as soon as what is known does not fit; None if it may or may not."""
    if sum(stage.bytes or 0 for stage in stages) > free:
        return False
    return None if _needed(stages) is None else True


def _room(plan: Plan, stages: Sequence[StageForecast]) -> str:
    free = free_bytes(plan.experiment.work_dir)
    verdict = {True: "enough", False: "NOT ENOUGH", None: "enough for what is known; other sizes are not"}
    return f"free on {plan.experiment.settings.work_dir}: {size_text(free)}   {verdict[_fits(stages, free)]}"


def status_text(found: Sequence[StageStatus], warnings: Sequence[str], damaged: Sequence[str]) -> str:
    lines = [_STATUS.format("stage", "done", "rate", "left", "state")]
    for stage in found:
        done = f"{stage.done}/{stage.total}" + ("+?" if stage.waiting else "")
        left = _time(stage.seconds_left)
        lines.append(_STATUS.format(stage.stage, done, _rate(stage.rate), left, _state(stage)))
    lines.extend(f"warning    {text}" for text in warnings)
    lines.extend(f"damaged    {text}" for text in damaged)
    if damaged:
        lines.append("           remove each damaged file and the manifest.json beside it, then run again")
    return "\n".join(lines)


def _state(stage: StageStatus) -> str:
    if stage.state == "running" and stage.seconds_since_last is not None:
        return f"running, last unit {_time(stage.seconds_since_last)} ago"
    return stage.state


def _rate(rate: float | None) -> str:
    if rate is None:
        return ""
    return f"{rate:,.1f} units/s" if rate >= 1 else f"{rate * 60:,.1f} units/min"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for limit, size, unit in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds / 86400:,.0f} d"


def config_text(experiment: Experiment) -> str:
    """The merged configuration as YAML, each value with the place it comes from."""
    modules = {f"encoders.{choice.name}": choice.module for choice in experiment.encoders}
    lines = list(_config_lines(experiment.resolved, {**_module_notes(modules), **experiment.origins}))
    width = min(60, max(len(text) for text, _ in lines))
    return "\n".join(f"{text:<{width}}  # {note}" if note else text for text, note in lines)


def _module_notes(modules: Mapping[str, str]) -> dict[str, str]:
    return {key: f"encoder: {module}" for key, module in modules.items()}


def _config_lines(values: Mapping[str, Any], origins: Mapping[str, str],
                  prefix: str = "") -> Iterator[tuple[str, str]]:
    """(line of YAML, where it comes from)"""
    indent = "  " * prefix.count(".")
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:", origins.get(path, "")
            yield from _config_lines(value, origins, f"{path}.")
        else:
            yield f"{indent}{key}: {_flow(value)}", _near(origins.get(path, "default"))


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return str(text).removesuffix("\n...\n").strip()


def _near(where: str) -> str:
    """`file:line`, relative to the current directory where the file is below it."""
    path, colon, line = where.rpartition(":")
    if not colon or not Path(path).is_absolute():
        return where
    relative = os.path.relpath(path)
    return where if relative.startswith("..") else f"{relative}:{line}"


def listing(kind: str | None = None) -> str:
    """What there is to choose from: of one kind, or of all."""
    if kind is None:
        return "\n\n".join(f"{name}\n{listing(name)}" for name in _KINDS)
    if kind not in _KINDS:
        raise UserError(f"'{kind}' cannot be listed", do=f"choose from: {', '.join(_KINDS)}")
    entries = _metrics() if kind == "metrics" else {name: _entry(kind, name) for name in available(kind)}
    width = max(map(len, entries), default=0)
    return "\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in entries.items())


def _metrics() -> dict[str, str]:
    from pipeline.metrics.ranking import known_metrics
    documented = {name: inspect.getdoc(function) or "" for name, function in known_metrics().items()}
    return {name: text.split("\n")[0] for name, text in documented.items()}


def _entry(kind: str, name: str) -> str:
    """What a configuration file says of itself: its first comment, and the one fact that matters most."""
    text = (CONFIGS / kind / f"{name}.yaml").read_text(encoding="utf-8")
    first = next((line for line in text.splitlines() if line.strip()), "")
    comment = first.lstrip("# ") if first.startswith("#") else ""
    values = yaml.safe_load(text) or {}
    if kind == "benchmarks":
        return f"{len(values.get('tasks') or {}):>3} tasks  {comment}"
    return f"{values.get('encoder', '?'):<12}  {comment}" if kind == "encoders" else comment
