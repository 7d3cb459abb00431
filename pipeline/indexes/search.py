"""The state of an exact search, and when a window of it is refined.

Shapes: W rows of a window, Q queries, K hits, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from pipeline.indexes import coarse as coarse_pass
from pipeline.indexes import score
from pipeline.indexes.window import Packed, Sizes, Window

if TYPE_CHECKING:
    import torch


class Kernel(Protocol):
    """How a window is searched."""

    def dtype(self, coarse: str, device: str) -> str:
        """The type of the coarse product that `coarse` ("auto" or a type) stands for."""

    def finer(self, dtype: str) -> str | None:
        """The next finer type of product; None if there is none."""

    def query_rows(self, sizes: Sizes, k: int, dimension: int) -> int:
        """How many queries to search at once."""

    def attempt(self, search: Search, window: Window, part: slice) -> bool:
        """Merge a window's best into the keys of a block of queries.

        False, with nothing changed but the window or the search made finer (`Search.refine`), if too much survived.
        """


@dataclass
class Search:
    """Queries, none of them zero, and the keys of the best of each so far."""

    stored_QD: torch.Tensor
    norms_Q: torch.Tensor
    k: int
    mean_D: torch.Tensor
    coarse: str
    kernel: Kernel
    sizes: Sizes
    examined: int = 0
    keys_QK: torch.Tensor = field(init=False)
    dtype: str = field(init=False)
    queries: coarse_pass.CoarseQueries = field(init=False)
    _packed: dict[int, Any] = field(init=False)

    def __post_init__(self) -> None:
        import torch

        device = self.stored_QD.device
        self.keys_QK = torch.full((len(self.stored_QD), self.k), score.NO_HIT, device=device)
        self._choose(self.kernel.dtype(self.coarse, str(device)))

    def _choose(self, dtype: str) -> None:
        self.dtype, self._packed = dtype, {}
        self.queries = coarse_pass.coarse_queries(self.stored_QD, self.norms_Q, self.mean_D, dtype)

    def window(self, window: Window) -> None:
        """Search a window for all queries, refining it while too much survives."""
        step = self.kernel.query_rows(self.sizes, self.k, self.stored_QD.shape[1])
        for start in range(0, len(self.stored_QD), step):
            while not self.kernel.attempt(self, window, slice(start, start + step)):
                pass

    def packed(self, part: slice, pack: Callable[[slice], Packed]) -> Packed:
        """What `pack` makes of a block of queries in the present precision, made once."""
        if part.start not in self._packed:
            self._packed[part.start] = pack(part)
        return cast(Packed, self._packed[part.start])

    def bounds(self, part: slice, rows: coarse_pass.RowBounds, beta: float = 0.0,
               lost_Q: torch.Tensor | float = 0.0) -> coarse_pass.Bounds:
        return coarse_pass.Bounds(self.queries, part, rows, beta, lost_Q)

    def scores_so_far(self, part: slice) -> torch.Tensor:
        """float32 [B, K], -inf where there is no hit yet."""
        return score.unpack(self.keys_QK[part])[0]

    def refine(self, window: Window) -> bool:
        """Make the window or the product finer; False if that has been done."""
        return (not window.is_distinct and window.drop_surplus_copies(self.k)) or self.refine_product()

    def refine_product(self) -> bool:
        """Make the product finer from here on; False if it is the finest, or the one that was asked for."""
        finer = self.kernel.finer(self.dtype) if self.coarse == "auto" else None
        if finer is not None:
            self._choose(finer)
        return finer is not None
