"""Intervals and tests against scipy's, against enumeration and the normal theory, and by how often they are wrong."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import scipy.stats

from pipeline import significance
from pipeline.significance import average_interval, average_test, bootstrap_interval, holm, randomisation_test


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


def permutation_p(difference_Q: np.ndarray, resamples: float = np.inf) -> float:
    """scipy's, of the same statistic."""
    return float(scipy.stats.permutation_test(
        (difference_Q,), lambda values, axis: np.mean(values, axis=axis), vectorized=True, permutation_type="samples",
        n_resamples=resamples, alternative="two-sided", rng=np.random.default_rng(0)).pvalue)


def enumerated_p(difference_Q: np.ndarray) -> float:
    """By trying every pattern of signs, with a little room for rounding."""
    sums = [sum(sign * value for sign, value in zip(signs, difference_Q))
            for signs in itertools.product([1, -1], repeat=len(difference_Q))]
    return float(np.mean([abs(each) >= abs(difference_Q.sum()) - 1e-9 for each in sums]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["hits", "thirds", "any"])
def test_few_differences_are_tested_exactly(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    difference_Q = {"hits": rng.integers(-1, 2, 11).astype(float), "any": rng.normal(0.4, 1, 11),
                    "thirds": (rng.integers(0, 4, 11) - rng.integers(0, 4, 11)) / 3}[kind]
    found = randomisation_test(difference_Q, resamples=10)
    assert found.is_exact
    assert found.value == pytest.approx(enumerated_p(difference_Q), rel=1e-12)
    assert found.value == pytest.approx(permutation_p(difference_Q), rel=1e-12)


@pytest.mark.parametrize("wins, losses, ties", [(30, 12, 500), (12, 30, 0), (400, 350, 3), (25, 25, 4)])
def test_hits_are_tested_exactly_however_many(wins: int, losses: int, ties: int) -> None:
    """McNemar's exact test, here as two tails of a binomial that are added up."""
    difference_Q = np.repeat([1.0, -1.0, 0.0], [wins, losses, ties])
    found = randomisation_test(difference_Q)
    tail = scipy.stats.binom.cdf(min(wins, losses), wins + losses, 0.5)
    assert found.is_exact and found.value == pytest.approx(min(1, 2 * tail), rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.15])
def test_many_differences_agree_with_scipy_within_the_noise_of_resampling(shift: float) -> None:
    difference_Q = np.random.default_rng(1).normal(shift, 1, 300)
    found, expected = randomisation_test(difference_Q, 9_999), permutation_p(difference_Q, 9_999)
    assert not found.is_exact
    assert found.value == pytest.approx(expected, abs=5 * np.sqrt(2 * expected / 9_999) + 2e-4)


def test_a_drawn_p_value_is_never_zero_and_a_seed_gives_it_again() -> None:
    difference_Q = np.random.default_rng(2).normal(2, 1, 100)
    assert randomisation_test(difference_Q, 99).value == 0.01
    weak_Q = np.random.default_rng(2).normal(0.1, 1, 100)
    assert randomisation_test(weak_Q, seed=4) == randomisation_test(weak_Q, seed=4)
    assert randomisation_test(weak_Q, seed=4).value != randomisation_test(weak_Q, seed=5).value
    assert 0 < randomisation_test(np.ones(5000)).value < 1e-300


def test_signs_are_drawn_fairly() -> None:
    """Of 20 unequal values and more, all drawn sums have the mean 0 and the variance of independent signs."""
    whole_M = np.arange(1.0, 24.0)
    sums_B = significance._drawn_sums(whole_M, 100_000, seed=0)
    variance = (whole_M ** 2).sum()
    assert abs(sums_B.mean()) < 5 * np.sqrt(variance / 100_000)
    assert sums_B.var() == pytest.approx(variance, rel=0.03)
    assert set(np.unique(np.abs(sums_B) % 2)) == {whole_M.sum() % 2}


@pytest.mark.parametrize("difference_Q", [np.zeros(1), np.zeros(40), np.array([0.3]), np.array([-0.3])])
def test_what_can_only_be_chance(difference_Q: np.ndarray) -> None:
    assert randomisation_test(difference_Q) == (1.0, True)


def test_rounding_of_float32_is_no_difference() -> None:
    """Thirds in float32: 1/3 - 0 and 1 - 2/3 are the same change."""
    value_Q = np.array([1, 3, 2, 1, 0, 0, 3, 1] * 5, np.float32) / np.float32(3)
    other_Q = np.array([0, 2, 1, 2, 1, 1, 2, 0] * 5, np.float32) / np.float32(3)
    difference_Q = value_Q.astype(np.float64) - other_Q
    assert len(np.unique(np.abs(difference_Q))) > 1
    found = randomisation_test(difference_Q)
    assert found == randomisation_test(np.sign(difference_Q)) and found.is_exact


def null_p_values(kind: str, pairs: int, seed: int) -> np.ndarray:
    """p of pairs drawn from one law, correlated as two runs over the same queries are."""
    rng, p_values = np.random.default_rng(seed), []
    for _ in range(pairs):
        ease_Q = rng.random(150)
        if kind == "hits":
            first_Q, second_Q = (rng.random((2, 150)) < ease_Q).astype(float)
        else:
            first_Q, second_Q = 1 / np.ceil(rng.random((2, 150)) * 20 * ease_Q + 0.01)
        p_values.append(randomisation_test(first_Q - second_Q, 999, seed=1).value)
    return np.array(p_values)


def test_of_200_pairs_that_differ_by_chance_alone_at_most_ten_are_found_different() -> None:
    """Hits come in whole numbers, so the test keeps below the 5% that it promises."""
    assert (null_p_values("hits", 200, seed=5) < 0.05).sum() <= 10


@pytest.mark.parametrize("level", [0.01, 0.05, 0.2, 0.5])
def test_false_alarms_are_as_frequent_as_the_level_says(level: float) -> None:
    """Of continuous values p is uniform: neither more alarms than promised nor a deaf test, within four deviations."""
    alarms = (null_p_values("ranks", 1500, seed=6) < level).sum()
    assert abs(alarms - 1500 * level) < 4 * np.sqrt(1500 * level * (1 - level)) + 1500 * 0.001


def test_holm_keeps_false_alarms_down_over_sixteen_tasks() -> None:
    """A pair is a false alarm if any of its tasks is."""
    p_values = null_p_values("ranks", 16 * 100, seed=7).reshape(100, 16)
    assert sum(min(holm(list(p_T))) < 0.05 for p_T in p_values) <= 5 + 4 * np.sqrt(100 * 0.05 * 0.95)
    assert sum(p_T.min() < 0.05 for p_T in p_values) > 30  # as many it would be without


def test_a_real_difference_is_found() -> None:
    rng, found = np.random.default_rng(6), 0
    for _ in range(50):
        ease_Q = rng.random(400)
        first_Q, second_Q = rng.random(400) < np.minimum(ease_Q + 0.15, 1), rng.random(400) < ease_Q
        found += randomisation_test(first_Q.astype(float) - second_Q).value < 0.05
    assert found >= 45


def test_memory_does_not_grow_with_the_product_of_queries_and_resamples() -> None:
    difference_Q = np.random.default_rng(7).normal(0.002, 1, 200_000)
    tracemalloc.start()
    randomisation_test(difference_Q, 999)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 8 * len(difference_Q)  # all signs at once would be 200 MB even as bytes


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


def test_holm_by_its_own_definition() -> None:
    """A hypothesis falls at a level if it and all with smaller p do, each in its turn at level / those left."""
    p_values = np.random.default_rng(8).random(9) ** 3
    adjusted = holm(list(p_values))
    for level in np.linspace(0.001, 0.999, 300):
        fallen: set[int] = set()
        for left, number in zip(range(9, 0, -1), np.argsort(p_values)):
            if p_values[number] > level / left:
                break
            fallen.add(int(number))
        assert {number for number in range(9) if adjusted[number] <= level} == fallen


def test_the_average_counts_every_task_the_same() -> None:
    rng = np.random.default_rng(9)
    small_Q, large_Q = rng.normal(0.5, 1, 20), rng.normal(0, 1, 2000)
    low, high = average_interval([small_Q, large_Q], resamples=4000, seed=1)
    mean = (small_Q.mean() + large_Q.mean()) / 2
    error = np.sqrt(small_Q.var() / 20 + large_Q.var() / 2000) / 2
    assert low < mean < high and high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert average_interval([small_Q], seed=3) == pytest.approx(
        [float(end[0]) for end in bootstrap_interval(small_Q[:, None], seed=3)], rel=1e-12)


def test_the_test_of_the_average_is_that_of_its_sum() -> None:
    rng = np.random.default_rng(10)
    first_Q, second_Q = rng.normal(0.4, 1, 5), rng.normal(0.3, 1, 7)
    together = np.concatenate([first_Q / 5, second_Q / 7])
    assert average_test([first_Q, second_Q]).value == pytest.approx(enumerated_p(together), rel=1e-12)
