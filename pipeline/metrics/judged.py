"""A run seen through the qrels: at which ranks relevant candidates stand, and where they would stand at best.

Of a run only the relevant hits matter to a metric, and they are few: so nothing here is as large as a run, and every
metric is a sum over the relevant hits within its cut.

Shapes: Q queries, K ranks (the depth of the run), R relevant candidates of the query that has most, F relevant
candidates that stand at some rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.metrics.order import places, starts


@dataclass(frozen=True)
class Ranked:
    """Relevant candidates at the ranks where they stand, in order of query and rank.

    query_F      int64: position of the query.
    rank_F       int32, from 1.
    relevance_F  int32, positive.
    """

    num_queries: int
    query_F: np.ndarray
    rank_F: np.ndarray
    relevance_F: np.ndarray

    @cached_property
    def place_F(self) -> np.ndarray:
        """int32: how many relevant candidates of the same query stand before each."""
        return places(starts(self.query_F), len(self.query_F))

    @cached_property
    def discounted_F(self) -> np.ndarray:
        """float64: relevance / log2(rank + 1), of which discounted cumulative gains are sums."""
        return self.relevance_F / np.log2(self.rank_F + 1)

    @cached_property
    def precision_F(self) -> np.ndarray:
        """float64: the share of relevant ones among the candidates up to this one."""
        return (self.place_F + 1) / self.rank_F

    def sum(self, value_F: np.ndarray, k: int | None) -> np.ndarray:
        """float64 [Q]: the sum of the values at ranks <= k, added in order of rank, as trec_eval does."""
        within_F = value_F if k is None else value_F * (self.rank_F <= k)
        return np.bincount(self.query_F, within_F, minlength=self.num_queries)

    def count(self, k: int | None) -> np.ndarray:
        """float64 [Q], not to be written to: how many stand at ranks <= k. Added up once for all metrics of one cut."""
        if k not in self._counts:
            self._counts[k] = self.sum(np.ones(len(self.rank_F)), k)
            self._counts[k].setflags(write=False)
        return self._counts[k]

    @cached_property
    def _counts(self) -> dict[int | None, np.ndarray]:
        return {}

    def dense(self, depth: int) -> np.ndarray:
        """int32 [Q, depth]: the relevance at each rank, 0 where no relevant candidate stands."""
        dense_QK = np.zeros((self.num_queries, depth), np.int32)
        dense_QK[self.query_F, self.rank_F - 1] = self.relevance_F
        return dense_QK

    def upto(self, depth: int) -> Ranked:
        is_there_F = self.rank_F <= depth
        return Ranked(self.num_queries, self.query_F[is_there_F], self.rank_F[is_there_F],
                      self.relevance_F[is_there_F])

    def block(self, first: int, last: int) -> Ranked:
        rows = slice(*np.searchsorted(self.query_F, (first, last)))
        return Ranked(last - first, self.query_F[rows] - first, self.rank_F[rows], self.relevance_F[rows])


@dataclass(frozen=True)
class Judged:
    """Query i is the i-th of the query ids that the run was judged for.

    found       the relevant candidates that the run found, at their ranks in it.
    ideal       all relevant candidates (relevance > 0), found or not, the most relevant first.
    answered_Q  bool: whether the run has any hit for the query.
    depth       K, the most hits that any query has.
    """

    found: Ranked
    ideal: Ranked
    answered_Q: np.ndarray
    depth: int

    def __len__(self) -> int:
        return len(self.answered_Q)

    @cached_property
    def relevant_Q(self) -> np.ndarray:
        """int32: how many candidates are relevant."""
        return np.bincount(self.ideal.query_F, minlength=len(self)).astype(np.int32)

    @property
    def gains_QK(self) -> np.ndarray:
        """int32 [Q, K]: the relevance of the candidate at each rank; 0 if not relevant, not judged or not there."""
        return self.found.dense(self.depth)

    @property
    def ideal_QR(self) -> np.ndarray:
        """int32 [Q, R]: the relevances of the relevant candidates, highest first, padded with zeros."""
        return self.ideal.dense(int(self.ideal.rank_F.max(initial=0)))

    @property
    def unjudged(self) -> int:
        """Number of queries without any relevant candidate: every metric is 0, and they stay in the mean."""
        return int((self.relevant_Q == 0).sum())

    @property
    def unanswered(self) -> int:
        """Number of queries for which the run has no hit: every metric is 0, and they stay in the mean."""
        return int((~self.answered_Q).sum())

    def block(self, first: int, last: int) -> Judged:
        """Queries `first` to `last` (exclusive) of the same run."""
        last = min(last, len(self))
        return Judged(self.found.block(first, last), self.ideal.block(first, last), self.answered_Q[first:last],
                      self.depth)
