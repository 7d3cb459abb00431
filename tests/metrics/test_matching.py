"""Twins against a look at every row by itself, whatever the lengths of rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import matching
from pipeline.metrics.matching import Part, twins
from pipeline.metrics.identifiers import ONE

Rows = list[list[int]]

untimed = settings(deadline=None, max_examples=60)
row = st.lists(st.integers(0, 6), max_size=9)


def part(rows: Rows) -> Part:
    numbers = np.array([number for row in rows for number in row], np.uint64) * ONE
    return Part(numbers, np.array([len(row) for row in rows], np.int64))


def naive(tables: list[Rows]) -> set[tuple[int, int]]:
    """Positions of neighbours, row by row: sorted by number, then by part, then by place."""
    found, firsts = set(), [0] * len(tables)
    starts = [sum(len(row) for rows in tables[:number] for row in rows) for number in range(len(tables))]
    for rows in zip(*tables):
        entries = sorted((number, start + first + place) for row, start, first in zip(rows, starts, firsts)
                         for place, number in enumerate(row))
        found |= {(left[1], right[1]) for left, right in zip(entries, entries[1:]) if left[0] == right[0]}
        firsts = [first + len(row) for first, row in zip(firsts, rows)]
    return found


@untimed
@given(st.lists(st.tuples(row, row), max_size=8), st.integers(1, 2), st.sampled_from([0, 1, 4, 100]))
def test_twins_are_found_in_rows_of_any_length(rows: list[tuple[list[int], list[int]]], num_parts: int,
                                               waste: int) -> None:
    tables = [[both[number] for both in rows] for number in range(num_parts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_WASTE", waste)  # 0: every row alone
        left_T, right_T = twins([part(table) for table in tables])
    pairs = list(zip(left_T.tolist(), right_T.tolist()))
    assert len(set(pairs)) == len(pairs) and set(pairs) == naive(tables)


def test_the_last_of_a_row_and_the_first_of_the_next_are_strangers() -> None:
    left_T, right_T = twins([part([[3], [3], [3]])])
    assert len(left_T) == len(right_T) == 0


def test_a_number_that_looks_like_padding_is_shown_as_such() -> None:
    padding = ((1 << 40) - 2) << 24  # that of place 1
    left_T, right_T = twins([Part(np.array([padding, 2 << 24, 3 << 24], np.uint64), np.array([1, 2]))])
    assert (left_T.tolist(), right_T.tolist()) == ([0], [-1])


def test_one_long_row_does_not_widen_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    write = matching._sorted_keys

    def noting(parts: list[Part], num_rows: int, width: int) -> np.ndarray:
        sizes.append(num_rows * width)
        return write(parts, num_rows, width)

    monkeypatch.setattr(matching, "_sorted_keys", noting)
    rows = [[1, 2]] * 500 + [[*range(3000), 7]] + [[1, 2]] * 500
    left_T, right_T = twins([part(rows)])
    assert (left_T.tolist(), right_T.tolist()) == ([1007], [4000])
    assert sum(sizes) < 5 * sum(map(len, rows)) + 4 * len(rows)
