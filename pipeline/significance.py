"""How far can a mean over queries be trusted? Bootstrap intervals, the same resamples for all metrics.

Queries are the sampling unit. How far each value is from the mean is rounded to a grid, so fine that a mean moves by
less than 1e-10 of the largest distance, and so coarse that every sum of a resample is exact in float64: a seed gives
the same digits in whatever order, on however many threads and on whatever processor sums are taken. An interval tells
how the mean would vary over other queries of the same kind, nothing else.

Shapes: Q queries, M metrics, B resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa

from pipeline.support.ahead import made_ahead

_DRAWN_AT_ONCE = 1 << 21
_ONE_THREAD = 1 << 18  # multiplications; of larger products OpenBLAS makes its threads wait for each other


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
    values_MQ = np.ascontiguousarray(np.transpose(values_QM), np.float64)
    mean_M = np.array([value_Q.mean() for value_Q in values_MQ])
    away_QM = values_MQ.T - mean_M
    grid_M = _grid(away_QM, mean_M)
    whole_QM = np.rint(away_QM / grid_M)
    draws = _draws(len(values_QM), resamples, seed)
    sums = made_ahead((partial(_sums, drawn_BQ, whole_QM) for drawn_BQ in draws), most=pa.cpu_count())
    return mean_M + np.concatenate(list(sums)) * grid_M / len(values_QM)


def _grid(away_QM: np.ndarray, mean_M: np.ndarray) -> np.ndarray:
    """float64 [M]: powers of two. Q distances, as multiples of their metric's, add up to less than 2^53; what is only
    the rounding of a mean is none: where all values are equal, so are the ends of the interval and the mean."""
    largest_M = np.maximum(away_QM.max(axis=0), -away_QM.min(axis=0))
    _, exponent_M = np.frexp(np.maximum(largest_M * len(away_QM), np.abs(mean_M) * 16))
    return np.ldexp(1.0, np.maximum(exponent_M, -1021) - 52)


def _draws(num_queries: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """int32 [some B, Q]: queries of each resample; how many come at once does not change which."""
    random = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // num_queries)
    for first in range(0, resamples, at_once):
        yield random.integers(num_queries, size=(min(at_once, resamples - first), num_queries), dtype=np.int32)


def _sums(drawn_BQ: np.ndarray, whole_QM: np.ndarray) -> np.ndarray:
    """float64 [B, M]: exact sums of whole numbers over the queries that were drawn."""
    (num_resamples, num_queries), num_metrics = drawn_BQ.shape, whole_QM.shape[1]
    count_BQ = np.empty(drawn_BQ.shape)
    for count_Q, drawn_Q in zip(count_BQ, drawn_BQ):
        count_Q[:] = np.bincount(drawn_Q, minlength=num_queries)
    sums_BM = np.zeros((num_resamples, num_metrics))
    step = max(1, _ONE_THREAD // max(num_resamples * num_metrics, 1))
    for first in range(0, num_queries, step):
        sums_BM += count_BQ[:, first:first + step] @ whole_QM[first:first + step]
    return sums_BM


def _check(values_QM: np.ndarray, confidence: float, resamples: int) -> None:
    if values_QM.ndim != 2 or not len(values_QM):
        raise ValueError(f"values of shape {values_QM.shape}: one row per query, and at least one, is needed")
    if not np.isfinite(values_QM).all():
        raise ValueError("a value is not finite: the mean over queries has no interval")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: give a number between 0 and 1, such as 0.95")
    if resamples < 1:
        raise ValueError(f"{resamples} resamples: at least one is needed")
