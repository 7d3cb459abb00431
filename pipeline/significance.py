"""How far can a mean over queries be trusted, and the difference of two? Bootstrap intervals and randomisation tests.

Queries are the sampling unit. How far each value is from the mean is rounded to a grid, so fine that a mean moves by
less than 1e-10 of the largest distance, and so coarse that every sum of a resample is exact in float64: a seed gives
the same digits in whatever order, on however many threads and on whatever processor sums are taken. An interval tells
how the mean would vary over other queries of the same kind, nothing else.

Shapes: Q queries, M metrics (or the queries whose values differ), B resamples, T tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.support.ahead import made_ahead

_DRAWN_AT_ONCE = 1 << 21
_ONE_THREAD = 1 << 18  # multiplications; of larger products OpenBLAS makes its threads wait for each other
_ALL_SIGNS = 18  # differences of which every pattern of signs is looked at: 262,144 patterns
_ROUNDING = 2.0 ** -22  # of differences of float32 values, as a part of the largest


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


class Randomisation(NamedTuple):
    """`value`: share of the patterns of signs whose mean is at least as far from 0; `is_exact`: of all patterns."""

    value: float
    is_exact: bool


def randomisation_test(difference_Q: np.ndarray, resamples: int = 9_999, seed: int = 0) -> Randomisation:
    """Two-sided p-value of a mean of paired differences: were the two runs exchangeable, every sign might be the other.

    Fisher, The Design of Experiments (1935), section 21; for retrieval, Smucker, Allan and Carterette, CIKM 2007. Of
    few differences, or equal ones (those of hit@k: then it is McNemar's exact test), all patterns count; otherwise
    drawn ones, and theirs beside them, so that no p is below 1 / (resamples + 1) (Phipson and Smyth 2010). Sums within
    the rounding of float32 values count as equal. It gives what scipy.stats.permutation_test gives with
    permutation_type="samples", in memory that grows with Q + resamples and not with their product.
    ValueError as for `bootstrap_interval`.
    """
    _check(difference_Q[:, None], 0.5, resamples)
    away_M = np.abs(difference_Q[difference_Q != 0]).astype(np.float64)
    if not len(away_M):
        return Randomisation(1.0, True)
    slack = len(away_M) * _ROUNDING
    if away_M.max() - away_M.min() <= away_M.max() * _ROUNDING:
        from scipy.stats import binomtest
        p = binomtest(int((difference_Q > 0).sum()), len(away_M)).pvalue
        return Randomisation(max(float(p), 2.0 ** -1022), True)  # never 0, where the true one is only too small
    grid = _grid(away_M[:, None], np.zeros(1))[0]
    whole_M = np.rint(away_M / grid)
    least = abs(np.rint(difference_Q / grid).sum()) - slack * whole_M.max()
    if len(away_M) <= _ALL_SIGNS:
        return Randomisation(float((np.abs(_all_sums(whole_M)) >= least).mean()), True)
    beyond = int((np.abs(_drawn_sums(whole_M, resamples, seed)) >= least).sum())
    return Randomisation((beyond + 1) / (resamples + 1), False)


def _all_sums(whole_M: np.ndarray) -> np.ndarray:
    """float64 [2^M]: under every pattern of signs."""
    sums = np.zeros(1)
    for whole in whole_M:
        sums = np.concatenate([sums + whole, sums - whole])
    return sums


def _drawn_sums(whole_M: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """float64 [B]: under random signs. A byte has those of eight values, and there are 256 sums of eight values."""
    random = np.random.default_rng(seed)
    padded_M = np.pad(whole_M, (0, -len(whole_M) % 8))
    sums_B = np.zeros(resamples)
    for eight in padded_M.reshape(-1, 8):
        sums_B += _all_sums(eight)[random.integers(256, size=resamples, dtype=np.uint8)]
    return sums_B


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: that any of those below a level is found falsely has at most the level's probability.

    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    p_T = np.asarray(p_values, np.float64)
    order_T = np.argsort(p_T, kind="stable")
    adjusted_T = np.empty(len(p_T))
    adjusted_T[order_T] = np.minimum(1, np.maximum.accumulate(p_T[order_T] * np.arange(len(p_T), 0, -1)))
    return [float(p) for p in adjusted_T]


def average_interval(differences: Sequence[np.ndarray], confidence: float = 0.95, resamples: int = 1000,
                     seed: int = 0) -> tuple[float, float]:
    """(low, high) of the unweighted mean over tasks of the mean over queries; each task's queries are drawn by
    themselves, tasks never: it tells of other queries, not of other tasks."""
    means_B = np.zeros(resamples)
    for number, difference_Q in enumerate(differences):
        _check(difference_Q[:, None], confidence, resamples)
        means_B += _resampled_means(difference_Q[:, None], resamples, seed + number)[:, 0] / len(differences)
    low, high = np.quantile(means_B, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def average_test(differences: Sequence[np.ndarray], resamples: int = 9_999, seed: int = 0) -> Randomisation:
    """The randomisation test of that mean: every query weighs 1 / queries of its task."""
    weighted = [difference_Q / len(difference_Q) for difference_Q in differences]
    return randomisation_test(np.concatenate(weighted), resamples, seed)
