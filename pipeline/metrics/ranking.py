"""Ranking metrics: one value per query, from the relevance found at each rank.

Each public function of (judged, k) is a metric; its name is the metric's name in configurations, tables and
files, and a new one needs nothing but to be written here. Definitions are those of trec_eval, sums are added in
its order, and a value is exact to the last few digits of float64. A query without relevant candidates or without
hits scores 0 and stays in the mean.

Shapes: Q queries, F relevant candidates at their ranks (in the run, or at best). k cuts the run; None is its whole
depth.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.metrics.judged import Judged
from pipeline.metrics.judging import best_possible, in_threads, judge
from pipeline.metrics.order import order_run
from pipeline.support.errors import UserError, nearest

__all__ = ["Judged", "Metric", "best_possible", "evaluate", "judge", "known_metrics", "order_run",
           "hit", "recall", "precision", "mrr", "map", "ndcg"]

BLOCK_QUERIES = 1 << 15
_ALIASES = {"success": "hit", "r": "recall", "p": "precision", "rr": "mrr", "recip_rank": "mrr", "ap": "map"}
_SPELLING = re.compile(r"([a-z_]+)(?:@([1-9][0-9]{0,8}))?", re.IGNORECASE)


def hit(judged: Judged, k: int | None = None) -> np.ndarray:
    """1 if any of the first k candidates is relevant, else 0.

    Also called success (trec_eval: success_k); UniIR and M-BEIR print this as "Recall@k".
    """
    return np.asarray(judged.found.count(k) > 0, np.float64)


def recall(judged: Judged, k: int | None = None) -> np.ndarray:
    """Relevant candidates among the first k, over all relevant candidates. trec_eval: recall_k.

    Not what M-BEIR calls "Recall@k", which is `hit`; the two agree where a query has one relevant candidate.
    """
    return _ratio(judged.found.count(k), judged.relevant_Q)


def precision(judged: Judged, k: int | None = None) -> np.ndarray:
    """Relevant candidates among the first k, over k, even where fewer were retrieved. trec_eval: P_k."""
    return judged.found.count(k) / max(judged.depth if k is None else k, 1)


def mrr(judged: Judged, k: int | None = None) -> np.ndarray:
    """1 / rank of the first relevant candidate, 0 if the first k hold none.

    Reciprocal rank, trec_eval: recip_rank (which has no cut); its mean over queries is the mean reciprocal
    rank.
    """
    return judged.found.sum((judged.found.place_F == 0) / judged.found.rank_F, k)


def map(judged: Judged, k: int | None = None) -> np.ndarray:
    """Sum of precision@rank over the ranks <= k of relevant candidates, over the number of all relevant ones.

    Average precision, trec_eval: map and map_cut_k; its mean over queries is the mean average precision.
    Libraries that divide by min(k, relevant) or by the relevant candidates that were found give higher
    values.
    """
    return _ratio(judged.found.sum(judged.found.precision_F, k), judged.relevant_Q)


def ndcg(judged: Judged, k: int | None = None) -> np.ndarray:
    """DCG of the first k over DCG of the k most relevant ones; DCG = sum of relevance / log2(rank + 1).

    The linear gain of Jarvelin and Kekalainen (2002) with the discount from rank 1 on; trec_eval:
    ndcg_cut_k, and ndcg without k, whose ideal counts all relevant candidates, also those beyond the run's
    depth. With a gain of 2^relevance - 1, as some libraries have it, graded judgements give other values.
    """
    return _ratio(judged.found.sum(judged.found.discounted_F, k), judged.ideal.sum(judged.ideal.discounted_F, k))


@dataclass(frozen=True)
class Metric:
    """A metric and where it cuts the run, written `hit@5`, or `map` for the run's whole depth."""

    name: str
    k: int | None = None

    @classmethod
    @lru_cache(maxsize=1024)  # a plan reads the same few names hundreds of times
    def parse(cls, text: str) -> Metric:
        """Reads `hit@5`, in any case and under any alias (`success@5`, `nDCG@10`); UserError if unknown."""
        spelling = _SPELLING.fullmatch(text.strip())
        if not spelling:
            raise UserError(f"'{text}' is not a metric", do="write name or name@k, k from 1 on, as in hit@5")
        name = spelling[1].lower()
        name, known = _ALIASES.get(name, name), known_metrics()
        if name not in known:
            advice = [nearest(name, [*known, *_ALIASES]), f"all metrics: {', '.join(known)}"]
            raise UserError(f"metric '{spelling[1]}' is not known", do="\n".join(filter(None, advice)))
        return cls(name, int(spelling[2]) if spelling[2] else None)

    def __str__(self) -> str:
        return self.name if self.k is None else f"{self.name}@{self.k}"


def known_metrics() -> dict[str, Callable[[Judged, int | None], np.ndarray]]:
    """Every metric by name: the public functions of this module that take (judged, k)."""
    return {name: function for name, function in globals().items()
            if inspect.isfunction(function) and not name.startswith("_")
            and inspect.getargs(function.__code__).args == ["judged", "k"]}


def evaluate(judged: Judged, metrics: Sequence[Metric]) -> dict[str, np.ndarray]:
    """float64 [Q] for each metric under its printed name; in blocks of queries, to hold little besides."""
    known = known_metrics()
    value_MQ = np.zeros((len(metrics), len(judged)))  # one allocation, which the system can give in large pages

    def write(first: int, last: int) -> None:
        block = judged.block(first, last)
        for number, metric in enumerate(metrics):
            value_MQ[number, first:last] = known[metric.name](block, metric.k)

    edges = [*range(0, len(judged), BLOCK_QUERIES), len(judged)]
    in_threads(write, list(zip(edges, edges[1:])))
    return {str(metric): value_Q for metric, value_Q in zip(metrics, value_MQ)}


def _ratio(part_Q: np.ndarray, whole_Q: np.ndarray) -> np.ndarray:
    """float64 [Q]: part / whole; a whole that is not 0 is at least 1 (a candidate, or a gain of 1 at rank 1)."""
    return part_Q / np.maximum(whole_Q, 1)
