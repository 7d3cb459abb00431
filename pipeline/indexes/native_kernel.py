"""The kernel in C++ (native.cpp): products, selection and float64 scores fused, while rows are in the nearest cache.

It keeps every row whose product is at most twice the error bound below the k-th best product seen: such a row, and no
other, may still be among the first k (coarse.py has the proof; products stay float32 here, so beta is 0). Hits of
earlier windows take part as the products that their scores stand for. A few queries are scored with every row in
float64 at once, which costs less than packing rows for them.

Shapes: N rows (W of a window), Q queries (B of a block), K hits, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from pipeline.indexes import coarse as coarse_pass
from pipeline.indexes.native import OVERFLOW, Native
from pipeline.indexes.search import Search
from pipeline.indexes.window import Sizes, Window, pairs_per_query

_FEW = 6
_TILE_ROWS, _PANEL = 16, 64  # as in native.cpp
_BYTES_PER_HIT = 8
_FEW_ROWS = 1024  # so few rows cannot overflow


class _Rows(NamedTuple):
    """Packed rows, as native.cpp lays them out, their bounds, and the norms of the stored vectors (float64)."""

    packed: np.ndarray
    norms_W: np.ndarray
    largest_norm: float
    largest_residual: float


@dataclass
class NativeKernel:
    native: Native
    _memory: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))

    @classmethod
    def can(cls, coarse: str, native: Native) -> bool:
        """Whether this machine's build forms products of that type."""
        return coarse in ("auto", "float32") or (coarse == "bfloat16" and native.has_bfloat16)

    def dtype(self, coarse: str, device: str) -> str:
        if coarse != "auto":
            return coarse
        return "bfloat16" if self.native.has_bfloat16 else "float32"

    def query_rows(self, sizes: Sizes, k: int, dimension: int) -> int:
        """An eighth of the memory for packed queries and for the hits that are held of them."""
        return max(_FEW, sizes.memory_bytes // 8 // (4 * dimension + 8 * k * _BYTES_PER_HIT))

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
        return True

    def _search(self, search: Search, window: Window, part: slice, first: int, last: int) -> int:
        """Search some rows of a window; the number of pairs that were scored, or OVERFLOW."""
        rows: _Rows = window.packed(search.dtype, partial(self._pack, search))
        bounds, is_narrow, threads = search.bounds(part, rows), search.dtype == "bfloat16", _threads()
        stored_BD, keys_BK = search.stored_QD[part], search.keys_QK[part]
        earlier_BK = bounds.products_of(search.scores_so_far(part))
        margins_B = np.nextafter((2 * bounds.error_Q).float().numpy(), np.float32(np.inf))
        vectors_WD = window.stored_WD[first:last]
        spare = 2**62 if last - first <= _FEW_ROWS else len(stored_BD) * pairs_per_query(search.k)
        return self.native(
            "search", rows.packed[first:], search.packed(part, partial(self._panels, search)), is_narrow, margins_B,
            earlier_BK, vectors_WD, _is_half(vectors_WD), rows.norms_W[first:], window.ranks_W[first:], last - first,
            stored_BD, _is_half(stored_BD), search.norms_Q[part], len(stored_BD), stored_BD.shape[1], search.k, spare,
            threads, keys_BK)

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
        vectors_WD, is_narrow = window.stored_WD, search.dtype == "bfloat16"
        norms_W, largest = self._norms(window), np.zeros(2, np.float32)
        row_bytes = self.native("packed_bytes", vectors_WD.shape[1], is_narrow)
        packed = self._reused(-(-len(vectors_WD) // _TILE_ROWS) * _TILE_ROWS * row_bytes).reshape(-1, row_bytes)
        self.native("pack_rows", vectors_WD, _is_half(vectors_WD), *vectors_WD.shape, norms_W, search.mean_D, is_narrow,
                    _threads(), packed, largest)
        norm, residual = (float(value) * coarse_pass.NORM_SLACK for value in largest)
        return _Rows(packed, norms_W, norm + residual, residual)

    def _reused(self, count: int) -> np.ndarray:
        """The same memory for every window: fresh pages cost as much as packing."""
        if len(self._memory) < count:
            self._memory = _aligned(count)
        return self._memory[:count]

    def _panels(self, search: Search, part: slice) -> np.ndarray:
        queries_BD, is_narrow = search.queries.vectors_QD[part].float(), search.dtype == "bfloat16"
        row_bytes = self.native("packed_bytes", queries_BD.shape[1], is_narrow)
        panels = _aligned(-(-len(queries_BD) // _PANEL) * _PANEL * row_bytes)
        self.native("pack_panels", queries_BD, *queries_BD.shape, is_narrow, _threads(), panels)
        return panels


def _aligned(count: int) -> np.ndarray:
    """Bytes that begin at a line of the cache, not cleared."""
    memory = np.empty(count + 64, np.uint8)
    return memory[-memory.ctypes.data % 64:][:count]


def _is_half(vectors: object) -> bool:
    return getattr(vectors, "itemsize") == 2


def _threads() -> int:
    import torch

    return torch.get_num_threads()
