"""collect: a benchmark's own files -> queries, candidates and qrels tables, and an audit of what they can answer.

The costliest mistakes of the field are mistakes in the data, and they must be found before an accelerator is used.
Tables are streamed shard by shard, so memory does not grow with a pool (but for the set of its ids, which finds
duplicates). A table is known downstream by the digest of its content and the sizes of its images, so a file that was
only touched or moved re-runs this stage and nothing after it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import artifacts
from pipeline.artifacts import MANIFEST, Artifact, shard_file
from pipeline.audit import audit, refuse_duplicates
from pipeline.benchmarks import Benchmark, Task, load_adapter
from pipeline.embeddings import read_table, write_table
from pipeline.images import ImageStore
from pipeline.support.errors import UserError
from pipeline.support.progress import Landed
from pipeline.tables import CANDIDATES, QRELS, QUERIES, Candidate, Query, digest, table_of

VERSION = 1
_NAMED = 20  # so many examples of a flaw are named in a manifest; the rest is counted


@dataclass(frozen=True)
class Params(artifacts.Params):
    """How a table is read: `subject` is a task or a pool, `options` the adapter's own, as canonical JSON."""

    adapter: str
    split: str
    subject: str
    options: str
    rows_per_shard: int


@dataclass(frozen=True)
class AuditParams(artifacts.Params):
    """Ceilings are those of runs of this `depth`."""

    metrics: tuple[str, ...]
    depth: int


@dataclass(frozen=True)
class Runtime(artifacts.Runtime):
    check_images: bool
    max_missing_images: int


@dataclass(frozen=True)
class PoolJob:
    artifact: Artifact[Params]
    benchmark: Benchmark
    pool: str
    images: ImageStore


@dataclass(frozen=True)
class TaskJob:
    artifact: Artifact[Params]
    benchmark: Benchmark
    task: Task
    images: ImageStore


@dataclass(frozen=True)
class AuditJob:
    """What can a search of this pool (one member, or the members of a union) answer for this task?"""

    artifact: Artifact[AuditParams]
    task: Artifact
    pools: tuple[Artifact, ...]


Job = PoolJob | TaskJob | AuditJob


def units(job: Job) -> list[str]:
    """One: tables are made in one pass, because how many shards there are is known only at the end."""
    return [MANIFEST]


def facts(job: Job, runtime: Runtime) -> dict[str, Any]:
    raise AssertionError("collect seals its artifacts itself")


def make(work: Sequence[tuple[Job, str]], runtime: Runtime) -> Iterator[Landed]:
    for job, unit in sorted(work, key=_turn):
        if job.artifact.is_complete():
            continue
        if isinstance(job, AuditJob):
            rows, found = _audit(job)
        elif isinstance(job, PoolJob):
            rows, found = _collect_pool(job, runtime)
        else:
            rows, found = _collect_task(job, runtime)
        job.artifact.seal(found)
        yield Landed(job.artifact.name, unit, rows)


def _turn(pair: tuple[Job, str]) -> str:
    """Tables as they come, then audits pool by pool: the ids of a pool are read once for all tasks that search it."""
    job, _ = pair
    return " ".join(pool.label for pool in job.pools) if isinstance(job, AuditJob) else ""


@dataclass
class _Census:
    """What is counted while rows stream by."""

    noun: str
    images: ImageStore
    check_images: bool
    ids: set[str] = field(default_factory=set)
    modalities: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    num_missing: int = 0
    pictures: Any = field(default_factory=sha256)

    def watch(self, rows: Iterable[Any]) -> Iterator[Any]:
        for row in rows:
            identifier = row[0]
            if identifier in self.ids:
                raise UserError(f"duplicate {self.noun} id '{identifier}'",
                                do="ids must be unique: mend the benchmark's file")
            self.ids.add(identifier)
            self.modalities[row.modality] += 1
            if row.image is not None and self.check_images:
                self._look_at(identifier, row.image)
            yield row

    def _look_at(self, identifier: str, reference: str) -> None:
        size = self.images.size(reference)
        self.pictures.update(f"{identifier} {size}\n".encode())
        if size is None:
            self.num_missing += 1
            self.missing.extend([f"{identifier}: {reference}"] if len(self.missing) < _NAMED else [])

    def facts(self) -> dict[str, Any]:
        return {"rows": len(self.ids), "modalities": dict(sorted(self.modalities.items())),
                "image_sizes": self.pictures.hexdigest(),
                "missing_images": {"count": self.num_missing, "first": self.missing, "checked": self.check_images}}


def _collect_pool(job: PoolJob, runtime: Runtime) -> tuple[int, dict[str, Any]]:
    adapter = load_adapter(job.benchmark.adapter)
    census = _Census("candidate", job.images, runtime.check_images)
    rows: Iterator[Candidate] = census.watch(adapter.candidates(job.benchmark, job.pool))
    shards = _write_shards(job.artifact, "candidates", rows, CANDIDATES)
    _check(census, f"pool {job.pool}", runtime)
    return len(census.ids), {**census.facts(), "shards": shards, "digest": _joined(shards)}


