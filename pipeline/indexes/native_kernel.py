"""The kernel in C++ (native.cpp): products, selection and float64 scores fused, while rows are in the nearest cache.

It keeps every row whose product is at most twice the error bound below the k-th best product seen: such a row, and no
other, may still be among the first k (coarse.py has the proof; products stay float32 here, so beta is 0). Hits of
earlier windows take part as the products that their scores stand for. What was kept is scored in float64, the best
products first, until none is left that could still get in. A few queries are scored with every row at once, which costs
less than packing rows for them.

With int8, the component along the mean's direction d is taken out of queries and rows, <q, x> = <q, d> <d, x> +
<r, y>, and what is left is turned (native.cpp) and rounded to bytes in steps of its own. That is four times the
products of float32 at the price of a larger error, so each row's own, |r| |y - y'|, is reckoned with instead of the
largest. Where so much is kept that scoring it costs more than bytes save, the search goes on in bfloat16 or float32.

Shapes: N rows (W of a window), Q queries (B of a block), K hits, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.indexes import coarse as coarse_pass
from pipeline.indexes.native import OVERFLOW, Native
from pipeline.indexes.search import Search
from pipeline.indexes.window import Sizes, Window, pairs_per_query

if TYPE_CHECKING:
    import torch

_FEW = 6
_TILE_ROWS, _PANEL = 16, 64  # as in native.cpp
_BYTES_PER_HIT = 12
_HITS = {"int8": 3, "bfloat16": 1, "float32": 1}  # that may be held of a query, times pairs_per_query
_FEW_ROWS = 1024  # so few rows cannot overflow
_KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}
_DEAR = 150  # a float64 score costs as much as what int8 saves over bfloat16 on so many rows


class _Rows(NamedTuple):
    """Packed rows, as native.cpp lays them out, their bounds, and the norms of the stored vectors (float64).

    Of bytes also `facts_W3`, padded to a tile (step, what was lost, component left out); `largest_residual` is then 0.
    """

    packed: np.ndarray
    norms_W: np.ndarray
    largest_norm: float
    largest_residual: float
    facts_W3: np.ndarray


class _Panels(NamedTuple):
    """Packed queries, and what they lost by it; of bytes also `facts_5B`, padded to a panel (native.cpp)."""

    packed: np.ndarray
    lost_B: torch.Tensor
    facts_5B: np.ndarray


@dataclass
class NativeKernel:
    native: Native
    _memory: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))

    @classmethod
    def can(cls, coarse: str, native: Native) -> bool:
        """Whether this machine's build forms products of that type."""
        return coarse == "auto" or coarse in native.numbers

    def dtype(self, coarse: str, device: str) -> str:
        return self.native.numbers[0] if coarse == "auto" else coarse

    def finer(self, dtype: str) -> str | None:
        return next(iter(self.native.numbers[self.native.numbers.index(dtype) + 1:]), None)

    def query_rows(self, sizes: Sizes, k: int, dimension: int) -> int:
        """An eighth of the memory for packed queries and for the hits that are held of them."""
        hits = max(_HITS[number] for number in self.native.numbers) * pairs_per_query(k)
        return max(_FEW, sizes.memory_bytes // 8 // (4 * dimension + hits * _BYTES_PER_HIT))

    def attempt(self, search: Search, window: Window, part: slice) -> bool:
        if len(search.stored_QD[part]) <= _FEW:
            self._few(search, window, part)
            return True
        ranges = [(0, len(window.stored_WD))]
        while ranges:
            first, last = ranges.pop()
            found = self._search(search, window, part, first, last)
            if found == OVERFLOW:
                if search.refine(window):
                    return False
                middle = (first + last) // 2 // _TILE_ROWS * _TILE_ROWS
                ranges += [(middle, last), (first, middle)]
            else:
                search.examined += found
                worth = len(search.stored_QD[part]) * (search.k + (last - first) // _DEAR)
                if search.dtype == "int8" and found > worth:
                    search.refine_product()
        return True

    def _search(self, search: Search, window: Window, part: slice, first: int, last: int) -> int:
        """Search some rows of a window; the number of pairs that were scored, or OVERFLOW."""
        rows: _Rows = window.packed(search.dtype, partial(self._pack, search))
        panels: _Panels = search.packed(part, partial(self._panels, search))
        bounds, stored_BD = search.bounds(part, rows, lost_Q=panels.lost_B), search.stored_QD[part]
        earlier_BK = bounds.products_of(search.scores_so_far(part))
        margins_B = np.nextafter((2 * bounds.error_Q).float().numpy(), np.float32(np.inf))
        vectors_WD = window.stored_WD[first:last]
        most = len(stored_BD) * _HITS[search.dtype] * pairs_per_query(search.k)
        return self.native(
            "search", rows.packed[first:], rows.facts_W3[first:], panels.packed, panels.facts_5B, _KINDS[search.dtype],
            margins_B, earlier_BK, bounds.highest_above_Q, vectors_WD, _is_half(vectors_WD), rows.norms_W[first:],
            window.ranks_W[first:], last - first, stored_BD, _is_half(stored_BD), search.norms_Q[part], len(stored_BD),
            stored_BD.shape[1], search.k, 2**62 if last - first <= _FEW_ROWS else most, _threads(),
            search.keys_QK[part])

    def _few(self, search: Search, window: Window, part: slice) -> None:
        queries_BD, vectors_WD = search.stored_QD[part], window.stored_WD
        search.examined += self.native(
            "search_few", vectors_WD, _is_half(vectors_WD), self._norms(window), window.ranks_W, len(vectors_WD),
            queries_BD, _is_half(queries_BD), search.norms_Q[part], len(queries_BD), queries_BD.shape[1], search.k,
            _threads(), search.keys_QK[part])

    def _norms(self, window: Window) -> np.ndarray:
        import torch

        vectors_WD = window.stored_WD
        norms_W = np.empty(len(vectors_WD))
        self.native("norms", vectors_WD, _is_half(vectors_WD), *vectors_WD.shape, _threads(), norms_W)
        coarse_pass.refuse_unless_finite(torch.from_numpy(norms_W))
        return norms_W

    def _pack(self, search: Search, window: Window) -> _Rows:
        vectors_WD, kind = window.stored_WD, _KINDS[search.dtype]
        norms_W, largest = self._norms(window), np.zeros(2, np.float32)
        row_bytes = self.native("packed_bytes", vectors_WD.shape[1], kind)
        count = _padded(len(vectors_WD), _TILE_ROWS)
        packed = self._reused(count * row_bytes).reshape(-1, row_bytes)
        facts_W3 = np.zeros((count, 3), np.float32)
        self.native("pack_rows", vectors_WD, _is_half(vectors_WD), *vectors_WD.shape, norms_W, search.mean_D,
                    _direction(search.mean_D), kind, _threads(), packed, facts_W3, largest)
        norm, residual = (float(value) * coarse_pass.NORM_SLACK for value in largest)
        facts_W3[:, 1] *= np.float32(coarse_pass.NORM_SLACK)
        return _Rows(packed, norms_W, norm + residual, 0.0 if search.dtype == "int8" else residual, facts_W3)

    def _reused(self, count: int) -> np.ndarray:
        """The same memory for every window: fresh pages cost as much as packing."""
        if len(self._memory) < count:
            self._memory = _aligned(count)
        return self._memory[:count]

    def _panels(self, search: Search, part: slice) -> _Panels:
        import torch

        queries_BD, kind = search.queries.vectors_QD[part].float(), _KINDS[search.dtype]
        count = _padded(len(queries_BD), _PANEL)
        packed = _aligned(count * self.native("packed_bytes", queries_BD.shape[1], kind))
        facts_5B = np.zeros((5, count), np.float32)
        self.native("pack_panels", queries_BD, *queries_BD.shape, _direction(search.mean_D), kind, _threads(), packed,
                    facts_5B)
        facts_5B[[1, 3]] *= np.float32(coarse_pass.NORM_SLACK)
        lost_B = torch.from_numpy(facts_5B[1, :len(queries_BD)]).double()
        rounding = _rounding_of_bytes(queries_BD.shape[1]) if search.dtype == "int8" else 0.0
        return _Panels(packed, lost_B + rounding, facts_5B)


def _rounding_of_bytes(dimension: int) -> float:
    """How far a product of bytes can be off by float32 arithmetic alone, over the largest norm.

    A row and a query, turned, take 40 roundings at most; the direction's lack of norm 1, 8; the sum as a float32, its
    products, and what is added to it and taken off, 16; a component along the direction D / 32 + 20 (native.cpp).
    """
    return (128 + dimension / 8) * 2.0**-24


def _direction(mean_D: torch.Tensor) -> torch.Tensor:
    """The mean's, along which bytes need tell nothing, of norm 1 within 2^-22; zeros if it has none."""
    wide_D = mean_D.double()
    norm = wide_D.norm()
    return (wide_D / norm if norm > 1e-6 else 0 * wide_D).float()


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _aligned(count: int) -> np.ndarray:
    """Bytes that begin at a line of the cache, not cleared."""
    memory = np.empty(count + 64, np.uint8)
    return memory[-memory.ctypes.data % 64:][:count]


def _is_half(vectors: object) -> bool:
    return getattr(vectors, "itemsize") == 2


def _threads() -> int:
    import torch

    return torch.get_num_threads()
