"""The definition of scores and of their order."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.indexes import score
from tests.indexes.oracle import folded, true_scores


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=70))
def test_folded_sum_is_the_defined_order(values: list[float]) -> None:
    import torch

    assert float(score.folded_sum(torch.tensor([values, values], dtype=torch.float64))[1]) == folded(values)


@pytest.mark.parametrize("dtype", ("float16", "float32"))
def test_scores_are_cosines(dtype: str) -> None:
    """Against exact rational arithmetic."""
    import torch

    random = np.random.default_rng(0)
    queries_QD, vectors_ND = (random.standard_normal((rows, 37)).astype(dtype) for rows in (3, 5))
    stored_QD = torch.from_numpy(queries_QD)
    query_P, row_P = torch.arange(3).repeat_interleave(5), torch.arange(5).repeat(3)
    stored_ND = torch.from_numpy(vectors_ND)
    found = score.pair_scores(stored_QD.double(), score.norms(stored_QD), query_P, stored_ND, row_P)
    for value, query, row in zip(found.tolist(), query_P.tolist(), row_P.tolist(), strict=True):
        dot, query_square, square = (sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(left, right))
                                     for left, right in ((queries_QD[query], vectors_ND[row]),
                                                         (queries_QD[query], queries_QD[query]),
                                                         (vectors_ND[row], vectors_ND[row])))
        assert value == np.float32(float(dot) / (float(query_square) * float(square)) ** 0.5)
    np.testing.assert_array_equal(found.reshape(3, 5).numpy(), true_scores(queries_QD, vectors_ND))


def test_a_score_does_not_depend_on_its_neighbours() -> None:
    import torch

    random = np.random.default_rng(1)
    vectors_ND = torch.from_numpy(random.standard_normal((2500, 129)).astype(np.float32))
    queries_QD = vectors_ND[:2].double()
    norms_Q = score.norms(vectors_ND[:2])
    rows = torch.arange(2500)
    together = score.pair_scores(queries_QD, norms_Q, torch.ones_like(rows), vectors_ND, rows)
    for row in (0, 1, 1023, 1024, 2499):
        alone = score.pair_scores(queries_QD, norms_Q, torch.tensor([1]), vectors_ND, torch.tensor([row]))
        assert alone[0] == together[row]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.floats(-1, 1, width=32), st.integers(0, 2**31 - 1)), min_size=1, max_size=30,
                unique_by=lambda pair: pair[1]))
def test_keys_order_hits_by_score_then_rank(pairs: list[tuple[float, int]]) -> None:
    import torch

    scores, ranks = (torch.tensor(column) for column in zip(*pairs))
    keys = score.pack(scores.float(), ranks)
    ordered = sorted(range(len(pairs)), key=lambda place: (-pairs[place][0], pairs[place][1]))
    assert torch.argsort(keys, descending=True).tolist() == ordered
    back_scores, back_ranks = score.unpack(keys)
    assert list(zip(back_scores.tolist(), back_ranks.tolist())) == pairs
    assert int(keys.min()) > score.NO_HIT


def test_no_hit_has_no_rank() -> None:
    import torch

    scores, ranks = score.unpack(torch.tensor([score.NO_HIT]))
    assert scores.tolist() == [-np.inf] and ranks.tolist() == [-1]