def _collect_task(job: TaskJob, runtime: Runtime) -> tuple[int, dict[str, Any]]:
    adapter = load_adapter(job.benchmark.adapter)
    census = _Census("query", job.images, runtime.check_images)
    rows: Iterator[Query] = census.watch(adapter.queries(job.benchmark, job.task))
    shards = _write_shards(job.artifact, "queries", rows, QUERIES)
    _check(census, f"task {job.task.name}", runtime)
    qrels = table_of(list(adapter.qrels(job.benchmark, job.task)), QRELS)
    if not len(qrels):
        raise UserError(f"task {job.task.name} has no qrels", do="nothing could be scored: check its qrels file")
    write_table(job.artifact.path("qrels.parquet"), qrels, job.artifact.fingerprint)
    return len(census.ids), {
        **census.facts(), "shards": shards, "digest": _joined(shards),
        "qrels_rows": len(qrels), "qrels_digest": digest(qrels),
        "candidate_modality": adapter.candidate_modality(job.benchmark, job.task)}


def _check(census: _Census, subject: str, runtime: Runtime) -> None:
    if not census.ids:
        raise UserError(f"{subject} is empty: its file has no rows", do="check benchmark.root and benchmark.split")
    _check_missing(subject, census.num_missing, census.missing, runtime)


def _check_missing(subject: str, count: int, named: Sequence[str], runtime: Runtime) -> None:
    if count > runtime.max_missing_images:
        listed = "\n".join(named[:5])
        raise UserError(f"{subject}: {count} images are missing, {runtime.max_missing_images} tolerated", do=(
            f"{listed}\nmend the files or benchmark.archives, or tolerate them: "
            f"collect.max_missing_images={count} embed.max_flawed={count}"))


def accept(job: Job, runtime: Runtime) -> None:
    """A finished table may have been made when more missing images were tolerated than now."""
    if isinstance(job, AuditJob):
        return
    missing = job.artifact.manifest()["missing_images"]
    if runtime.check_images and not missing["checked"]:
        raise UserError(f"{job.artifact.name} was collected without looking for its images", do=(
            f"to look for them now: rm -r {job.artifact.directory}\nor go on as before: collect.check_images=false"))
    if missing["count"] > runtime.max_missing_images:
        try:
            _check_missing(job.artifact.name, missing["count"], missing["first"], runtime)
        except UserError as error:
            raise UserError(error.what, do=f"{error.do}\nafter mending: rm -r {job.artifact.directory}") from None


def _write_shards(artifact: Artifact[Params], noun: str, rows: Iterator[Any],
                  schema: pa.Schema) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = []
    rows_per_shard = artifact.params.rows_per_shard
    while chunk := list(islice(rows, rows_per_shard)):
        table, file = table_of(chunk, schema), shard_file(noun, len(shards))
        write_table(artifact.path(file), table, artifact.fingerprint, compression="zstd")
        shards.append({"file": file, "rows": len(table), "digest": digest(table)})
    return shards


def _joined(shards: list[dict[str, Any]]) -> str:
    return sha256(" ".join(f"{shard['rows']}:{shard['digest']}" for shard in shards).encode()).hexdigest()


def _audit(job: AuditJob) -> tuple[int, dict[str, Any]]:
    pools = [pool.manifest() for pool in job.pools]
    qrels = read_table(job.task.path("qrels.parquet"), job.task.fingerprint)
    queries = [shard["file"] for shard in job.task.manifest()["shards"]]
    query_ids = _read_ids(job.task.directory, job.task.fingerprint, queries, "query_id")
    candidate_ids = _pool_ids(tuple((pool.directory, pool.fingerprint) for pool in job.pools), tuple(
        tuple(shard["file"] for shard in pool["shards"]) for pool in pools))
    params = job.artifact.params
    found = audit(query_ids, qrels, candidate_ids, params.metrics, params.depth)
    artifacts.write_json(job.artifact.path("audit.json"), found)
    return found["qrels"], found


def _read_ids(directory: Path, fingerprint: str, files: Sequence[str], column: str) -> pa.ChunkedArray:
    tables = [read_table(directory / file, fingerprint, [column]) for file in files]
    return pa.chunked_array([chunk for table in tables for chunk in table.column(column).chunks], pa.string())


@lru_cache(maxsize=1)
def _pool_ids(pools: tuple[tuple[Path, str], ...], files: tuple[tuple[str, ...], ...]) -> pa.ChunkedArray:
    members = [_read_ids(directory, fingerprint, names, "candidate_id")
               for (directory, fingerprint), names in zip(pools, files)]
    ids = pa.chunked_array([chunk for member in members for chunk in member.chunks], pa.string())
    refuse_duplicates(ids)
    return ids
