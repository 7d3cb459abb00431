"""How long the experiment will embed and what its vectors take, from what was measured a moment ago.

Per modality: rows that are left, by the rate of the encoder and those of decoding and preparing, which share the
processor with an encoder that runs on it and work beside one that does not. It is an estimate: the samples' images and
texts are not the benchmark's, and the other stages are not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from pipeline.config import Experiment
from pipeline.devices import resolve_device
from pipeline.doctor.places import room
from pipeline.doctor.samples import DECODING
from pipeline.loading import num_loaders
from pipeline.plan import Plan, make_plan, manifest_of
from pipeline.report.forecast import forecast
from pipeline.support.findings import NOTE, OK, Finding

NAME, _SPEED = "time to embed", "speed of "
_BYTES = {"float16": 2, "float32": 4}


def findings(experiment: Experiment, measured: Sequence[Finding]) -> Iterator[Finding]:
    """Of an experiment with one encoder; nothing if that was not `measured`."""
    values = {finding.name: finding.value for finding in measured if finding.value}
    speeds = {name.removeprefix(_SPEED): value for name, value in values.items() if name.startswith(_SPEED)}
    if not speeds:
        return
    plan = make_plan(experiment)
    seconds = {modality: _seconds(experiment, modality, rate, values) for modality, rate in speeds.items()}
    rows = next(stage.rows for stage in forecast(plan) if stage.stage == "embed")
    if plan.waiting["embed"]:
        yield _at_most(rows, max(seconds.values()))
    else:
        yield _about(rows_left(plan), seconds)
    if rows:
        size = rows * int(values["build"]) * _BYTES[experiment.settings.embed.storage]
        yield room("disk for its vectors", [size], experiment.work_dir)


def _about(rows: Mapping[str, int], seconds: Mapping[str, float]) -> Finding:
    """A modality that the encoder does not take will be refused by embed, in its own words."""
    if not rows:
        return Finding(OK, NAME, "nothing is left")
    total = sum(count * seconds.get(modality, 0.0) for modality, count in rows.items())
    return Finding(OK, NAME, f"about {duration_text(total)}: " + ", ".join(
        f"{count:,} {modality}" for modality, count in rows.items()))


def _at_most(rows: int | None, seconds: float) -> Finding:
    if rows is None:
        return Finding(NOTE, NAME, "not known before the tables are collected")
    return Finding(NOTE, NAME, f"at most about {duration_text(rows * seconds)}: some {rows:,} rows, as if all were of "
                               "the slowest kind; more is known when the tables are collected")


def rows_left(plan: Plan) -> dict[str, int]:
    """Rows of each modality that are still to be embedded, as far as they are known."""
    left: Counter[str] = Counter()
    for job in plan.jobs["embed"]:
        rows = sum(job.rows_of(unit) for unit in plan.missing_units(job, "embed"))
        table = manifest_of(job.table.directory)
        for modality, count in table["modalities"].items():
            left[modality] += round(rows * count / table["rows"])
    return {modality: count for modality, count in sorted(left.items()) if count}


def _seconds(experiment: Experiment, modality: str, rate: float, values: Mapping[str, float]) -> float:
    """For one item, with all devices and loaders at work."""
    import torch
    device = resolve_device(experiment.settings.embed.device)
    is_cuda = torch.device(device).type == "cuda"
    loaders = max(1, num_loaders(experiment.settings.embed.loaders, 10**6))
    preparing = _inverse(values.get(f"preparing {modality}"))
    preparing += _inverse(values.get(DECODING)) if "image" in modality else 0.0
    if not is_cuda:
        return 1 / rate + preparing / loaders
    workers = experiment.settings.local.workers
    return max(1 / rate / (torch.cuda.device_count() if workers < 0 else max(1, workers)), preparing / loaders)


def _inverse(rate: float | None) -> float:
    return 1 / rate if rate else 0.0


def duration_text(seconds: float) -> str:
    """In the unit that people would use."""
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
