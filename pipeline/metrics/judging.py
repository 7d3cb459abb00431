"""Joins a run with the qrels: which hits are relevant, and how much?

Every hit is looked at once (hits.py); blocks of whole queries are searched by as many threads as there are processors,
so that only a few blocks are held besides the run, whose tables may come one at a time. In exchange a run must be in
order (each query once, ranks 1, 2, 3, ...), which is checked; `order_run` brings a foreign run into that order.

Shapes: Q queries, N rows of the qrels, J relevant candidates of all queries, H hits (rows of a table of the run),
S queries with hits, F relevant hits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import starmap
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.metrics.hits import Hits
from pipeline.metrics.identifiers import hashes
from pipeline.metrics.judged import Judged, Ranked
from pipeline.metrics.order import positions, refuse_disorder, strings
from pipeline.metrics.relevance import Relevant, relevant_of
from pipeline.support.ahead import made_ahead
from pipeline.support.errors import UserError

BLOCK_HITS = 1 << 17  # smaller ones spend their time on calls, larger ones outside of the processor's caches

Result = TypeVar("Result")


class _Found(NamedTuple):
    """What one table of a run holds: its queries, its depth, the relevant hits and which candidate each of them is."""

    query_S: np.ndarray
    depth: int
    rank_F: np.ndarray
    relevant_F: np.ndarray


def judge(run: pa.Table | Iterable[pa.Table], qrels: pa.Table, query_ids: pa.Array | pa.ChunkedArray) -> Judged:
    """Relevance of every hit of `run` (query_id, rank, candidate_id; in order, see `order_run`).

    The run may be one table, or several that hold whole queries each and are read one after the other. Every one of
    `query_ids` gets a row: without hits it scores 0 (`Judged.unanswered`), without relevant candidates too
    (`Judged.unjudged`; M-BEIR does the same, where trec_eval leaves queries without qrels out of its mean). Qrels of
    other queries are not looked at. A negative relevance counts as 0; a pair that is judged twice keeps its higher
    relevance. UserError: a hit of an unknown query, a candidate twice under one query, a run out of order.
    """
    relevant = relevant_of(qrels, _distinct_queries(query_ids))
    tables = [run] if isinstance(run, pa.Table) else run
    founds = [_search(table, relevant) for table in tables]
    query_S, rank_F, relevant_F = (
        np.concatenate([np.zeros(0, np.int32), *(getattr(found, name) for found in founds)])
        for name in ("query_S", "rank_F", "relevant_F"))
    _refuse_parted(query_S, relevant.queries)
    query_F = relevant.query_J[relevant_F]
    if (np.diff(query_F) < 0).any():
        order_F = np.argsort(query_F, kind="stable")
        query_F, rank_F, relevant_F = query_F[order_F], rank_F[order_F], relevant_F[order_F]
    answered_Q = np.zeros(len(relevant.queries), bool)
    answered_Q[query_S] = True
    found = Ranked(len(relevant.queries), query_F, rank_F, relevant.relevance_J[relevant_F])
    return Judged(found, relevant.ranked(), answered_Q, max((found.depth for found in founds), default=0))


def best_possible(qrels: pa.Table, reachable: np.ndarray, query_ids: pa.Array | pa.ChunkedArray,
                  depth: int | None = None) -> Judged:
    """What the best run over a pool would find: every reachable relevant candidate, the most relevant first.

    `reachable` is bool [N]: whether the candidate of that qrels row is in the pool. Relevant candidates
    outside the pool still count as relevant, so no metric of any run over the pool (and of that `depth`)
    exceeds this one.
    """
    assert reachable.dtype == bool and reachable.shape == (qrels.num_rows,), "one boolean per qrels row"
    relevant = relevant_of(qrels, _distinct_queries(query_ids))
    found = relevant.ranked(reachable[relevant.row_J])
    depth = int(found.rank_F.max(initial=0)) if depth is None else depth
    return Judged(found.upto(depth), relevant.ranked(), np.ones(len(relevant.queries), bool), depth)


def _search(run: pa.Table, relevant: Relevant) -> _Found:
    """Relevant hits of a table that holds whole queries; UserError if it is out of order."""
    rank_H = run.column("rank").to_numpy()
    start_S = np.flatnonzero(rank_H == 1)
    edge_S = np.append(start_S, len(rank_H))
    query_S = positions(run.column("query_id").take(pa.array(start_S)), relevant.queries)
    if edge_S[0] != 0 or (query_S < 0).any() or np.bincount(query_S).max(initial=0) > 1:
        refuse_disorder(run, relevant.queries)

    hits = Hits(run, rank_H, edge_S, query_S, relevant)
    blocks = in_threads(hits.matches, _blocks(start_S, len(rank_H)))
    hit_F, relevant_F = (np.concatenate([np.zeros(0, np.int64), *(block[side] for block in blocks)]) for side in (0, 1))
    return _Found(query_S, int(np.diff(edge_S).max(initial=0)), rank_H[hit_F].astype(np.int32), relevant_F)


def _blocks(start_S: np.ndarray, num_hits: int) -> list[tuple[int, int]]:
    """Ranges of queries with about BLOCK_HITS hits each."""
    first_S = np.searchsorted(start_S, np.arange(0, num_hits, BLOCK_HITS), side="right") - 1
    edges = np.unique(np.append(first_S, len(start_S))).tolist()
    return list(zip(edges, edges[1:]))


def in_threads(work: Callable[[int, int], Result], ranges: Sequence[tuple[int, int]]) -> list[Result]:
    """NumPy, Arrow and native code let other threads run while they work on arrays as long as these."""
    if len(ranges) < 2:
        return list(starmap(work, ranges))
    return list(made_ahead((partial(work, *each) for each in ranges), most=pa.cpu_count()))


def _refuse_parted(query_S: np.ndarray, queries: pa.Array) -> None:
    """Each table was in order; a query with hits in two of them is not."""
    is_parted_Q = np.bincount(query_S, minlength=len(queries)) > 1
    if is_parted_Q.any():
        raise UserError("the run is not in order: each query's hits must stand together, ranked 1, 2, 3, ...",
                        f"query {queries[int(is_parted_Q.argmax())]}", "order it by score first")


def _distinct_queries(query_ids: pa.Array | pa.ChunkedArray) -> pa.Array:
    queries = strings(query_ids)
    hash_Q = np.sort(hashes(queries))
    if (hash_Q[1:] == hash_Q[:-1]).any():  # as those of equal ids are
        repeated = np.flatnonzero(pc.index_in(queries, value_set=queries).to_numpy() != np.arange(len(queries)))
        if len(repeated):
            raise UserError(f"query {queries[int(repeated[0])]} appears more than once among the queries",
                            do="query ids must be unique within a task")
    return queries
