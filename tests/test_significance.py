"""Bootstrap intervals against scipy's, against the normal theory and by their coverage."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from pipeline import significance
from pipeline.significance import bootstrap_interval


def metric_values(num_queries: int, seed: int = 0) -> np.ndarray:
    """[Q, 3]: a hit, a reciprocal rank and a skewed value."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.random(num_queries) < 0.3, 1 / rng.integers(1, 20, num_queries),
                     rng.exponential(size=num_queries)], axis=1).astype(np.float32)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_agrees_with_scipy_within_the_noise_of_resampling(confidence: float) -> None:
    values_QM = metric_values(400)
    low_M, high_M = bootstrap_interval(values_QM, confidence, resamples=4000, seed=1)
    for column, (low, high) in enumerate(zip(low_M, high_M)):
        reference = scipy.stats.bootstrap(
            (values_QM[:, column].astype(np.float64),), np.mean, confidence_level=confidence,
            n_resamples=4000, method="percentile", rng=np.random.default_rng(2), batch=500)
        # A quantile of 4000 resamples is uncertain by 4.5% of the standard error, on both sides: 5 sigma.
        tolerance = 5 * np.sqrt(2) * 0.045 * reference.standard_error
        assert low == pytest.approx(reference.confidence_interval.low, abs=tolerance)
        assert high == pytest.approx(reference.confidence_interval.high, abs=tolerance)


def test_covers_the_true_mean_as_often_as_it_says() -> None:
    repetitions, truth = 600, np.array([0.3, 0.5])
    rng = np.random.default_rng(3)
    covered_M = np.zeros(2)
    for seed in range(repetitions):
        values_QM = np.stack([rng.random(200) < truth[0], rng.random(200)], axis=1)
        low_M, high_M = bootstrap_interval(values_QM, confidence=0.9, resamples=200, seed=seed)
        covered_M += (low_M <= truth) & (truth <= high_M)
    # 600 draws at 0.9 have a standard deviation of 0.012; percentile intervals are a little too short.
    assert ((covered_M / repetitions > 0.85) & (covered_M / repetitions < 0.94)).all()


def test_is_as_wide_as_the_standard_error_asks() -> None:
    values_QM = metric_values(3000)
    low_M, high_M = bootstrap_interval(values_QM, resamples=2000)
    expected_M = 2 * 1.96 * values_QM.std(axis=0, dtype=np.float64) / np.sqrt(len(values_QM))
    np.testing.assert_allclose(high_M - low_M, expected_M, rtol=0.1)
    assert (low_M < values_QM.mean(axis=0)).all() and (values_QM.mean(axis=0) < high_M).all()


def test_a_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values_QM = metric_values(100)
    again = np.array(bootstrap_interval(values_QM, seed=5))
    assert np.array_equal(again, bootstrap_interval(values_QM, seed=5))
    assert not np.array_equal(again, bootstrap_interval(values_QM, seed=6))


def test_metrics_share_their_resamples_and_do_not_disturb_each_other() -> None:
    values_QM = metric_values(100)
    doubled_QM = np.column_stack([values_QM, 2 * values_QM[:, 0], 1 - values_QM[:, 0]])
    low_M, high_M = bootstrap_interval(doubled_QM)
    alone_low_M, alone_high_M = bootstrap_interval(values_QM[:, :1])
    assert (low_M[0], high_M[0]) == (alone_low_M[0], alone_high_M[0])
    np.testing.assert_allclose([low_M[3], high_M[3]], [2 * low_M[0], 2 * high_M[0]], rtol=1e-12)
    np.testing.assert_allclose([low_M[4], high_M[4]], [1 - high_M[0], 1 - low_M[0]], rtol=1e-12)


def test_a_higher_confidence_gives_a_wider_interval() -> None:
    values_QM = metric_values(200)
    widths = [float((high_M - low_M)[0]) for low_M, high_M in (
        bootstrap_interval(values_QM, confidence) for confidence in (0.5, 0.8, 0.95, 0.99))]
    assert widths == sorted(widths) and widths[0] > 0


@pytest.mark.parametrize("num_queries", [1, 2, 170, 1000, 4099])
def test_equal_values_leave_no_doubt(num_queries: int) -> None:
    values_QM = np.tile([0.0, 1.0, 0.1, -1 / 3], (num_queries, 1))
    low_M, high_M = bootstrap_interval(values_QM)
    np.testing.assert_allclose(low_M, [0, 1, 0.1, -1 / 3], rtol=1e-12)
    means = [float(np.mean(np.ascontiguousarray(value_Q))) for value_Q in values_QM.T]
    assert low_M.tolist() == means == high_M.tolist()  # to the last digit, as they stand side by side


def test_no_metrics_give_no_intervals() -> None:
    low_M, high_M = bootstrap_interval(np.zeros((5, 0)))
    assert low_M.shape == high_M.shape == (0,)


@pytest.mark.parametrize("values, options", [
    (np.zeros((0, 2)), {}), (np.zeros(5), {}), (np.array([[np.nan]]), {}), (np.array([[np.inf]]), {}),
    (np.zeros((5, 1)), {"confidence": 0}), (np.zeros((5, 1)), {"confidence": 1}),
    (np.zeros((5, 1)), {"confidence": 95}), (np.zeros((5, 1)), {"resamples": 0}),
])
def test_what_has_no_interval_is_refused(values: np.ndarray, options: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        bootstrap_interval(values, **options)  # type: ignore[arg-type]


def test_means_are_those_of_one_resample_after_the_other() -> None:
    values_QM, random = metric_values(257).astype(np.float64), np.random.default_rng(9)
    drawn = [random.integers(257, size=257, dtype=np.int32) for _ in range(50)]
    means_BM = significance._resampled_means(values_QM, 50, seed=9)
    np.testing.assert_allclose(means_BM, [values_QM[row].mean(axis=0) for row in drawn], rtol=1e-12)


@pytest.mark.parametrize("drawn_at_once, one_thread", [(1, 1), (300, 1000), (10_000, 1 << 30)])
def test_neither_blocks_nor_the_order_of_sums_change_a_digit(
        monkeypatch: pytest.MonkeyPatch, drawn_at_once: int, one_thread: int) -> None:
    values_QM = metric_values(301)
    expected = np.array(bootstrap_interval(values_QM, resamples=200, seed=3))
    monkeypatch.setattr(significance, "_DRAWN_AT_ONCE", drawn_at_once)
    monkeypatch.setattr(significance, "_ONE_THREAD", one_thread)
    backwards_QM = np.asfortranarray(values_QM[:, ::-1])
    assert np.array_equal(bootstrap_interval(values_QM, resamples=200, seed=3), expected)
    assert np.array_equal(bootstrap_interval(backwards_QM, resamples=200, seed=3), expected[:, ::-1])


@pytest.mark.parametrize("factor", [1e-300, 1e-9, 1.0, -1.0, 1e9, 1e300])
def test_the_grid_is_as_fine_as_the_values_are_small(factor: float) -> None:
    values_QM = metric_values(100).astype(np.float64)
    low_M, high_M = bootstrap_interval(values_QM)
    scaled = np.sort(bootstrap_interval(values_QM * factor), axis=0)
    np.testing.assert_allclose(scaled, np.sort([low_M * factor, high_M * factor], axis=0), rtol=1e-12)
