"""A window of the exact search: the rows in memory, how many of them at once, and how they are made finer.

Shapes: N rows (W of a window, T of a tile, G groups of its columns), K hits, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np

if TYPE_CHECKING:
    import torch

Packed = TypeVar("Packed")

_TILE_ROWS = 8192  # products of about 1,000 x 8,192 run at full speed and their result stays in a large cache
_LARGEST_GROUP = 32
_LARGEST_WINDOW = 131_072  # larger ones save few float64 scores
_QUERY_ROWS = 1024
_PAIR_BYTES = 32  # a surviving pair: query, column and product, and what finding them takes


class Sizes(NamedTuple):
    """How much is worked on at once."""

    memory_bytes: int
    window_rows: int
    tile_rows: int
    query_rows: int

    @classmethod
    def within(cls, memory_bytes: int, dimension: int, k: int) -> Sizes:
        """Half of the memory for a window (read ahead, stored, joined, coarse), an eighth for a block of queries."""
        window = max(1, min(_LARGEST_WINDOW, memory_bytes // 2 // (16 * dimension)))
        tile = min(_TILE_ROWS, window)
        queries = memory_bytes // 8 // (_PAIR_BYTES * max(tile, pairs_per_query(k)))
        return cls(memory_bytes, window, tile, max(1, min(_QUERY_ROWS, queries)))


def pairs_per_query(k: int) -> int:
    """More survivors per query than this are not worth scoring: ordinary data leave two to five times k."""
    return max(1024, 8 * k)


@dataclass
class Window:
    """Rows held in memory: as they came, as a tensor on the device, and as a kernel wants them once it does."""

    vectors_WD: np.ndarray
    stored_WD: torch.Tensor
    ranks_W: torch.Tensor
    is_distinct: bool = False
    _packed: Any = None
    _dtype: str = ""

    def packed(self, dtype: str, pack: Callable[[Window], Packed]) -> Packed:
        """What `pack` makes of the window in this precision, made once."""
        if self._packed is None or self._dtype != dtype:
            self._packed, self._dtype = pack(self), dtype
        return cast(Packed, self._packed)

    def drop_surplus_copies(self, k: int) -> bool:
        """Keep, of rows with the same bytes, the k with the lowest ids; say whether any row went."""
        import torch

        self.is_distinct = True
        contiguous_WD = np.ascontiguousarray(self.vectors_WD)
        row_bytes_W = contiguous_WD.view(np.dtype((np.void, contiguous_WD[0].nbytes))).reshape(-1)
        _, group_W = np.unique(row_bytes_W, return_inverse=True)
        order_W = np.lexsort((self.ranks_W.cpu().numpy(), group_W))
        sizes = np.bincount(group_W)
        place_W = np.arange(len(order_W)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        kept = np.sort(order_W[place_W < k])
        if len(kept) == len(order_W):
            return False
        kept_on_device = torch.from_numpy(kept).to(self.stored_WD.device)
        self.vectors_WD, self._packed = contiguous_WD[kept], None
        self.stored_WD, self.ranks_W = self.stored_WD[kept_on_device], self.ranks_W[kept_on_device]
        return True


def tiles(rows: int, tile_rows: int, k: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, groups): tiles whose columns split evenly into groups, at least 2 k if there are so many.

    A remainder that does not split evenly is a small tile of its own.
    """
    for start in range(0, rows, tile_rows):
        stop = min(start + tile_rows, rows)
        size = max(1, min(_LARGEST_GROUP, (stop - start) // (2 * k)))
        groups = (stop - start) // size
        yield start, start + groups * size, groups
        if start + groups * size < stop:
            yield start + groups * size, stop, stop - start - groups * size
