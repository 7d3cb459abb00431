"""retrieve: query embeddings and the indexes of a pool (or of a union's members) -> one run table per query shard.

Scores are cosines computed in float64 from the stored vectors; the order is score descending, then candidate_id
ascending. So a run does not depend on the order of a pool, on block sizes, on threads or on the device, and a union
gives what one concatenated pool would give. Query shards that search the same pool share one pass over it.

Shapes: Q queries, K candidates kept, N rows of the pool, D dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import artifacts, indexes
from pipeline.artifacts import Artifact, shard_file, shard_number
from pipeline.devices import resolve_device
from pipeline.embeddings import EmbeddingStore, Union, vectors_of, write_table
from pipeline.support.errors import UserError
from pipeline.support.progress import Landed
from pipeline.tables import RUN

VERSION = 1
RECALL = "recall.json"


@dataclass(frozen=True)
class Params(artifacts.Params):
    """`faiss_parameters` is FAISS's own string, such as nprobe=16; it and the sample for recall are for approximate
    indexes only."""

    depth: int
    faiss_parameters: str
    recall_queries: int

    def needed(self, is_exact: bool) -> Params:
        """Without what has no bearing on an exact search."""
        return replace(self, faiss_parameters="", recall_queries=0) if is_exact else self


@dataclass(frozen=True)
class Runtime(artifacts.Runtime):
    coarse: str
    kernel: str
    device: str
    queries_per_pass: int
    memory_gb: float


@dataclass(frozen=True)
class Member:
    """One pool of a search: its embeddings and its index; `faiss_file` is empty where the search is exact."""

    embeddings: Artifact
    index: Artifact
    faiss_file: str

    def as_input(self) -> tuple[str, str]:
        """What a run depends on: an approximate index, or only the vectors, of which an exact search is a function."""
        if self.faiss_file:
            return f"index {self.index.name}", self.index.fingerprint
        return f"pool {self.embeddings.name}", self.embeddings.fingerprint


@dataclass(frozen=True)
class Job:
    artifact: Artifact[Params]
    queries: Artifact
    num_shards: int
    members: tuple[Member, ...]

    @property
    def is_exact(self) -> bool:
        return not any(member.faiss_file for member in self.members)

    @property
    def pool_label(self) -> str:
        return " ".join(member.index.label for member in self.members)


def units(job: Job) -> list[str]:
    """A run shard per query shard; for approximate indexes also their measured recall."""
    return [shard_file("run", number) for number in range(job.num_shards)] + ([] if job.is_exact else [RECALL])


def make(work: Sequence[tuple[Job, str]], runtime: Runtime) -> Iterator[Landed]:
    by_pool = sorted(work, key=lambda pair: (pair[0].pool_label, pair[0].artifact.params.depth))
    for _, group in groupby(by_pool, key=lambda pair: (pair[0].pool_label, pair[0].artifact.params.depth)):
        pairs = list(group)
        search = Search(pairs[0][0], runtime)
        for job, unit in pairs:
            if unit == RECALL and not job.artifact.path(unit).exists():
                yield search.measure_recall(job)
        yield from _searched([pair for pair in pairs if pair[1] != RECALL], search, runtime)


def _searched(work: list[tuple[Job, str]], search: Search, runtime: Runtime) -> Iterator[Landed]:
    """Search in passes of a bounded number of queries; what a pass found is written before the next begins."""
    waiting: list[_Queries] = []
    for job, unit in work:
        if not job.artifact.path(unit).exists():
            waiting.append(_Queries.read(job, unit))
        if sum(len(queries.ids) for queries in waiting) >= runtime.queries_per_pass:
            yield from search.answer(waiting)
            waiting = []
    if waiting:
        yield from search.answer(waiting)


@dataclass(frozen=True)
class _Queries:
    """The queries of one unit."""

    job: Job
    unit: str
    ids: pa.ChunkedArray
    vectors_QD: np.ndarray

    @classmethod
    def read(cls, job: Job, unit: str) -> _Queries:
        table = EmbeddingStore.of(job.queries).shard(shard_number(unit))
        return cls(job, unit, table["id"], vectors_of(table))


class Search:
    """One pool, opened once for all that search it. Vectors and FAISS indexes are read again for every search; a
    subclass may hold them."""

    def __init__(self, job: Job, runtime: Runtime):
        self.params, self.runtime, self.is_exact = job.artifact.params, runtime, job.is_exact
        self.members = sorted(job.members, key=lambda member: member.embeddings.name)  # as Union orders them
        self.pool = Union.of([EmbeddingStore.of(member.embeddings) for member in self.members])
        self.statistics = indexes.Statistics.merged(
            [indexes.Statistics.load(member.index.path("statistics.npz")) for member in self.members])
        self.ids = self.pool.ids()
        self.id_order_N = indexes.id_order(self.ids)

    def hits(self, queries_QD: np.ndarray, depth: int) -> indexes.Hits:
        """The first `depth` of each query, exact or as the indexes find them."""
        return self._exact(queries_QD, depth) if self.is_exact else self._approximate(queries_QD, depth)

    def blocks(self) -> Iterable[tuple[int, np.ndarray]]:
        """The number of each block's first row and its vectors."""
        return ((block.first_row, block.vectors_ND) for block in self.pool.blocks())

    def faiss_index(self, number: int) -> Any:
        """The own index of a member."""
        return indexes.read_index(self.members[number].index.path(self.members[number].faiss_file))

    def answer(self, waiting: list[_Queries]) -> Iterator[Landed]:
        queries_QD = np.concatenate([queries.vectors_QD for queries in waiting])
        self._check_dimension(queries_QD, waiting[0])
        hits = self.hits(queries_QD, self.params.depth)
        first = 0
        for queries in waiting:
            last = first + len(queries.ids)
            table = self._run(queries.ids, hits.rows_QK[first:last], hits.scores_QK[first:last])
            artifact = queries.job.artifact
            write_table(artifact.path(queries.unit), table, artifact.fingerprint, compression="zstd")
            yield Landed(artifact.name, queries.unit, len(queries.ids))
            first = last

    def _check_dimension(self, queries_QD: np.ndarray, queries: _Queries) -> None:
        if queries_QD.shape[1] != self.pool.dimension:
            raise UserError(f"queries have dimension {queries_QD.shape[1]}, the pool has {self.pool.dimension}",
                            f"{queries.job.queries.label}, {self.pool.members[0].name}",
                            "they must come from one encoder")

    def _exact(self, queries_QD: np.ndarray, depth: int) -> indexes.Hits:
        return indexes.exact_search(
            queries_QD, self.blocks(), self.id_order_N, depth, self.statistics,
            device=resolve_device(self.runtime.device), coarse=self.runtime.coarse, kernel=self.runtime.kernel,
            memory_bytes=int(self.runtime.memory_gb * 2**30))

    def _approximate(self, queries_QD: np.ndarray, depth: int) -> indexes.Hits:
        """Each member's own index, one at a time in memory, merged."""
        found: list[tuple[indexes.Hits, int]] = []
        first_row = 0
        for number, member in enumerate(self.pool.members):
            order_N = self.id_order_N[first_row:first_row + member.rows]
            hits = indexes.search_index(self.faiss_index(number), queries_QD, depth, order_N,
                                        self.params.faiss_parameters)
            found.append((hits, first_row))
            first_row += member.rows
        return indexes.merge_hits(found, self.id_order_N, depth)

    def measure_recall(self, job: Job) -> Landed:
        """Share of the exact top-k that the index finds, on queries spread evenly over the task."""
        store = EmbeddingStore.of(job.queries)
        queries_QD = np.concatenate([block.vectors_ND for block in store.blocks()])
        count = min(len(queries_QD), job.artifact.params.recall_queries)
        sample = np.unique(np.linspace(0, len(queries_QD) - 1, count).astype(int))
        depth = self.params.depth
        exact, found = self._exact(queries_QD[sample], depth), self._approximate(queries_QD[sample], depth)
        cutoffs = sorted({min(10, depth), depth})
        recall = {f"recall@{cutoff}": indexes.recall_against_exact(found, exact, cutoff) for cutoff in cutoffs}
        artifacts.write_json(job.artifact.path(RECALL), {"queries": len(sample), **recall})
        return Landed(job.artifact.name, RECALL, len(sample))

    def _run(self, query_ids: pa.ChunkedArray, rows_QK: np.ndarray, scores_QK: np.ndarray) -> pa.Table:
        found_QK = rows_QK >= 0
        ranks_QK = np.broadcast_to(np.arange(1, rows_QK.shape[1] + 1, dtype=np.int32), rows_QK.shape)
        repeated = np.repeat(np.arange(len(rows_QK)), found_QK.sum(axis=1))
        return pa.Table.from_arrays([
            query_ids.take(pa.array(repeated)), pa.array(ranks_QK[found_QK]),
            self.ids.take(pa.array(rows_QK[found_QK])), pa.array(scores_QK[found_QK])], schema=RUN)


def facts(job: Job, runtime: Runtime) -> dict[str, Any]:
    recall = {} if job.is_exact else json.loads(job.artifact.path(RECALL).read_text())
    return {"exact": job.is_exact, "recall_against_exact": recall, "shards": job.num_shards}
