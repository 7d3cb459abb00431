"""The exact search against brute force, on data made to break it, under everything that must not matter."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.indexes import Hits, Statistics, exact, exact_search, id_order, merge_hits, torch_kernel, window
from pipeline.indexes.native_kernel import NativeKernel
from pipeline.indexes.search import Search
from pipeline.support.errors import UserError
from tests.indexes import kernels
from tests.indexes.oracle import blocks_of, statistics_of, true_hits

PRECISIONS = ("auto", "float32", "bfloat16", "float16", "int8")
HAVE_BYTES = [name for name in kernels.NAMES if name in ("avx512_bf16", "avx512_vnni")]


def make(shape: str, rows: int, dimension: int, random: np.random.Generator) -> np.ndarray:
    """Vectors [N, D] in float64 of a kind that is hard to search."""
    noise_ND = random.standard_normal((rows, dimension))
    point_D = random.standard_normal(dimension)
    signs_N1 = random.choice([-1.0, 1.0], (rows, 1))
    return SHAPES[shape](noise_ND, point_D, signs_N1, random)


Maker = Callable[[np.ndarray, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
SHAPES: dict[str, Maker] = {
    "gaussian": lambda noise, point, signs, random: noise,
    "near ties": lambda noise, point, signs, random: point + 1e-8 * noise,
    "copies": lambda noise, point, signs, random: noise[random.integers(0, 1 + len(noise) // 20, len(noise))],
    "one point": lambda noise, point, signs, random: np.tile(point, (len(noise), 1)),
    "cone": lambda noise, point, signs, random: 5 + 0.05 * noise,
    "two cones": lambda noise, point, signs, random: 3 * point * signs + 1e-3 * noise,
    "norms": lambda noise, point, signs, random: noise * 10.0 ** random.integers(-4, 5, signs.shape),
    "denormal": lambda noise, point, signs, random: noise * 10.0 ** random.integers(-44, -36, signs.shape),
    "signs": lambda noise, point, signs, random: np.sign(noise),
    "zeros": lambda noise, point, signs, random: noise * (signs > 0),
    "axis": lambda noise, point, signs, random: np.eye(len(point))[np.abs(noise).argmax(axis=1)],
    "outliers": lambda noise, point, signs, random: noise + 300 * point * (np.arange(len(point)) % 17 == 3),
    "opposite": lambda noise, point, signs, random: point * signs * 2.0 ** random.integers(-3, 4, signs.shape)
}


def shuffled_ids(rows: int, random: np.random.Generator) -> list[str]:
    return [f"{number}" for number in random.permutation(rows)]


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    limit = float(np.finfo(dtype).max)
    return np.clip(values, -limit, limit).astype(dtype)


def search(queries_QD: np.ndarray, vectors_ND: np.ndarray, ids: list[str], k: int, rows: int = 700,
           kernel: str = kernels.NAMES[-1], coarse: str = "auto", memory_bytes: int = 2 << 30) -> Hits:
    """By a kernel that the machine has; the type of the coarse product is `auto` where the kernel lacks it."""
    chosen = kernels.kernel(kernel)
    can = NativeKernel.can(coarse, chosen.native) if isinstance(chosen, NativeKernel) else coarse != "int8"
    if coarse in PRECISIONS and not can:
        coarse = "auto"
    with mock.patch.object(exact, "choose_kernel", return_value=chosen):
        return exact_search(queries_QD, blocks_of(vectors_ND, ids, rows), id_order(pa.array(ids)), k,
                            statistics_of(vectors_ND), coarse=coarse, memory_bytes=memory_bytes)


def assert_true(hits: Hits, queries_QD: np.ndarray, vectors_ND: np.ndarray, ids: list[str], k: int) -> None:
    rows_QK, scores_QK = true_hits(queries_QD, vectors_ND, ids, k)
    np.testing.assert_array_equal(hits.scores_QK, scores_QK)
    np.testing.assert_array_equal(hits.rows_QK, rows_QK)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SHAPES)), st.sampled_from(sorted(SHAPES)), st.integers(1, 900),
       st.integers(1, 70), st.integers(1, 80), st.integers(1, 40), st.sampled_from(("float16", "float32")),
       st.sampled_from(PRECISIONS), st.integers(14, 24), st.sampled_from(kernels.NAMES), st.integers(0, 2**32 - 1))
def test_gives_what_brute_force_gives(of_pool: str, of_queries: str, rows: int, dimension: int, queries: int, k: int,
                                      dtype: str, coarse: str, memory_bits: int, kernel: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    vectors_ND = stored(make(of_pool, rows, dimension, random), dtype)
    queries_QD = stored(make(of_queries, queries, dimension, random), dtype)
    ids = shuffled_ids(rows, random)
    hits = search(queries_QD, vectors_ND, ids, k, coarse=coarse, memory_bytes=1 << memory_bits, kernel=kernel)
    assert_true(hits, queries_QD, vectors_ND, ids, k)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coarse", PRECISIONS[1:])
def test_is_exact_where_queries_resemble_candidates(shape: str, coarse: str) -> None:
    random = np.random.default_rng(3)
    vectors_ND = stored(make(shape, 3000, 32, random), "float32")
    queries_QD = vectors_ND[:12] + stored(1e-3 * random.standard_normal((12, 32)), "float32")
    ids = shuffled_ids(3000, random)
    for kernel in kernels.NAMES:
        hits = search(queries_QD, vectors_ND, ids, 15, coarse=coarse, kernel=kernel)
        assert_true(hits, queries_QD, vectors_ND, ids, 15)


@pytest.mark.parametrize("shape", ("gaussian", "copies", "two cones"))
def test_nothing_about_the_machine_matters(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    random = np.random.default_rng(5)
    vectors_ND, queries_QD = (stored(make(shape, rows, 24, random), "float16") for rows in (1500, 12))
    ids = shuffled_ids(1500, random)
    expected = search(queries_QD, vectors_ND, ids, 20)
    threads = torch.get_num_threads()
    monkeypatch.setattr(window, "_TILE_ROWS", 300)
    monkeypatch.setattr(torch_kernel, "_MERGE_WIDTH", 7)
    try:
        for number, rows, memory in ((1, 1500, 1 << 30), (2, 1, 1 << 18), (threads, 333, 1 << 21)):
            torch.set_num_threads(number)
            for kernel in kernels.NAMES:
                found = search(queries_QD, vectors_ND, ids, 20, rows=rows, memory_bytes=memory, kernel=kernel)
                np.testing.assert_array_equal(found.rows_QK, expected.rows_QK)
                np.testing.assert_array_equal(found.scores_QK, expected.scores_QK)
    finally:
        torch.set_num_threads(threads)


def test_order_of_the_pool_does_not_matter() -> None:
    random = np.random.default_rng(7)
    vectors_ND, queries_QD = (stored(make("copies", rows, 16, random), "float16") for rows in (900, 10))
    ids = shuffled_ids(900, random)
    order_N = random.permutation(900)
    hits = search(queries_QD, vectors_ND, ids, 30)
    again = search(queries_QD, vectors_ND[order_N], [ids[row] for row in order_N], 30)
    np.testing.assert_array_equal(np.array(ids)[hits.rows_QK], np.array(ids)[order_N][again.rows_QK])
    np.testing.assert_array_equal(hits.scores_QK, again.scores_QK)


def test_union_is_the_concatenation() -> None:
    random = np.random.default_rng(8)
    kinds = (("copies", 500, "float16"), ("cone", 77, "float32"), ("zeros", 5, "float16"))
    members = [stored(make(shape, rows, 16, random), dtype)
               for shape, rows, dtype in kinds]
    joined_ND = np.concatenate(members)
    queries_QD = stored(make("gaussian", 9, 16, random), "float32")
    ids = shuffled_ids(len(joined_ND), random)
    order_N = id_order(pa.array(ids))
    statistics = Statistics.merged([statistics_of(member_ND) for member_ND in members])
    firsts = np.cumsum([0, *(len(member_ND) for member_ND in members)])
    streamed = exact_search(queries_QD, list(zip(firsts.tolist(), members)), order_N, 40, statistics)
    assert_true(streamed, queries_QD, joined_ND, ids, 40)
    apart = []
    for member_ND, first in zip(members, firsts.tolist()):
        ranks_N = order_N[first : first + len(member_ND)].argsort().argsort()
        apart.append((exact_search(queries_QD, [(0, member_ND)], ranks_N, 40, statistics), first))
    assert_true(merge_hits(apart, order_N, 40), queries_QD, joined_ND, ids, 40)


@pytest.mark.parametrize("kernel", [name for name in kernels.NAMES if name not in ("avx512_vnni", "avx512", "avx2")])
def test_a_bound_that_is_too_tight_would_be_noticed(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(9)
    vectors_ND, queries_QD = (stored(make("gaussian", rows, 64, random), "float32") for rows in (5000, 1000))
    ids = shuffled_ids(5000, random)
    expected = search(queries_QD, vectors_ND, ids, 100, coarse="bfloat16", kernel=kernel)
    monkeypatch.setattr(window, "_LARGEST_GROUP", 1)  # maxima of larger groups leave some room by themselves
    monkeypatch.setattr(exact.coarse_pass.Bounds, "floor", lambda self, product_Q: product_Q)
    monkeypatch.setattr(exact.coarse_pass, "_error", lambda queries, part, rows: 0 * queries.norms_Q[part])
    hits = search(queries_QD, vectors_ND, ids, 100, coarse="bfloat16", kernel=kernel)
    assert (hits.rows_QK != expected.rows_QK).any()


def test_the_true_score_lies_within_the_bound() -> None:
    import torch

    random = np.random.default_rng(10)
    vectors_ND, queries_QD = (stored(make("cone", rows, 96, random), "float32") for rows in (500, 20))
    mean_D = torch.from_numpy(statistics_of(vectors_ND).mean_D)
    stored_QD = torch.from_numpy(queries_QD)
    units = [values / np.linalg.norm(values, axis=1, keepdims=True)
             for values in (queries_QD.astype(np.float64), vectors_ND.astype(np.float64))]
    exact_QN = units[0] @ (units[1] - mean_D.numpy().astype(np.float64)).T
    for dtype in ("float32", "bfloat16", "float16"):
        rows = exact.coarse_pass.coarse_rows(torch.from_numpy(vectors_ND), mean_D, dtype)
        queries = exact.coarse_pass.coarse_queries(stored_QD, exact.score.norms(stored_QD), mean_D, dtype)
        product_QN = exact.coarse_pass.product(queries.vectors_QD, rows.vectors_ND).double().numpy()
        beta = exact.coarse_pass.rounding_of_products(queries.vectors_QD)
        error_Q1 = exact.coarse_pass.Bounds(queries, slice(None), rows, beta).error_Q.numpy()[:, None]
        apart_QN = np.abs(product_QN - exact_QN)
        assert (apart_QN <= error_Q1 + beta * np.abs(product_QN)).all()
        assert apart_QN.max() > 1e-3 * error_Q1.max(), "the bound is so loose that this test says nothing"


@pytest.mark.parametrize("kernel", HAVE_BYTES)
def test_a_bound_of_bytes_that_is_too_tight_would_be_noticed(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(9)
    vectors_ND, queries_QD = (stored(make("gaussian", rows, 64, random), "float32") for rows in (5000, 1000))
    ids, pack = shuffled_ids(5000, random), NativeKernel._pack
    expected = search(queries_QD, vectors_ND, ids, 100, coarse="int8", kernel=kernel)
    monkeypatch.setattr(exact.coarse_pass, "_error", lambda queries, part, rows: 0 * queries.norms_Q[part])
    monkeypatch.setattr(NativeKernel, "_pack", lambda *given: (
        rows := pack(*given))._replace(facts_W3=rows.facts_W3 * np.array([1, 0, 1], np.float32), largest_norm=0.0))
    hits = search(queries_QD, vectors_ND, ids, 100, coarse="int8", kernel=kernel)
    assert (hits.rows_QK != expected.rows_QK).any()


@pytest.mark.parametrize("kernel", HAVE_BYTES)
@pytest.mark.parametrize("shape", ("gaussian", "cone", "outliers", "norms", "zeros", "one point"))
def test_the_true_score_lies_within_the_bound_of_bytes(shape: str, kernel: str) -> None:
    import torch

    random = np.random.default_rng(10)
    vectors_ND, queries_QD = (stored(make(shape, rows, 200, random), "float32") for rows in (512, 64))
    queries_QD[0] = vectors_ND[0] = random.standard_normal(200)
    stored_QD = torch.from_numpy(queries_QD[np.abs(queries_QD).sum(axis=1) > 0])
    norms_Q, mean_D = exact.score.norms(stored_QD), torch.from_numpy(statistics_of(vectors_ND).mean_D)
    native = kernels.kernel(kernel)
    assert isinstance(native, NativeKernel)
    looked_for = Search(stored_QD, norms_Q, 5, mean_D, "int8", native, window.Sizes.within(1 << 30, 200, 5))
    rows = native._pack(looked_for, window.Window(vectors_ND, torch.from_numpy(vectors_ND), torch.arange(512)))
    panels = native._panels(looked_for, slice(None))
    row_bytes_NX = rows.packed.reshape(32, 4, 16, 64).transpose(0, 2, 1, 3).reshape(512, 256).astype(np.int64) - 128
    query_bytes_QX = panels.packed.view(np.int8).reshape(4, 4, 16, 16, 4).transpose(1, 3, 0, 2, 4).reshape(64, 256)
    sum_QN = (query_bytes_QX.astype(np.int64) @ row_bytes_NX.T)[:len(stored_QD)]
    step_N, lost_N, along_N = rows.facts_W3.astype(np.float64).T
    step_Q, _, along_Q, norm_Q = panels.facts_5B[:4, :len(stored_QD), None].astype(np.float64)
    product_QN = sum_QN * step_Q * step_N + along_Q * along_N
    exact_QN = _units(stored_QD.numpy()) @ (_units(vectors_ND) - mean_D.numpy().astype(np.float64)).T
    error_Q = looked_for.bounds(slice(None), rows, lost_Q=panels.lost_B).error_Q.numpy()
    apart_QN, bound_QN = np.abs(product_QN - exact_QN), error_Q[:, None] + norm_Q * lost_N
    assert (apart_QN <= bound_QN).all()
    assert apart_QN.max() > 0.02 * bound_QN.max(), "the bound is so loose that this test says nothing"
    assert bound_QN.max() < 0.05, "bytes would be of no use"


def _units(values_ND: np.ndarray) -> np.ndarray:
    wide_ND = values_ND.astype(np.float64)
    return wide_ND / np.maximum(np.linalg.norm(wide_ND, axis=1, keepdims=True), 1e-300)


@pytest.mark.parametrize("kernel", HAVE_BYTES)
def test_bytes_give_way_where_they_tell_too_little(kernel: str) -> None:
    random = np.random.default_rng(15)
    vectors_ND, queries_QD = (stored(make("two cones", rows, 64, random), "float32") for rows in (20_000, 20))
    ids = shuffled_ids(20_000, random)
    auto, forced = (search(queries_QD, vectors_ND, ids, 10, coarse=name, kernel=kernel) for name in ("auto", "int8"))
    np.testing.assert_array_equal(auto.rows_QK, forced.rows_QK)
    assert auto.examined < forced.examined / 4


def test_few_float64_scores_are_needed() -> None:
    random = np.random.default_rng(11)
    vectors_ND, queries_QD = (stored(make("cone", rows, 128, random), "float16") for rows in (20_000, 20))
    ids = shuffled_ids(20_000, random)
    assert search(queries_QD, vectors_ND, ids, 10).examined < 20 * 100


def test_a_collapsed_encoder_costs_no_more_than_others() -> None:
    random = np.random.default_rng(12)
    vectors_ND, queries_QD = (stored(make("one point", rows, 16, random), "float32") for rows in (20_000, 20))
    ids = shuffled_ids(20_000, random)
    hits = search(queries_QD, vectors_ND, ids, 10)
    expected = sorted(range(20_000), key=ids.__getitem__)[:10]
    assert (hits.rows_QK == expected).all()
    assert hits.examined == 20 * 10


def test_a_zero_query_gets_the_lowest_ids() -> None:
    random = np.random.default_rng(13)
    vectors_ND = stored(make("gaussian", 50, 8, random), "float16")
    ids = shuffled_ids(50, random)
    queries_QD = np.zeros((3, 8), np.float16)
    queries_QD[1] = vectors_ND[4]
    hits = search(queries_QD, vectors_ND, ids, 60, rows=9, memory_bytes=1 << 12)
    assert_true(hits, queries_QD, vectors_ND, ids, 60)
    assert (hits.scores_QK[0, :50] == 0).all() and (hits.rows_QK[0, 50:] == -1).all()


def test_no_queries_and_no_rows() -> None:
    vectors_ND = np.ones((4, 8), np.float16)
    assert search(np.ones((0, 8), np.float16), vectors_ND, list("abcd"), 3).rows_QK.shape == (0, 3)
    none_ND = np.ones((0, 8), np.float16)
    hits = search(vectors_ND, none_ND, [], 2)
    assert (hits.rows_QK == -1).all() and (hits.scores_QK == -np.inf).all()


def test_no_warnings_for_read_only_vectors() -> None:
    vectors_ND = np.ones((4, 8), np.float16)
    vectors_ND.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(vectors_ND, vectors_ND, list("abcd"), 2)


def test_vectors_given_are_left_alone() -> None:
    random = np.random.default_rng(14)
    vectors_ND, queries_QD = (stored(make("norms", rows, 8, random), "float32") for rows in (60, 5))
    before = vectors_ND.copy(), queries_QD.copy()
    search(queries_QD, vectors_ND, shuffled_ids(60, random), 5)
    np.testing.assert_array_equal(vectors_ND, before[0])
    np.testing.assert_array_equal(queries_QD, before[1])


def test_reduced_float32_products_are_switched_off_and_back_on() -> None:
    import torch

    matmul = getattr(torch.backends.mkldnn, "matmul")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with exact.coarse_pass.full_precision():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


def test_mistakes_are_named() -> None:
    vectors_ND = np.ones((4, 8), np.float32)
    with pytest.raises(UserError, match="queries have 6 dimensions, the pool has 8"):
        search(np.ones((1, 6), np.float32), vectors_ND, list("abcd"), 2)
    with pytest.raises(UserError, match="(?s)'bfloat61' is not known.*bfloat16"):
        exact_search(vectors_ND, [(0, vectors_ND)], np.arange(4), 2, statistics_of(vectors_ND), coarse="bfloat61")
    with pytest.raises(UserError, match="(?s)'nativ' is not known.*native"):
        exact_search(vectors_ND, [(0, vectors_ND)], np.arange(4), 2, statistics_of(vectors_ND), kernel="nativ")
    broken_QD = vectors_ND.copy()
    broken_QD[2, 3] = np.nan
    with pytest.raises(UserError, match="query number 2"):
        search(broken_QD, vectors_ND, list("abcd"), 2)
    with pytest.raises(UserError, match="NaN or infinity"):
        exact_search(vectors_ND, [(0, broken_QD)], np.arange(4), 2, statistics_of(vectors_ND))


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, pipeline.indexes; sys.exit(bool({'torch', 'faiss'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
