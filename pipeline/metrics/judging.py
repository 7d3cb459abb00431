"""Joins a run with the qrels: how relevant is the candidate at each rank, and how relevant could it be?

Everything is array work: identifiers become integer codes, a (query, candidate) pair becomes one integer,
and pairs are looked up by binary search, a block of whole queries at a time, so that besides the result
little more than two integers per hit are held. In exchange a run must be in order (each query once, ranks
1, 2, 3, ...), which is checked; `order_run` brings a foreign run into that order.

Shapes: Q queries, K ranks (the depth of the run), R relevant candidates of the query that has most, N rows of
the qrels, J distinct judged pairs, H hits (rows of the run or of a block of it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.metrics.order import Order, checked_order, places, positions, starts, strings
from pipeline.support.errors import UserError

BLOCK_HITS = 1 << 15  # the hash table of a block's candidates fits in a processor's cache: twice as fast


@dataclass(frozen=True)
class Judged:
    """A run seen through the qrels; row i belongs to the i-th of the query ids it was judged for.

    gains_QK    int32: relevance of the candidate at each rank; 0 if not relevant, not judged or not there.
    relevant_Q  int32: how many candidates are relevant (relevance > 0), whether the run found them or not.
    ideal_QR    int32: the relevances of those candidates, highest first, padded with zeros.
    answered_Q  bool: whether the run has any hit for the query.
    """

    gains_QK: np.ndarray
    relevant_Q: np.ndarray
    ideal_QR: np.ndarray
    answered_Q: np.ndarray

    def __len__(self) -> int:
        return len(self.relevant_Q)

    @property
    def depth(self) -> int:
        """K, the depth of the run: the most hits that any query has."""
        return int(self.gains_QK.shape[1])

    @property
    def unjudged(self) -> int:
        """Number of queries without any relevant candidate: every metric is 0, and they stay in the mean."""
        return int((self.relevant_Q == 0).sum())

    @property
    def unanswered(self) -> int:
        """Number of queries for which the run has no hit: every metric is 0, and they stay in the mean."""
        return int((~self.answered_Q).sum())

    def block(self, first: int, last: int) -> Judged:
        """Queries `first` to `last` (exclusive), without copying."""
        rows = slice(first, last)
        return Judged(self.gains_QK[rows], self.relevant_Q[rows], self.ideal_QR[rows], self.answered_Q[rows])


class _Judgements(NamedTuple):
    """The distinct judged (query, candidate) pairs, in order of `pair_J`."""

    pair_J: np.ndarray       # int64: query * number of candidates + candidate
    query_J: np.ndarray      # position in the query ids
    relevance_J: np.ndarray  # int32, never negative
    row_J: np.ndarray        # the qrels row that each was taken from
    candidates: pa.Array     # the distinct candidate ids that codes in `pair_J` refer to


def judge(run: pa.Table, qrels: pa.Table, query_ids: pa.Array | pa.ChunkedArray) -> Judged:
    """Relevance of every hit of `run` (query_id, rank, candidate_id; in order, see `order_run`).

    Every one of `query_ids` gets a row: without hits it scores 0 (`Judged.unanswered`), without relevant
    candidates too (`Judged.unjudged`; M-BEIR does the same, where trec_eval leaves queries without qrels out
    of its mean). Qrels of other queries are not looked at. A negative relevance counts as 0; a pair that is
    judged twice keeps its higher relevance. UserError: a hit of an unknown query, a candidate twice under
    one query, a run out of order.
    """
    queries = _distinct_queries(query_ids)
    judgements = _judgements(qrels, queries)
    order = checked_order(run, queries)
    rank_H = run.column("rank").to_numpy()
    candidate_H = positions(run.column("candidate_id"), judgements.candidates)
    gains_QK = np.zeros((len(queries), rank_H.max(initial=0)), np.int32)
    for first, last in _blocks(order):
        query_H = order.query_H[first:last]
        hits = strings(run.column("candidate_id").slice(first, last - first))
        _refuse_duplicates(query_H, hits, queries)
        gains_QK[query_H, rank_H[first:last] - 1] = _gains(query_H, candidate_H[first:last], judgements)
    answered_Q = np.zeros(len(queries), bool)
    answered_Q[order.query_H[order.start_S]] = True
    ideal_QR = _descending(judgements.query_J, judgements.relevance_J, len(queries))
    return Judged(gains_QK, _count_positive(ideal_QR), ideal_QR, answered_Q)


def best_possible(qrels: pa.Table, reachable: np.ndarray, query_ids: pa.Array | pa.ChunkedArray,
                  depth: int | None = None) -> Judged:
    """What the best run over a pool would find: every reachable relevant candidate, the most relevant first.

    `reachable` is bool [N]: whether the candidate of that qrels row is in the pool. Relevant candidates
    outside the pool still count as relevant, so no metric of any run over the pool (and of that `depth`)
    exceeds this one.
    """
    assert reachable.dtype == bool and reachable.shape == (qrels.num_rows,), "one boolean per qrels row"
    queries = _distinct_queries(query_ids)
    judgements = _judgements(qrels, queries)
    ideal_QR = _descending(judgements.query_J, judgements.relevance_J, len(queries))
    found_J = judgements.relevance_J * reachable[judgements.row_J]
    gains_QK = _descending(judgements.query_J, found_J, len(queries))
    if depth is not None:
        missing = max(0, depth - gains_QK.shape[1])
        gains_QK = np.pad(gains_QK[:, :depth], ((0, 0), (0, missing)))
    return Judged(gains_QK, _count_positive(ideal_QR), ideal_QR, np.ones(len(queries), bool))


def _judgements(qrels: pa.Table, queries: pa.Array) -> _Judgements:
    query_N = positions(strings(qrels.column("query_id")), queries)
    candidate_N = strings(qrels.column("candidate_id")).dictionary_encode()
    relevance_N = np.maximum(qrels.column("relevance").to_numpy(), 0).astype(np.int32)
    pair_N = query_N.astype(np.int64) * len(candidate_N.dictionary) + candidate_N.indices.to_numpy()
    row_N = np.lexsort((-relevance_N, pair_N))  # the first row of each pair has its highest relevance
    row_N = row_N[query_N[row_N] >= 0]
    row_J = row_N[starts(pair_N[row_N])]
    return _Judgements(pair_N[row_J], query_N[row_J], relevance_N[row_J], row_J, candidate_N.dictionary)


def _blocks(order: Order) -> Iterator[tuple[int, int]]:
    """Ranges of about BLOCK_HITS hits that never part the hits of one query."""
    num_hits = len(order.query_H)
    query_S = np.searchsorted(order.start_S, np.arange(0, num_hits, BLOCK_HITS), side="right") - 1
    edges = np.unique(np.append(order.start_S[query_S], num_hits)).tolist()
    return zip(edges, edges[1:])


def _gains(query_H: np.ndarray, candidate_H: np.ndarray, judgements: _Judgements) -> np.ndarray:
    """int32 [H]: the relevance of each hit of a block; a candidate is -1 if it is not in the qrels at all."""
    gains_H = np.zeros(len(query_H), np.int32)
    if not len(judgements.pair_J):
        return gains_H
    known_H = np.flatnonzero(candidate_H >= 0)  # in a large pool these are few: search only for them
    pair_H = query_H[known_H].astype(np.int64) * len(judgements.candidates) + candidate_H[known_H]
    found_H = np.searchsorted(judgements.pair_J, pair_H)
    is_judged_H = judgements.pair_J.take(found_H, mode="clip") == pair_H
    gains_H[known_H[is_judged_H]] = judgements.relevance_J[found_H[is_judged_H]]
    return gains_H


def _refuse_duplicates(query_H: np.ndarray, hits: pa.Array, queries: pa.Array) -> None:
    encoded = hits.dictionary_encode()
    num_candidates = len(encoded.dictionary)
    pair_H = query_H.astype(np.int64) * num_candidates + encoded.indices.to_numpy()
    pair_H.sort()
    is_repeated_H = pair_H[1:] == pair_H[:-1]
    if is_repeated_H.any():
        query, candidate = divmod(int(pair_H[is_repeated_H.argmax()]), num_candidates)
        raise UserError(f"the run has candidate {encoded.dictionary[candidate]} more than once for one query",
                        f"query {queries[query]}", "a candidate has one rank per query: remove the others")


def _descending(query_J: np.ndarray, relevance_J: np.ndarray, num_queries: int) -> np.ndarray:
    """int32 [Q, R]: each query's positive relevances, highest first, padded with zeros."""
    order = np.lexsort((-relevance_J, query_J))
    order = order[relevance_J[order] > 0]
    query, relevance = query_J[order], relevance_J[order]
    place = places(starts(query), len(query))
    dense_QR = np.zeros((num_queries, place.max(initial=-1) + 1), np.int32)
    dense_QR[query, place] = relevance
    return dense_QR


def _count_positive(gains_QK: np.ndarray) -> np.ndarray:
    return np.asarray(np.count_nonzero(gains_QK, axis=1), np.int32)


def _distinct_queries(query_ids: pa.Array | pa.ChunkedArray) -> pa.Array:
    queries = strings(query_ids)
    repeated = np.flatnonzero(positions(queries, queries) != np.arange(len(queries)))
    if len(repeated):
        raise UserError(f"query {queries[int(repeated[0])]} appears more than once among the queries",
                        do="query ids must be unique within a task")
    return queries
