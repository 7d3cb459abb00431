"""Statistics of a pool: their sums, their independence of blocks, their file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.indexes import Statistics
from pipeline.support.errors import UserError
from tests.indexes.oracle import blocks_of, statistics_of


def same(left: Statistics, right: Statistics) -> bool:
    counts = [(each.rows, each.dimension, each.zero_vectors) for each in (left, right)]
    return (counts[0] == counts[1]
            and left.sum_of_unit_vectors_D.tobytes() == right.sum_of_unit_vectors_D.tobytes())


def test_the_mean_is_that_of_the_unit_vectors() -> None:
    random = np.random.default_rng(0)
    scale_N1 = 10.0 ** random.integers(-30, 30, (2500, 1))
    vectors_ND = (random.standard_normal((2500, 20)) * scale_N1).astype(np.float32)
    vectors_ND[[3, 70]] = 0
    statistics = statistics_of(vectors_ND)
    values_ND = vectors_ND.astype(np.float64)
    norms_N = np.linalg.norm(values_ND, axis=1)
    expected_D = (values_ND / np.where(norms_N > 0, norms_N, 1)[:, None]).sum(axis=0)
    assert (statistics.rows, statistics.zero_vectors) == (2500, 2)
    np.testing.assert_allclose(statistics.sum_of_unit_vectors_D, expected_D, atol=2500 * 2.0**-25)
    np.testing.assert_allclose(statistics.mean_D, expected_D / 2500, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_blocks_and_unions_do_not_matter(rows: int, block_rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    vectors_ND = random.standard_normal((rows, 9)).astype(np.float16)
    ids = [str(row) for row in range(rows)]
    whole = statistics_of(vectors_ND)
    assert same(whole, Statistics.of(blocks_of(vectors_ND, ids, block_rows), 9))
    parts = [statistics_of(part_ND) for part_ND in np.array_split(vectors_ND, 4)]
    assert same(whole, Statistics.merged([parts[place] for place in random.permutation(4)]))


def test_saved_and_loaded_and_the_same_bytes(tmp_path: Path) -> None:
    statistics = statistics_of(np.random.default_rng(1).standard_normal((50, 7)).astype(np.float32))
    first, second = tmp_path / ".statistics.npz.tmp1", tmp_path / "b"
    statistics.save(first)
    statistics.save(second)
    assert same(Statistics.load(first), statistics)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("content", (b"", b"PK\x03\x04 not an archive", None))
def test_a_damaged_file_is_the_users_to_mend(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "statistics.npz").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        Statistics.load(tmp_path / "statistics.npz")


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("dtype", ("float16", "float32"))
def test_a_vector_that_is_not_finite_is_named(value: float, dtype: str) -> None:
    vectors_ND = np.ones((6, 5), dtype)
    vectors_ND[4, 2] = value
    with pytest.raises(UserError, match="(?s)1 of 3 vectors.*first: e"):
        Statistics.of(blocks_of(vectors_ND, list("abcdef"), 3), 5)


def test_the_largest_finite_values_are_not_refused() -> None:
    for dtype in (np.float16, np.float32):
        assert statistics_of(np.full((2, 64), np.finfo(dtype).max, dtype)).rows == 2
