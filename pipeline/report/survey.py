"""What stands at every rank of a run: a relevant candidate, or an error, and of which type.

The types are those of UniIR's analysis, for every rank and not only the first: the candidate has another modality than
the task seeks; or it has the right one but comes from another pool than the task's own, another domain; or it is simply
the wrong item. A run is read shard by shard; of the pools, ids, modalities and memberships are held.

Shapes: Q queries, K ranks, T kinds, R first ranks, H hits, S queries with hits, F relevant hits, N candidates of the
pools, D distinct candidates of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import Artifact, shard_file
from pipeline.embeddings import read_table
from pipeline.metrics.identifiers import hashes
from pipeline.metrics.order import positions, strings
from pipeline.metrics.ranking import judge
from pipeline.plan import manifest_of
from pipeline.stages.score import Job, tables_of
from pipeline.support.errors import UserError
from pipeline.tables import MODALITIES

KINDS = ("relevant", "wrong modality", "wrong domain", "wrong item")
RELEVANT, WRONG_MODALITY, WRONG_DOMAIN, WRONG_ITEM = range(len(KINDS))
NOTHING = len(KINDS)  # at a rank that a short run does not have
FIRST_RANKS = 10


@dataclass(frozen=True)
class Survey:
    """A run seen through the qrels and the pools, query by query in the order of the task.

    first_Q       int32: rank of the first relevant candidate; 0 if the run has none.
    score_Q       float32: score at rank 1; -inf without hits.
    reachable_Q   bool: whether any relevant candidate is in the pools.
    kind_QR       uint8: what stands at the first ranks, a position in KINDS, or NOTHING.
    count_KT      int64: how many queries have which kind at each rank.
    """

    first_Q: np.ndarray
    score_Q: np.ndarray
    reachable_Q: np.ndarray
    kind_QR: np.ndarray
    count_KT: np.ndarray

    def __len__(self) -> int:
        return len(self.first_Q)

    def is_hit(self, k: int) -> np.ndarray:
        """bool [Q]: whether a relevant candidate stands among the first k."""
        return np.asarray((self.first_Q > 0) & (self.first_Q <= k))

    @cached_property
    def hit_K(self) -> np.ndarray:
        """float64 [K]: hit@1, hit@2, ... up to the depth of the run."""
        first = self.first_Q[self.first_Q > 0] - 1
        return np.cumsum(np.bincount(first, minlength=len(self.count_KT))) / max(len(self), 1)

    @cached_property
    def share_KT(self) -> np.ndarray:
        """float64: `count_KT` as shares of all queries; a row sums to less than 1 where runs are shorter."""
        return self.count_KT / max(len(self), 1)


class PoolIndex:
    """Modality and pool of every candidate of some pools, found by a hash of its id and confirmed by the id itself."""

    def __init__(self, pools: Sequence[Artifact]):
        tables = [tables_of(pool, ["candidate_id", "modality"]) for pool in pools]
        self.labels = [pool.label for pool in pools]
        self.ids = pa.chunked_array([chunk for table in tables for chunk in table["candidate_id"].chunks], pa.string())
        known = pa.array(MODALITIES)
        modality = [pc.index_in(table["modality"].cast(pa.string()), value_set=known).to_numpy() for table in tables]
        self.modality_N = np.concatenate(modality).astype(np.int8)
        self.pool_N = np.repeat(np.arange(len(pools), dtype=np.int16), [len(table) for table in tables])
        hash_N = np.concatenate([np.zeros(0, np.uint64), *map(hashes, self.ids.chunks)])
        self._order_N = np.argsort(hash_N)
        self._hash_N = hash_N[self._order_N]

    def places(self, ids: pa.Array) -> np.ndarray:
        """int64: the row of each id; -1 if it is in none of the pools."""
        if not len(self.ids) or not len(ids):
            return np.full(len(ids), -1)
        nearest = np.minimum(np.searchsorted(self._hash_N, hashes(ids)), len(self.ids) - 1)
        place = self._order_N[nearest]
        is_other = pc.not_equal(pa.chunked_array([ids]), self.ids.take(pa.array(place))).to_numpy(zero_copy_only=False)
        if is_other.any():  # absent, or behind another of the same hash
            others = ids.filter(pa.array(is_other))
            place[is_other] = pc.fill_null(pc.index_in(others, value_set=self.ids), -1).to_numpy()
        return np.asarray(place)

    def kinds(self, column: pa.ChunkedArray, sought: str | None, own: Sequence[str]) -> np.ndarray:
        """uint8 [H]: which error each candidate of a run would be if it is not relevant; `own`: labels of pools."""
        one = column.combine_chunks()
        encoded = one if isinstance(one, pa.DictionaryArray) else one.dictionary_encode()
        place_D = self.places(strings(encoded.dictionary))
        if (place_D < 0).any():
            lost = encoded.dictionary[int((place_D < 0).argmax())]
            raise UserError(f"candidate {lost} of a run is in none of its pools",
                            do="the pools were collected anew: run `retrieve` again")
        is_own = np.isin(self.labels, list(own))[self.pool_N[place_D]]
        kind_D = np.where(is_own, WRONG_ITEM, WRONG_DOMAIN).astype(np.uint8)
        if sought is not None:
            kind_D[self.modality_N[place_D] != MODALITIES.index(sought)] = WRONG_MODALITY
        return np.asarray(kind_D[encoded.indices.to_numpy()])


def survey(job: Job, own: Sequence[str], pools: PoolIndex, depth: int) -> Survey:
    """Look at every hit of a scored run. `own`: labels of the task's own pools; `depth`: of the run.

    UserError if the run names a candidate that is in none of the pools, or is not in order.
    """
    qrels = read_table(job.task.path("qrels.parquet"), job.task.fingerprint)
    relevant = qrels.filter(pc.greater(qrels["relevance"], 0))
    is_there = pools.places(strings(relevant["candidate_id"])) >= 0
    answerable = pc.unique(relevant["query_id"].filter(pa.array(is_there)))
    sought = manifest_of(job.task.directory)["candidate_modality"]
    parts = []
    for queries, run in _shards(job):
        kind_H = pools.kinds(run["candidate_id"], sought, own)
        reachable_Q = pc.is_in(queries, value_set=answerable).to_numpy(zero_copy_only=False)
        parts.append(_seen(run, qrels, queries, kind_H, reachable_Q, depth))
    by_query = {name: np.concatenate([getattr(part, name) for part in parts])
                for name in ("first_Q", "score_Q", "reachable_Q", "kind_QR")}
    return Survey(**by_query, count_KT=np.sum([part.count_KT for part in parts], axis=0))


def _shards(job: Job) -> Iterator[tuple[pa.Array, pa.Table]]:
    """Query ids of each shard of the task, and the shard of the run that answers them."""
    for number, shard in enumerate(manifest_of(job.task.directory)["shards"]):
        queries = read_table(job.task.path(shard["file"]), job.task.fingerprint, ["query_id"])["query_id"]
        run = read_table(job.run.path(shard_file("run", number)), job.run.fingerprint,
                         coded=["query_id", "candidate_id"])
        yield strings(queries), run


def _seen(run: pa.Table, qrels: pa.Table, queries: pa.Array, kind_H: np.ndarray, reachable_Q: np.ndarray,
          depth: int) -> Survey:
    found = judge(run, qrels, queries).found
    rank_H = run["rank"].to_numpy()
    start_S = np.flatnonzero(rank_H == 1)
    query_S = positions(run["query_id"].take(pa.array(start_S)), queries)
    start_Q = np.zeros(len(queries), np.int64)
    start_Q[query_S] = start_S
    kind_H[start_Q[found.query_F] + found.rank_F - 1] = RELEVANT
    first_Q = np.zeros(len(queries), np.int32)
    is_first_F = found.place_F == 0
    first_Q[found.query_F[is_first_F]] = found.rank_F[is_first_F]
    score_Q = np.full(len(queries), -np.inf, np.float32)
    score_Q[query_S] = run["score"].to_numpy()[start_S]
    kind_QR = np.full((len(queries), FIRST_RANKS), NOTHING, np.uint8)
    is_early_H = rank_H <= FIRST_RANKS
    query_H = np.repeat(query_S, np.diff(np.append(start_S, len(rank_H))))
    kind_QR[query_H[is_early_H], rank_H[is_early_H] - 1] = kind_H[is_early_H]
    cell_H = (rank_H.astype(np.int64) - 1) * len(KINDS) + kind_H
    count_KT = np.bincount(cell_H, minlength=depth * len(KINDS)).reshape(-1, len(KINDS))
    return Survey(first_Q, score_Q, reachable_Q, kind_QR, count_KT)
