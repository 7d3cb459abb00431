"""An experiment -> the jobs of every stage, what of them is on disk already, and why the rest must run.

Nothing is computed here and torch is never imported. What comes after `collect` is known by the content of the
collected tables, so until a table is there, the jobs that depend on it are counted as waiting.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.artifacts import MANIFEST, Artifact, Identity, P, canonical_json, read_manifest
from pipeline.benchmarks import Task, load_adapter
from pipeline.config import Experiment, part
from pipeline.metrics.ranking import Metric
from pipeline.pieces import EncoderChoice
from pipeline.stages import STAGES, collect, embed, index, retrieve, score
from pipeline.support.errors import UserError

MODULES: Mapping[str, ModuleType] = {
    "collect": collect, "embed": embed, "index": index, "retrieve": retrieve, "score": score}


@dataclass(frozen=True)
class Scored:
    """One number-bearing cell of the final table: an encoder, a task and the pool it searched."""

    encoder: str
    task: Task
    pool: str
    job: score.Job


@dataclass
class Plan:
    """Jobs by stage in the order they run; `waiting` names jobs whose identity is not known yet."""

    experiment: Experiment
    jobs: dict[str, list[Any]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    waiting: dict[str, list[str]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    scored: list[Scored] = field(default_factory=list)

    def artifacts(self) -> list[Artifact]:
        return [job.artifact for stage in STAGES for job in self.jobs[stage]]

    def missing_units(self, job: Any, stage: str) -> list[str]:
        if job.artifact.is_complete():
            return []
        present = job.artifact.present()
        return [unit for unit in MODULES[stage].units(job) if unit not in present]

    def is_done(self, stage: str) -> bool:
        return not self.waiting[stage] and all(job.artifact.is_complete() for job in self.jobs[stage])


def make_plan(experiment: Experiment) -> Plan:
    return _Planner(experiment).plan()


class _Planner:
    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.settings = experiment.settings
        self.root = experiment.work_dir / "artifacts"
        self.result = Plan(experiment)
        self.adapter = load_adapter(experiment.benchmark.adapter)
        self.known: dict[str, Any] = {}
        self.identities: dict[str, dict[str, Any]] = {}

    def plan(self) -> Plan:
        """The whole graph: each encoder, each task, each pool it searches."""
        for task in self.experiment.tasks:
            self.collect_task(task)
        for encoder in self.experiment.encoders:
            for task in self.experiment.tasks:
                for pool in self.settings.pools:
                    self.search(encoder, task, pool)
        return self.result

    def artifact(self, stage: str, name: str, params: P, inputs: Mapping[str, str]) -> Artifact[P]:
        return Artifact(self.root, name, Identity(stage, MODULES[stage].VERSION, params, inputs))

    def add(self, stage: str, job: Any) -> Any:
        """The job, or an equal one that is in the plan already: pools are shared by tasks."""
        known = self.known.setdefault(job.artifact.label, job)
        if known is job:
            self.result.jobs[stage].append(job)
        return known

    def wait(self, stage: str, name: str) -> None:
        if name not in self.result.waiting[stage]:
            self.result.waiting[stage].append(name)

    def collect_pool(self, pool: str) -> collect.PoolJob | None:
        benchmark = self.experiment.benchmark
        artifact = self.collected(f"pool.{pool}", self.adapter.pool_sources(benchmark, pool))
        if artifact is None:
            return None
        job: collect.PoolJob = self.add("collect", collect.PoolJob(artifact, benchmark, pool, self.experiment.images))
        return job

    def collect_task(self, task: Task) -> collect.TaskJob | None:
        benchmark = self.experiment.benchmark
        artifact = self.collected(task.name, self.adapter.task_sources(benchmark, task))
        if artifact is None:
            return None
        job: collect.TaskJob = self.add("collect", collect.TaskJob(artifact, benchmark, task, self.experiment.images))
        return job

    def collected(self, subject: str, sources: list[Path]) -> Artifact | None:
        """Source files enter by path under the root, size and time: that is quick, and enough to look again."""
        benchmark = self.experiment.benchmark
        root = Path(benchmark.root)
        try:
            states = {path: path.stat() for path in sources}
        except FileNotFoundError:
            self.wait("collect", f"{benchmark.name}.{subject}")
            return None
        inputs = {os.path.relpath(path, root): f"{state.st_size}:{state.st_mtime_ns}" for path, state in states.items()}
        params = collect.Params(benchmark.adapter, benchmark.split, subject, canonical_json(dict(benchmark.options)),
                                self.settings.collect.rows_per_shard)
        return self.artifact("collect", f"{benchmark.name}.{subject}", params, inputs)

    def audited(self, task: Task, pool: str, tables: Tables | None) -> Artifact | None:
        name = f"{self.experiment.benchmark.name}.{task.name}.{pool}.audit"
        if tables is None:
            self.wait("collect", name)
            return None
        params = collect.AuditParams(self.metrics(task), self.settings.retrieve.depth)
        artifact = self.artifact("collect", name, params, tables.digests)
        job: collect.AuditJob = self.add("collect", collect.AuditJob(artifact, tables.task, tables.pools))
        return job.artifact

    def metrics(self, task: Task) -> tuple[str, ...]:
        """Every metric of a task, each once: the ones at its cutoffs, its headline, those over the whole run."""
        chosen, depth = self.settings.score, self.settings.retrieve.depth
        at_cutoffs = [f"{name}@{cutoff}" for name in chosen.cutoff_metrics for cutoff in task.cutoffs]
        parsed = [Metric.parse(name) for name in [*at_cutoffs, task.headline, *chosen.metrics]]
        for metric in parsed:
            if metric.k is not None and metric.k > depth:
                raise UserError(f"{metric} needs {metric.k} candidates per query, retrieve.depth is {depth}",
                                f"task {task.name}", f"set retrieve.depth={metric.k} or more")
        return tuple(dict.fromkeys(str(metric) for metric in parsed))

    def search(self, encoder: EncoderChoice, task: Task, pool: str) -> None:
        """One cell of the final table: embed the task and the pool's members, index them, retrieve, score."""
        pools = self.experiment.members(pool, task)
        tables = self.tables(task, pools)
        audit = self.audited(task, pool, tables)
        names = [f"{encoder.name}.{task.name}", *(f"{encoder.name}.pool.{name}" for name in pools)]
        if tables is None or audit is None:
            run = [f"{names[0]}.{pool}"]
            for stage, waiting in {"embed": names, "index": names[1:], "retrieve": run, "score": run}.items():
                for name in waiting:
                    self.wait(stage, name)
            return
        queries = self.embedded(encoder, names[0], tables.task, self.settings.embed.instruction)
        members = tuple(self.member(encoder, name, table) for name, table in zip(names[1:], tables.pools))
        self.add_score(encoder, task, pool, self.retrieved(f"{names[0]}.{pool}", queries, members), tables, audit)

    def tables(self, task: Task, members: tuple[str, ...]) -> Tables | None:
        """The collected tables a search needs, or None while one of them is not on disk."""
        jobs = [self.collect_task(task), *(self.collect_pool(name) for name in members)]
        if any(job is None or not job.artifact.is_complete() for job in jobs):
            return None
        return Tables([job.artifact for job in jobs if job is not None])

    def embedded(self, encoder: EncoderChoice, name: str, table: Artifact, instruction: str) -> embed.Job:
        chosen = self.settings.embed
        params = embed.Params(self.identity(encoder), chosen.precision, chosen.storage, instruction, chosen.decoding)
        collected = manifest_of(table.directory)
        inputs = {"table": collected["digest"], "images": collected["image_sizes"]}
        artifact = self.artifact("embed", name, params, inputs)
        job = embed.Job(artifact, table, encoder.module, encoder.params, self.experiment.images, encoder.python)
        added: embed.Job = self.add("embed", job)
        return added

    def identity(self, encoder: EncoderChoice) -> dict[str, Any]:
        if encoder.name not in self.identities:
            self.identities[encoder.name] = encoder.identity()
        return self.identities[encoder.name]

    def member(self, encoder: EncoderChoice, name: str, table: Artifact) -> retrieve.Member:
        pool = self.embedded(encoder, name, table, "")
        params = part(self.settings.index, index.Params).needed()
        inputs = {"embeddings": pool.artifact.fingerprint}
        artifact = self.artifact("index", f"{name}.{slug(params.factory)}", params, inputs)
        self.add("index", index.Job(artifact, pool.artifact))
        return retrieve.Member(pool.artifact, artifact, "" if params.is_exact else index.FAISS)

    def retrieved(self, name: str, queries: embed.Job, members: tuple[retrieve.Member, ...]) -> retrieve.Job:
        inputs = {"queries": queries.artifact.fingerprint, **dict(map(retrieve.Member.as_input, members))}
        params = part(self.settings.retrieve, retrieve.Params).needed(self.settings.index.is_exact)
        artifact = self.artifact("retrieve", f"{name}.{slug(self.settings.index.factory)}", params, inputs)
        job: retrieve.Job = self.add("retrieve", retrieve.Job(artifact, queries.artifact, len(queries.shards), members))
        return job

    def add_score(self, encoder: EncoderChoice, task: Task, pool: str, run: retrieve.Job, tables: Tables,
                  audit: Artifact) -> None:
        chosen = self.settings.score
        params = score.Params(self.metrics(task), task.headline, chosen.confidence, chosen.resamples, chosen.seed)
        inputs = {"run": run.artifact.fingerprint, **tables.digests}
        artifact = self.artifact("score", run.artifact.name, params, inputs)
        job = self.add("score", score.Job(artifact, run.artifact, tables.task, tables.pools, audit))
        self.result.scored.append(Scored(encoder.name, task, pool, job))


class Tables:
    """Complete tables of one search: a task's and its pools', known downstream by the digests of their content."""

    def __init__(self, artifacts: list[Artifact]):
        self.task, self.pools = artifacts[0], tuple(artifacts[1:])

    @cached_property
    def digests(self) -> dict[str, str]:
        task = manifest_of(self.task.directory)
        pools = {f"pool {pool.name}": manifest_of(pool.directory)["digest"] for pool in self.pools}
        return {"queries": task["digest"], "qrels": task["qrels_digest"], **pools}


def manifest_of(directory: Path) -> dict[str, Any]:
    """The manifest of a complete artifact; read again only if the file is another one."""
    return _manifest(directory, (directory / MANIFEST).stat().st_mtime_ns)


@lru_cache(maxsize=4096)
def _manifest(directory: Path, _: int) -> dict[str, Any]:
    return read_manifest(directory)


def slug(factory: str) -> str:
    """An index factory string as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", factory.lower()).strip("_")
