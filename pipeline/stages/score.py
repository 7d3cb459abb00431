"""score: a run and the qrels -> values per query, their means with intervals, and what went wrong at rank 1.

Scoring never looks at an embedding, so it can be repeated at will, and it is always over all queries of the task.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import artifacts
from pipeline.artifacts import Artifact
from pipeline.embeddings import read_table, write_table
from pipeline.metrics.ranking import Metric, evaluate, judge
from pipeline.significance import bootstrap_interval
from pipeline.support.errors import UserError
from pipeline.support.progress import Landed
from pipeline.tables import per_query_schema

VERSION = 1
SCORES = "scores.json"
PER_QUERY = "per_query.parquet"


@dataclass(frozen=True)
class Params(artifacts.Params):
    metrics: tuple[str, ...]
    headline: str
    confidence: float
    resamples: int
    seed: int


@dataclass(frozen=True)
class Runtime(artifacts.Runtime):
    pass


@dataclass(frozen=True)
class Job:
    artifact: Artifact[Params]
    run: Artifact
    task: Artifact
    pools: tuple[Artifact, ...]
    audit: Artifact


def units(job: Job) -> list[str]:
    return [SCORES]


def make(work: Sequence[tuple[Job, str]], runtime: Runtime) -> Iterator[Landed]:
    for job, unit in work:
        if job.artifact.path(unit).exists():
            continue
        query_ids = tables_of(job.task, ["query_id"])["query_id"]
        scores, per_query = _score(job, query_ids)
        write_table(job.artifact.path(PER_QUERY), per_query, job.artifact.fingerprint, compression="zstd")
        artifacts.write_json(job.artifact.path(unit), scores)
        yield Landed(job.artifact.name, unit, len(query_ids))


def facts(job: Job, runtime: Runtime) -> dict[str, Any]:
    return {"scores": json.loads(job.artifact.path(SCORES).read_text())}


def tables_of(artifact: Artifact, columns: Sequence[str] | None = None) -> pa.Table:
    """All shards of a collected table, all or some of its columns."""
    files = [shard["file"] for shard in artifact.manifest()["shards"]]
    return pa.concat_tables([read_table(artifact.path(file), artifact.fingerprint, columns) for file in files])


def run_table(artifact: Artifact) -> pa.Table:
    """All shards of a run."""
    files = [entry["file"] for entry in artifact.manifest()["files"] if entry["file"].startswith("run-")]
    return pa.concat_tables([read_table(artifact.path(file), artifact.fingerprint) for file in files])


def _score(job: Job, query_ids: pa.ChunkedArray) -> tuple[dict[str, Any], pa.Table]:
    run = run_table(job.run)
    qrels = read_table(job.task.path("qrels.parquet"), job.task.fingerprint)
    qrels = qrels.filter(pc.is_in(qrels["query_id"], value_set=query_ids))  # the audit has counted the others
    judged = judge(run, qrels, query_ids)
    values = evaluate(judged, [Metric.parse(name) for name in job.artifact.params.metrics])
    scores = {"queries": len(query_ids), "headline": str(Metric.parse(job.artifact.params.headline)),
              "metrics": _means(values, job.artifact.params), "queries_without_relevant": judged.unjudged,
              "queries_without_hits": judged.unanswered, "wrong_modality_at_1": _wrong_modality(job, run)}
    columns = [pa.array(values[name].astype(np.float32)) for name in values]
    return scores, pa.Table.from_arrays([query_ids.combine_chunks(), *columns], schema=per_query_schema(values))


def _means(values: dict[str, np.ndarray], params: Params) -> dict[str, dict[str, float]]:
    values_QM = np.stack(list(values.values()), axis=1)
    low_M, high_M = bootstrap_interval(values_QM, params.confidence, params.resamples, params.seed)
    return {name: {"mean": float(np.mean(values[name])), "low": float(low), "high": float(high)}
            for name, low, high in zip(values, low_M, high_M)}


def _wrong_modality(job: Job, run: pa.Table) -> float | None:
    """Share of the rank-1 candidates whose modality is not the one the task seeks; None if any will do."""
    sought = job.task.manifest()["candidate_modality"]
    first = run.filter(pc.equal(run["rank"], 1))["candidate_id"]
    if sought is None or not len(first):
        return None
    pools = pa.concat_tables([tables_of(pool, ["candidate_id", "modality"]) for pool in job.pools]).unify_dictionaries()
    rows = pc.index_in(first, value_set=pools["candidate_id"])
    if rows.null_count:
        raise UserError(f"{rows.null_count} retrieved candidates are in none of the pools of this run", job.run.label,
                        "the pools were collected anew: run `retrieve` again")
    wrong = pc.not_equal(pools["modality"].take(rows).cast(pa.string()), sought)
    return float(np.mean(wrong.to_numpy(zero_copy_only=False)))
