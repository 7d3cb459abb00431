"""Ranks of ids, merging, recall."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.indexes import Hits, id_order, merge_hits, recall_against_exact
from pipeline.support.errors import UserError

TEXT = st.text(st.characters(codec="utf-8"), max_size=6)


@given(st.lists(TEXT, max_size=30, unique=True), st.integers(0, 30))
def test_id_order_is_by_code_points(ids: list[str], cut: int) -> None:
    chunked = pa.chunked_array([pa.array(ids[:cut], pa.string()), pa.array(ids[cut:], pa.string())])
    ranks = id_order(chunked)
    assert [ids[row] for row in np.argsort(ranks)] == sorted(ids)
    assert sorted(ranks.tolist()) == list(range(len(ids)))
    np.testing.assert_array_equal(id_order(pa.array(ids, pa.string())), ranks)


def test_a_repeated_or_missing_id_is_refused() -> None:
    with pytest.raises(UserError, match="(?s)2 candidate ids occur more than once.*first: b"):
        id_order(pa.array(["b", "a", "c", "b", "c"]))
    with pytest.raises(UserError, match="1 candidates have no candidate_id"):
        id_order(pa.array(["b", None]))


def hits_of(rows: list[list[int]], scores: list[list[float]], examined: int = 0) -> Hits:
    return Hits(np.array(rows, np.int64), np.array(scores, np.float32), examined)


def test_merging_orders_by_score_then_id_and_pads() -> None:
    first = hits_of([[1, 0, -1], [-1, -1, -1]], [[0.5, 0.25, -np.inf], [-np.inf] * 3], examined=3)
    second = hits_of([[0, 2], [1, -1]], [[0.5, -0.5], [-0.0, -np.inf]], examined=4)
    order_N = np.array([4, 3, 2, 1, 0])  # the member that comes second has the lower ids
    merged = merge_hits([(first, 0), (second, 2)], order_N, 3)
    assert merged.rows_QK.tolist() == [[2, 1, 0], [3, -1, -1]]
    assert merged.scores_QK.tolist() == [[0.5, 0.5, 0.25], [0.0, -np.inf, -np.inf]]
    assert merged.examined == 7
    assert merge_hits([(first, 0), (second, 2)], order_N, 6).rows_QK[0].tolist() == [2, 1, 0, 4, -1, -1]


def test_recall_against_exact() -> None:
    exact = hits_of([[5, 6, 7], [1, 2, -1], [-1, -1, -1]], [[3, 2, 1]] * 3)
    found = hits_of([[7, 6, 5], [2, 3, 1], [4, -1, -1]], [[3, 2, 1]] * 3)
    assert recall_against_exact(found, exact, 3) == 1.0
    assert recall_against_exact(found, exact, 2) == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert recall_against_exact(found, exact, 1) == pytest.approx((0 + 0 + 1) / 3)
