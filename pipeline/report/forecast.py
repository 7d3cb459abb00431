"""What a plan will take: units, rows and bytes by stage, before anything runs.

Rows are exact once a table is collected; before that they are estimated from the size of the benchmark's
files and the length of their first lines. Bytes are an upper estimate of what grows with the data. Those of
vectors are known only when a shard of the encoder is on disk: planning never loads an encoder to ask for its
dimension.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.artifacts import Artifact
from pipeline.benchmarks import load_adapter
from pipeline.embeddings import shard_facts
from pipeline.plan import MODULES, Plan, manifest_of
from pipeline.reasons import why
from pipeline.stages import STAGES
from pipeline.stages.collect import AuditJob, PoolJob, TaskJob
from pipeline.support.errors import UserError

_SAMPLE = 1 << 18         # bytes of a file that tell the length of its lines
_BYTES_PER_HIT = 16       # of a run table as it is written: more than was measured
_ITEM_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class StageForecast:
    """Units of the jobs known so far; rows and bytes are None where they cannot be known yet.

    `reasons` tells why jobs must run, and how many for each reason; `waits_for` tells for what jobs must wait
    before their own identity is known, and how many.
    """

    stage: str
    to_do: int
    units: int
    rows: int | None
    rows_are_exact: bool
    bytes: int | None
    reasons: dict[str, int]
    waits_for: dict[str, int]


class _Table(NamedTuple):
    """A collected table, or what its source promises: rows and bytes still to be written."""

    rows: int | None
    bytes: int | None
    is_collected: bool


def forecast(plan: Plan) -> list[StageForecast]:
    forecaster = _Forecaster(plan)
    return [forecaster.stage(stage) for stage in STAGES]


def free_bytes(directory: Path) -> int:
    """Free space where `directory` is or will be."""
    absolute = directory.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    return shutil.disk_usage(existing).free


class _Forecaster:
    def __init__(self, plan: Plan):
        self.plan, self.reasons = plan, why(plan)
        self.missing = {job.artifact.label: plan.missing_units(job, stage)
                        for stage in STAGES for job in plan.jobs[stage]}
        self.tables = dict(_tables(plan))
        self.dimensions = {choice.name: _dimension(plan, choice.name) for choice in plan.experiment.encoders}

    def stage(self, stage: str) -> StageForecast:
        jobs, waiting = self.plan.jobs[stage], self.plan.waiting[stage]
        units = sum(len(MODULES[stage].units(job)) for job in jobs)
        to_do = sum(len(self.missing[job.artifact.label]) for job in jobs)
        reasons = Counter(_short(self.reasons[job.artifact.label]) for job in jobs
                          if job.artifact.label in self.reasons)
        nothing = not to_do and not waiting
        is_exact = nothing or stage != "collect" and all(table.is_collected for table in self.tables.values())
        return StageForecast(stage, to_do, units, 0 if nothing else self.rows(stage), is_exact,
                             0 if nothing else self.bytes(stage), dict(reasons.most_common()),
                             dict(Counter(_awaited(stage, name) for name in waiting)))

    def work(self, stage: str) -> list[tuple[str, int | None]]:
        """(artifact name, rows of work that is left) for every job with something left."""
        jobs = [job for job in self.plan.jobs[stage] if self.missing[job.artifact.label]]
        rows = _shard_rows if stage == "embed" else lambda job, _: self.table_rows(job.artifact.name)
        left = [(job.artifact.name, rows(job, self.missing[job.artifact.label])) for job in jobs]
        return left + [(name, self.table_rows(name)) for name in self.plan.waiting[stage]]

    def rows(self, stage: str) -> int | None:
        """Rows of tables; from `retrieve` on, queries."""
        if stage == "collect":
            return _sum(table.rows for table in self.tables.values() if not table.is_collected)
        return _sum(rows for _, rows in self.work(stage))

    def bytes(self, stage: str) -> int | None:
        settings = self.plan.experiment.settings
        if stage == "collect":
            return _sum(table.bytes for table in self.tables.values() if not table.is_collected)
        if stage == "embed":
            return self.vector_bytes("embed", _ITEM_BYTES[settings.embed.storage])
        if stage == "index":
            if settings.index.factory != "Flat":
                return None
            return self.vector_bytes("index", _ITEM_BYTES["float32"]) if settings.index.write_faiss else 0
        queries = self.rows(stage) if stage == "retrieve" else 0
        return None if queries is None else queries * settings.retrieve.depth * _BYTES_PER_HIT

    def vector_bytes(self, stage: str, item_bytes: int) -> int | None:
        sizes = []
        for name, rows in self.work(stage):
            dimension = self.dimensions[name.split(".")[0]]
            sizes.append(None if rows is None or dimension is None else rows * dimension * item_bytes)
        return _sum(sizes)

    def table_rows(self, name: str) -> int | None:
        """Rows of the table behind an artifact called `encoder.task...` or `encoder.pool.name...`."""
        _, first, *others = name.split(".")
        table = self.tables.get(f"pool.{others[0]}" if first == "pool" and others else first)
        return table.rows if table else None


def _sum(counts: Iterable[int | None]) -> int | None:
    """None if one of them is not known."""
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total


def _awaited(stage: str, name: str) -> str:
    return "the benchmark's files" if stage == "collect" and not name.endswith(".audit") else "the tables"


def _short(reason: str) -> str:
    """Inputs by their kind: which of a hundred pools is another one says little in a plan."""
    parts = (re.sub(r"^(input changed: \w+) .*", r"\1", part) for part in reason.split("; "))
    return "; ".join(dict.fromkeys(parts))


def _shard_rows(job: Any, missing: list[str]) -> int:
    rows = {unit: shard["rows"] for unit, shard in zip(MODULES["embed"].units(job), job.shards)}
    return sum(rows[unit] for unit in missing)


def _tables(plan: Plan) -> Iterator[tuple[str, _Table]]:
    """`task` or `pool.name` -> what is known of its table."""
    prefix = f"{plan.experiment.benchmark.name}."
    for name in plan.waiting["collect"]:
        if not name.endswith(".audit"):
            yield name.removeprefix(prefix), _Table(None, None, False)
    for job in plan.jobs["collect"]:
        if not isinstance(job, AuditJob):
            yield job.artifact.name.removeprefix(prefix), _table(job)


def _table(job: PoolJob | TaskJob) -> _Table:
    if job.artifact.is_complete():
        return _Table(manifest_of(job.artifact.directory)["rows"], 0, True)
    adapter = load_adapter(job.benchmark.adapter)
    if isinstance(job, PoolJob):
        return _promised(adapter.pool_sources(job.benchmark, job.pool))
    return _promised(adapter.task_sources(job.benchmark, job.task))


def _promised(sources: list[Path]) -> _Table:
    """By the first source, which holds the rows; a compressed table takes less than its text."""
    path = sources[0]
    if path.suffix != ".jsonl":
        return _Table(None, None, False)
    with path.open("rb") as file:
        sample = file.read(_SAMPLE)
    size, lines = path.stat().st_size, sample.count(b"\n")
    if not lines:
        return _Table(min(size, 1), size, False)
    return _Table(round(size * lines / (sample.rfind(b"\n") + 1)), size, False)


def _dimension(plan: Plan, encoder: str) -> int | None:
    """From any shard this encoder has written, for this experiment or another one."""
    own = [job for job in plan.jobs["embed"] if job.artifact.name.split(".")[0] == encoder]
    for artifact in (job.artifact for job in own):
        shards = sorted(file for file in artifact.present() if file.startswith("embeddings-"))
        if shards:
            return shard_facts(artifact.path(shards[0]), artifact.fingerprint).dimension
    return _dimension_elsewhere(own[0].artifact, encoder) if own else None


def _dimension_elsewhere(artifact: Artifact, encoder: str) -> int | None:
    identity = artifact.identity.as_json()["params"]["encoder"]
    for directory in sorted((artifact.root / "embed").glob(f"{encoder}.*")):
        try:
            manifest = manifest_of(directory)
        except UserError:  # not complete, or damaged: it simply tells nothing
            continue
        if manifest["params"]["encoder"] == identity:
            return int(manifest["dimension"])
    return None
