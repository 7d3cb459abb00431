"""How far can a mean over queries be trusted? Bootstrap intervals, the same resamples for all metrics.

Queries are the sampling unit. One resample is held at a time, and sums are taken in a fixed order instead of
by a threaded matrix product, so the same seed gives the same digits whatever the number of threads; this
costs about a third of the speed. An interval tells how the mean would vary over other queries of the same
kind, nothing else.

Shapes: Q queries, M metrics, B resamples.
"""

from __future__ import annotations

import numpy as np


def bootstrap_interval(values_QM: np.ndarray, confidence: float = 0.95, resamples: int = 1000,
                       seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), float64 [M] each: the percentile interval of each metric's mean over queries.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Differences of two runs may be
    passed as values: metrics and runs that share a seed and a number of queries share their resamples.
    ValueError: no queries, a value that is not finite, a confidence outside (0, 1), or no resamples.
    """
    _check(values_QM, confidence, resamples)
    means_BM = _resampled_means(values_QM, resamples, seed)
    tail = (1 - confidence) / 2
    low_M, high_M = np.quantile(means_BM, [tail, 1 - tail], axis=0)
    return low_M, high_M


def _resampled_means(values_QM: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """float64 [B, M]: means over queries drawn with replacement; how often each was drawn is its weight."""
    num_queries, num_metrics = values_QM.shape
    values_MQ = np.ascontiguousarray(values_QM.T, np.float64)
    random = np.random.default_rng(seed)
    means_BM = np.empty((resamples, num_metrics))
    for mean_M in means_BM:
        drawn = random.integers(num_queries, size=num_queries, dtype=np.int32)
        count_Q = np.bincount(drawn, minlength=num_queries).astype(np.float64)
        mean_M[:] = np.einsum("mq,q->m", values_MQ, count_Q) / num_queries
    return means_BM


def _check(values_QM: np.ndarray, confidence: float, resamples: int) -> None:
    if values_QM.ndim != 2 or not len(values_QM):
        raise ValueError(f"values of shape {values_QM.shape}: one row per query, and at least one, is needed")
    if not np.isfinite(values_QM).all():
        raise ValueError("a value is not finite: the mean over queries has no interval")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: give a number between 0 and 1, such as 0.95")
    if resamples < 1:
        raise ValueError(f"{resamples} resamples: at least one is needed")
