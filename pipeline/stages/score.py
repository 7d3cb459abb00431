"""score: a run and the qrels -> values per query, their means with intervals, and what went wrong at rank 1.

Scoring never looks at an embedding, so it can be repeated at will, and it is always over all queries of the task. A
run is read shard by shard; of a pool, ids and modalities are held while the jobs that search it are scored.

Shapes: N candidates of the pools, D distinct candidates at rank 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import artifacts
from pipeline.artifacts import Artifact
from pipeline.embeddings import read_table, write_table
from pipeline.metrics.order import strings
from pipeline.metrics.ranking import Metric, evaluate, judge
from pipeline.significance import bootstrap_interval
from pipeline.support.ahead import made_ahead
from pipeline.support.errors import UserError
from pipeline.support.progress import Landed
from pipeline.tables import per_query_schema

VERSION = 2
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
    for _, group in groupby(sorted(work, key=_pools_of), key=_pools_of):
        pairs = list(group)
        pools = _Pools(pairs[0][0].pools)
        for job, unit in pairs:
            if not job.artifact.path(unit).exists():
                query_ids = tables_of(job.task, ["query_id"])["query_id"]
                scores, per_query = _score(job, query_ids, pools)
                write_table(job.artifact.path(PER_QUERY), per_query, job.artifact.fingerprint, compression="zstd")
                artifacts.write_json(job.artifact.path(unit), scores)
                yield Landed(job.artifact.name, unit, len(query_ids))


def _pools_of(pair: tuple[Job, str]) -> str:
    return " ".join(pool.label for pool in pair[0].pools)


def facts(job: Job, runtime: Runtime) -> dict[str, Any]:
    return {"scores": json.loads(job.artifact.path(SCORES).read_text())}


def tables_of(artifact: Artifact, columns: Sequence[str] | None = None) -> pa.Table:
    """All shards of a collected table, all or some of its columns."""
    files = [shard["file"] for shard in artifact.manifest()["shards"]]
    return pa.concat_tables([read_table(artifact.path(file), artifact.fingerprint, columns) for file in files])


def run_tables(artifact: Artifact, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The shards of a run one after the other, read ahead; each holds whole queries. Ids may come as dictionaries."""
    files = [entry["file"] for entry in artifact.manifest()["files"] if entry["file"].startswith("run-")]
    yield from made_ahead(partial(read_table, artifact.path(file), artifact.fingerprint, columns,
                                  coded=["query_id", "candidate_id"]) for file in files)


def _score(job: Job, query_ids: pa.ChunkedArray, pools: _Pools) -> tuple[dict[str, Any], pa.Table]:
    run = run_tables(job.run, ["query_id", "rank", "candidate_id"])
    qrels = read_table(job.task.path("qrels.parquet"), job.task.fingerprint)
    first: list[pa.Array] = []
    judged = judge(_noting_first(run, first), qrels, query_ids)
    values = evaluate(judged, [Metric.parse(name) for name in job.artifact.params.metrics])
    scores = {"queries": len(query_ids), "headline": str(Metric.parse(job.artifact.params.headline)),
              "metrics": _means(values, job.artifact.params), "queries_without_relevant": judged.unjudged,
              "queries_without_hits": judged.unanswered, "wrong_modality_at_1": _wrong_modality(job, first, pools)}
    columns = [pa.array(values[name].astype(np.float32)) for name in values]
    return scores, pa.Table.from_arrays([query_ids.combine_chunks(), *columns], schema=per_query_schema(values))


def _noting_first(run: Iterable[pa.Table], first: list[pa.Array]) -> Iterator[pa.Table]:
    """The tables as they come; the candidates at rank 1 are appended to `first`."""
    for table in run:
        first.append(strings(table["candidate_id"].filter(pc.equal(table["rank"], 1))))
        yield table


def _means(values: dict[str, np.ndarray], params: Params) -> dict[str, dict[str, float]]:
    values_QM = np.stack(list(values.values()), axis=1)
    low_M, high_M = bootstrap_interval(values_QM, params.confidence, params.resamples, params.seed)
    return {name: {"mean": float(np.mean(values[name])), "low": float(low), "high": float(high)}
            for name, low, high in zip(values, low_M, high_M)}


def _wrong_modality(job: Job, first: Sequence[pa.Array], pools: _Pools) -> float | None:
    """Share of the rank-1 candidates whose modality is not the one the task seeks; None if any will do."""
    sought = job.task.manifest()["candidate_modality"]
    encoded = pa.chunked_array(first, pa.string()).combine_chunks().dictionary_encode()
    if sought is None or not len(encoded):
        return None
    is_known_D, is_wrong_D = pools.modality_differs(encoded.dictionary, sought)
    distinct = encoded.indices.to_numpy()
    if not is_known_D.all():
        raise UserError(f"{(~is_known_D)[distinct].sum()} retrieved candidates are in none of the pools of this run",
                        job.run.label, "the pools were collected anew: run `retrieve` again")
    return float(np.mean(is_wrong_D[distinct]))


class _Pools:
    """Ids and modalities of all candidates of some pools, read when they are first asked for."""

    def __init__(self, pools: Sequence[Artifact]):
        self.pools = pools

    @cached_property
    def candidates(self) -> pa.Table:
        return pa.concat_tables(tables_of(pool, ["candidate_id", "modality"]) for pool in self.pools)

    def modality_differs(self, candidate_D: pa.Array, sought: str) -> tuple[np.ndarray, np.ndarray]:
        """(whether each candidate is in the pools, whether its modality is another than `sought`), bool [D] both.

        The pools are looked up among the candidates, of which there are fewer, and not the other way round.
        """
        place_N = pc.index_in(self.candidates["candidate_id"], value_set=candidate_D)
        is_asked_N = pc.is_valid(place_N)
        modality = self.candidates["modality"].filter(is_asked_N).cast(pa.string())
        place = place_N.filter(is_asked_N).to_numpy()
        is_known_D, is_wrong_D = np.zeros((2, len(candidate_D)), bool)
        is_known_D[place] = True
        is_wrong_D[place] = pc.not_equal(modality, sought).to_numpy()
        return is_known_D, is_wrong_D
