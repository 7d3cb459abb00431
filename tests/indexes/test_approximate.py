"""FAISS indexes: built, searched, written, read; measured against the exact search."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.indexes import (Hits, build_index, exact_search, read_index, recall_against_exact, search_index,
                              write_index)
from pipeline.indexes.approximate import check_factory, check_parameters
from pipeline.support.errors import UserError
from tests.indexes.oracle import blocks_of, statistics_of

ROWS, DIMENSION = 2000, 32
IDS = [str(row) for row in range(ROWS)]
RANDOM = np.random.default_rng(0)
ORDER_N = RANDOM.permutation(ROWS)
VECTORS_ND = (0.5 + RANDOM.standard_normal((40, DIMENSION))[RANDOM.integers(0, 40, ROWS)]
              + 0.3 * RANDOM.standard_normal((ROWS, DIMENSION))).astype(np.float16)
QUERIES_QD = (VECTORS_ND[:60] + 0.2 * RANDOM.standard_normal((60, DIMENSION))).astype(np.float16)


def blocks(rows: int = 300) -> Callable[[], Any]:
    return lambda: blocks_of(VECTORS_ND, IDS, rows)


def built(factory: str, rows: int = 300, **options: Any) -> Any:
    return build_index(factory, blocks(rows), DIMENSION, ROWS, **{"threads": 1, **options})


@pytest.fixture(scope="module")
def exact_hits() -> Hits:
    return exact_search(QUERIES_QD, blocks()(), ORDER_N, 10, statistics_of(VECTORS_ND))


def test_flat_agrees_up_to_float32_noise(exact_hits: Hits) -> None:
    hits = search_index(built("Flat"), QUERIES_QD, 10, ORDER_N)
    np.testing.assert_allclose(hits.scores_QK, exact_hits.scores_QK, atol=1e-6)
    differ_QK = hits.rows_QK != exact_hits.rows_QK
    gaps_QK = np.abs(np.diff(exact_hits.scores_QK, axis=1))
    near_QK = np.zeros_like(differ_QK)
    near_QK[:, 1:] |= gaps_QK < 1e-6
    near_QK[:, :-1] |= gaps_QK < 1e-6
    assert not (differ_QK & ~near_QK)[:, :-1].any()
    assert recall_against_exact(hits, exact_hits, 10) > 0.99


@pytest.mark.parametrize("factory, parameters, least", (
    ("IVF8,Flat", "nprobe=8", 0.99), ("IVF8,Flat", None, 0.3), ("HNSW16", "efSearch=64", 0.9),
    ("PQ16x4", None, 0.3), ("OPQ4,IVF4,PQ4x4", "nprobe=4", 0.1), ("SQ8", None, 0.8),
    ("PCA16,Flat", None, 0.3)))
def test_other_types_have_a_measured_recall_and_repeat_bit_for_bit(
        factory: str, parameters: str | None, least: float, exact_hits: Hits, tmp_path: Path) -> None:
    first, second = built(factory), built(factory, rows=1999)
    hits = search_index(first, QUERIES_QD, 10, ORDER_N, parameters)
    assert least < recall_against_exact(hits, exact_hits, 10) <= 1
    again = search_index(second, QUERIES_QD, 10, ORDER_N, parameters)
    np.testing.assert_array_equal(hits.rows_QK, again.rows_QK)
    np.testing.assert_array_equal(hits.scores_QK, again.scores_QK)
    for name, index in (("first", first), ("second", second)):
        write_index(index, tmp_path / name)
    if not parameters:  # searching with parameters leaves them in the index
        assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    read = search_index(read_index(tmp_path / "first"), QUERIES_QD, 10, ORDER_N, parameters)
    np.testing.assert_array_equal(hits.rows_QK, read.rows_QK)


def test_another_seed_trains_on_another_sample() -> None:
    scores = [search_index(built("PQ4x4", train_rows=200, seed=seed), QUERIES_QD, 10, ORDER_N).scores_QK
              for seed in (0, 0, 1)]
    assert (scores[0] == scores[1]).all() and (scores[0] != scores[2]).any()


def test_equal_scores_are_ordered_by_id() -> None:
    copies_ND = np.tile(np.arange(1, 9, dtype=np.float16), (30, 1))
    order_N = np.random.default_rng(1).permutation(30)
    index = build_index("Flat", lambda: [(0, copies_ND)], 8, 30)
    hits = search_index(index, copies_ND[:2], 12, order_N)
    assert (hits.rows_QK == np.argsort(order_N)[:12]).all()
    assert (search_index(index, copies_ND[:2], 40, order_N).rows_QK[:, 30:] == -1).all()


def test_ranks_of_a_member_of_a_union_need_not_begin_at_zero() -> None:
    hits = search_index(built("Flat"), QUERIES_QD, 5, ORDER_N)
    again = search_index(built("Flat"), QUERIES_QD, 5, 1_000_000 + 3 * ORDER_N)
    np.testing.assert_array_equal(hits.rows_QK, again.rows_QK)


def test_zero_vectors_score_zero() -> None:
    vectors_ND = np.zeros((3, 8), np.float32)
    vectors_ND[1] = 2
    hits = search_index(build_index("Flat", lambda: [(0, vectors_ND)], 8, 3), vectors_ND[:2], 3, np.arange(3))
    assert hits.rows_QK.tolist() == [[0, 1, 2], [1, 0, 2]]
    np.testing.assert_allclose(hits.scores_QK, [[0, 0, 0], [1, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("factory", ("Flatt", "IVF,Flat", "", "PQ5x8", "banana,HNSW"))
def test_an_unknown_factory_string_is_refused_with_examples(factory: str) -> None:
    with pytest.raises(UserError, match="(?s)FAISS.*for example Flat, IVF1024,Flat"):
        built(factory)


@pytest.mark.parametrize("factory", ("IVF0,Flat", "HNSW0", "HNSW1", "RQ0x8", "PQ4x0", "NSG2", "IVF8_HNSW1,Flat"))
def test_numbers_that_would_end_the_process_are_refused(factory: str) -> None:
    with pytest.raises(UserError, match="a number that is too small"):
        built(factory)


@pytest.mark.parametrize("factory, reason", (
    ("HNSW16_PQ4", "for Euclidean distances only"), ("IDMap,Flat", "cannot add to IDMap,Flat [(]add does not make")))
def test_types_that_cannot_hold_these_vectors_are_refused(factory: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        built(factory)


@pytest.mark.parametrize("factory", ("Flat", "IVF1024,Flat", "OPQ64,IVF4096,PQ64", "PQ5", "PQ9x4", "HNSW32", "SQ8"))
def test_a_factory_string_is_checked_before_the_dimension_is_known(factory: str) -> None:
    check_factory(factory)


@pytest.mark.parametrize("factory", ("HNWS32", "IVF1024", "PQ101", "HNSW16_PQ4", "IVF0,Flat"))
def test_no_dimension_makes_these_factory_strings(factory: str) -> None:
    with pytest.raises(UserError, match="for example Flat, IVF1024,Flat"):
        check_factory(factory)


@pytest.mark.parametrize("factory, needed", (
    ("IVF4096,Flat", "4,096"), ("PQ4x12", "4,096"), ("OPQ8,IVF2048,PQ8", "2,048"),
    ("IVF64_HNSW8,PQ4x12", "4,096")))
def test_too_few_rows_to_train_says_how_many(factory: str, needed: str) -> None:
    with pytest.raises(UserError, match=f"at least {needed} rows to train, and has 2,000"):
        built(factory)


def test_too_small_a_sample_names_the_setting() -> None:
    with pytest.raises(UserError, match="(?s)needs at least 256 rows.*index.train_rows=256"):
        built("PQ8", train_rows=100)


@pytest.mark.parametrize("parameters", (
    "nprobe=0", "nprobe=-1", "nprobe=2.5", "nprobe=nan", "nprobe=inf", "nprobe=", "nprobe", "=3",
    "nprobe=4,efSearch=0", "quantizer_efSearch=0", "nprobe=4;efSearch=8"))
def test_search_parameters_that_no_index_takes_are_refused_without_faiss(parameters: str) -> None:
    with pytest.raises(UserError, match="(?s)is not a search parameter.*retrieve.faiss_parameters.*nprobe=16"):
        check_parameters(parameters)


@pytest.mark.parametrize("parameters", (
    "", "nprobe=1", "nprobe=16,efSearch=64", "k_factor_rf=1.5,nprobe=4", "max_codes=0"))
def test_search_parameters_that_some_index_takes_pass(parameters: str) -> None:
    check_parameters(parameters)


@pytest.mark.parametrize("factory, parameters", (
    ("IVF8,Flat", "efSerch=3"), ("IVF8,Flat", "efSearch=3"), ("HNSW16", "nprobe=3"), ("PQ4x4,RFlat", "k_factor_rf=0.5"),
    ("PQ4x4", "ht=4")))
def test_parameters_that_an_index_does_not_take_are_named(factory: str, parameters: str) -> None:
    with pytest.raises(UserError, match=f"does not take the parameters '{parameters}'"):
        search_index(built(factory), QUERIES_QD, 5, ORDER_N, parameters)


def test_no_search_with_a_bad_width_reaches_faiss() -> None:
    """FAISS ends the whole process for this one."""
    with pytest.raises(UserError, match="'nprobe=0' is not a search parameter"):
        search_index(built("IVF8,PQ16x4fs"), QUERIES_QD, 5, ORDER_N, "nprobe=0")


def test_another_dimension_is_named() -> None:
    with pytest.raises(UserError, match="queries have 8 dimensions, the index has 32"):
        search_index(built("IVF8,Flat"), QUERIES_QD[:, :8], 5, ORDER_N)


@pytest.mark.parametrize("factory", ("Flat", "IVF8,Flat", "HNSW16", "PQ16x4", "OPQ4,IVF4,PQ4x4", "SQ8", "PQ4x4,RFlat"))
def test_an_index_is_mapped_and_not_copied_into_memory(factory: str, tmp_path: Path) -> None:
    write_index(built(factory), tmp_path / "index.faiss")
    before = _mappings(tmp_path / "index.faiss")
    index = read_index(tmp_path / "index.faiss")
    assert (before, _mappings(tmp_path / "index.faiss")) == (0, 1)
    assert index.ntotal == ROWS


def _mappings(path: Path) -> int:
    return sum(line.endswith(str(path)) for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    with pytest.raises(UserError, match="cannot be read"):
        read_index(path)
    write_index(built("Flat"), path)
    whole = path.read_bytes()
    for length in (5000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cannot be read"):
            read_index(path)


def test_torch_is_imported_before_faiss() -> None:
    code = ("import sys, numpy as np; from pipeline import indexes\n"
            "indexes.build_index('Flat', lambda: [(0, np.ones((2, 4), np.float32))], 4, 2)\n"
            "names = list(sys.modules); sys.exit(names.index('torch') > names.index('faiss'))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
