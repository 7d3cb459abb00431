"""Which numbers stand in a row twice? Found by sorting each row, which brings them side by side.

Sorting short rows of numbers costs a nanosecond or two per number, less than any table to look them up in.

Shapes: N numbers, S rows, L places in a row, T twins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.metrics.identifiers import ONE

_PLACE_BITS = 23  # below ONE are 24: the topmost tells the second part from the first
_WASTE = 4  # padding may make an array so many times longer, no more


class Part(NamedTuple):
    """A stretch of every row, row after row: row i has the next count_S[i] of number_N."""

    number_N: np.ndarray
    count_S: np.ndarray

    @property
    def width(self) -> int:
        return int(self.count_S.max(initial=0))

    def rows(self, first: int, last: int) -> Part:
        before, within = int(self.count_S[:first].sum()), int(self.count_S[first:last].sum())
        return Part(self.number_N[before:before + within], self.count_S[first:last])


def twins(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """(left_T, right_T): neighbours with the same number in the sorted rows that one or two parts make side by side.

    Each is a position in the parts' numbers, those of the second part behind those of the first; of three equal
    ones the middle stands in two pairs. -1 is padding that happens to look like a number.
    """
    assert len(parts) <= 2 and all(part.width < 1 << _PLACE_BITS for part in parts), "places have 23 bits"
    row_T, left_T, right_T = _twins(parts)
    return _positions(parts, row_T, left_T), _positions(parts, row_T, right_T)


def _twins(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Their row and the place of both."""
    num_rows, width = len(parts[0].count_S), sum(part.width for part in parts)
    if num_rows > 1 and num_rows * width > _WASTE * (num_rows + sum(len(part.number_N) for part in parts)):
        half = num_rows // 2  # one long row shall not widen all the others
        above, below = (_twins([part.rows(*rows) for part in parts]) for rows in ((0, half), (half, num_rows)))
        row_T, left_T, right_T = map(np.concatenate, zip(above, (below[0] + half, *below[1:])))
        return row_T, left_T, right_T
    key_N = _sorted_keys(parts, num_rows, width).reshape(-1)
    at_T = np.flatnonzero((key_N[1:] ^ key_N[:-1]) < ONE)
    row_T, column_T = np.divmod(at_T, max(width, 1))
    is_within_row_T = column_T < width - 1  # the last of a row and the first of the next are strangers
    row_T, at_T = row_T[is_within_row_T], at_T[is_within_row_T]
    left_T, right_T = ((key_N[where] % ONE).astype(np.int64) for where in (at_T, at_T + 1))
    return row_T, left_T, right_T


def _sorted_keys(parts: Sequence[Part], num_rows: int, width: int) -> np.ndarray:
    """uint64 [S, L]: the numbers of each row, each with its place in the lower bits, in ascending order."""
    key_SL = np.empty((num_rows, width), np.uint64)
    first = 0
    for number, part in enumerate(parts):
        place_L = np.arange(part.width, dtype=np.uint64) + np.uint64(number << _PLACE_BITS)
        _write_keys(part, place_L, key_SL[:, first:first + part.width])
        first += part.width
    key_SL.sort(axis=1)
    return key_SL


def _write_keys(part: Part, place_L: np.ndarray, key_SL: np.ndarray) -> None:
    """Shorter rows are padded with numbers that no other place has, from the greatest down."""
    if len(part.number_N) == key_SL.size:
        np.add(part.number_N.reshape(key_SL.shape), place_L, out=key_SL)
    else:
        key_SL[:] = ~place_L * ONE
        key_SL[np.arange(len(place_L)) < part.count_S[:, None]] = part.number_N
        key_SL += place_L


def _positions(parts: Sequence[Part], row_T: np.ndarray, place_T: np.ndarray) -> np.ndarray:
    """Where in the parts' numbers stands what has that place in that row."""
    number_T, place_T = np.divmod(place_T, 1 << _PLACE_BITS)
    position_T = np.full(len(row_T), -1)
    offset = 0
    for number, part in enumerate(parts):
        is_here_T = (number_T == number) & (place_T < part.count_S[row_T])
        start_S = np.cumsum(part.count_S) - part.count_S + offset
        position_T[is_here_T] = (start_S[row_T] + place_T)[is_here_T]
        offset += len(part.number_N)
    return position_T
