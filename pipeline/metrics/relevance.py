"""The relevant candidates of every query, from the qrels: what a run is searched for.

Qrels may come in any order, judge a pair twice and speak of queries that nobody asks about.

Shapes: Q queries, S some of them, N rows of the qrels, J relevant candidates of all queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from pipeline.metrics import native
from pipeline.metrics.identifiers import hashes
from pipeline.metrics.judged import Ranked
from pipeline.metrics.matching import Part, twins
from pipeline.metrics.order import places, positions, starts, strings


@dataclass(frozen=True)
class Relevant:
    """Distinct (query, candidate) pairs of positive relevance, query by query, the most relevant first."""

    queries: pa.Array        # strings, all that are asked about
    query_J: np.ndarray      # int64: position among the queries, ascending
    candidate_J: pa.Array    # strings
    relevance_J: np.ndarray  # int32, positive
    row_J: np.ndarray        # the qrels row that each was taken from
    start_Q: np.ndarray      # where each query begins
    count_Q: np.ndarray

    @cached_property
    def hash_J(self) -> np.ndarray:
        """Of the candidates."""
        return hashes(self.candidate_J)

    def of_queries(self, query_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions, one query after the other; how many each query has)."""
        count_S = self.count_Q[query_S]
        first_S = np.cumsum(count_S) - count_S
        return np.arange(count_S.sum()) + np.repeat(self.start_Q[query_S] - first_S, count_S), count_S

    def ranked(self, is_there_J: np.ndarray | None = None) -> Ranked:
        """All, or those that are there, at ranks 1, 2, 3, ... of each query."""
        kept = slice(None) if is_there_J is None else is_there_J
        query_F = self.query_J[kept]
        return Ranked(len(self.queries), query_F, places(starts(query_F), len(query_F)) + 1, self.relevance_J[kept])


def relevant_of(qrels: pa.Table, queries: pa.Array) -> Relevant:
    """What `qrels` call relevant for `queries`; of a pair that is judged twice the higher relevance counts."""
    relevance_N, query_N = qrels.column("relevance").to_numpy(), positions(qrels.column("query_id"), queries)
    candidate_N = strings(qrels.column("candidate_id"))
    row_J = _most_relevant_first(np.flatnonzero((relevance_N > 0) & (query_N >= 0)), query_N, relevance_N)
    candidate_J = candidate_N.take(pa.array(row_J))
    count_Q = np.bincount(query_N[row_J], minlength=len(queries))
    if _has_twins(candidate_J, count_Q):  # a pair that is judged twice, or an accident of hashing
        kept_J = _first_of_each_pair(query_N[row_J], candidate_J)
        row_J, candidate_J = row_J[kept_J], candidate_J.take(pa.array(kept_J))
        count_Q = np.bincount(query_N[row_J], minlength=len(queries))
    return Relevant(queries, query_N[row_J].astype(np.int64), candidate_J, relevance_N[row_J].astype(np.int32), row_J,
                    np.cumsum(count_Q) - count_Q, count_Q)


def _has_twins(candidate_J: pa.Array, count_Q: np.ndarray) -> bool:
    library = native.load_for(len(candidate_J))
    if library is not None:
        return native.has_twins(library, candidate_J, count_Q)
    return len(twins([Part(hashes(candidate_J), count_Q)])[0]) > 0


def _most_relevant_first(row_J: np.ndarray, query_N: np.ndarray, relevance_N: np.ndarray) -> np.ndarray:
    """Rows in order of query, then relevance; most qrels are in that order already."""
    query_J, relevance_J = query_N[row_J], relevance_N[row_J]
    step_J = np.diff(query_J)
    if (step_J >= 0).all() and not ((step_J == 0) & (np.diff(relevance_J) > 0)).any():
        return row_J
    key_J = (query_J.astype(np.int64) << 32) - relevance_J  # one key sorts four times as fast as two
    return row_J[np.argsort(key_J, kind="stable")]


def _first_of_each_pair(query_J: np.ndarray, candidate_J: pa.Array) -> np.ndarray:
    encoded = candidate_J.dictionary_encode()
    pair_J = query_J * np.int64(len(encoded.dictionary)) + encoded.indices.to_numpy()
    return np.sort(np.unique(pair_J, return_index=True)[1])
