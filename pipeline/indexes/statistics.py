"""Statistics of a pool, taken in one pass by the index stage: what the exact search wants to know beforehand.

The mean of the unit vectors is the important one: subtracting it from every candidate changes no ranking
and makes the coarse pass far sharper where embeddings sit in a narrow cone. Components are rounded to
multiples of 2^-24 before they are added, so sums in float64 are exact and do not depend on blocks, on their
order, or on how a union is merged.

Shapes: N rows of a block, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.indexes import native, score
from pipeline.indexes.blocks import as_tensor
from pipeline.indexes.parallel import in_pieces
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    import torch

_GRAIN = 2.0**24
_WORTH_COMPILING = 1e9  # components of a block: some seconds, as long as compiling takes
_MOST_ROWS = 2**29  # 2^29 components below 1, in grains of 2^-24, are exact in float64's 53 bits


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of `rows` vectors of `dimension`: the sum of the unit vectors, and how many vectors are zero."""

    rows: int
    dimension: int
    zero_vectors: int
    sum_of_unit_vectors_D: np.ndarray

    @classmethod
    def of(cls, blocks: Iterable[tuple[int, Any, np.ndarray]], dimension: int) -> Statistics:
        """Of a stream of (first row, ids, vectors [N, D]); UserError naming an id that is not finite."""
        rows = zeros = 0
        total_D = np.zeros(dimension, np.float64)
        for _, ids, vectors_ND in blocks:
            assert vectors_ND.shape[1] == dimension, (vectors_ND.shape, dimension)
            sum_D, block_zeros = _sum_of_units(vectors_ND, ids)
            total_D += sum_D
            zeros += block_zeros
            rows += len(vectors_ND)
        assert rows < _MOST_ROWS, rows
        return cls(rows, dimension, zeros, total_D)

    @classmethod
    def merged(cls, parts: Sequence[Statistics]) -> Statistics:
        """The statistics of the union of `parts`, in whatever order they come."""
        dimensions = {part.dimension for part in parts}
        assert len(dimensions) == 1, dimensions
        total_D = np.sum([part.sum_of_unit_vectors_D for part in parts], axis=0)
        rows, zeros = sum(part.rows for part in parts), sum(part.zero_vectors for part in parts)
        return cls(rows, dimensions.pop(), zeros, total_D)

    @property
    def mean_D(self) -> np.ndarray:
        """The mean unit vector, float32."""
        return (self.sum_of_unit_vectors_D / max(1, self.rows)).astype(np.float32)

    def save(self, path: Path) -> None:
        with path.open("wb") as file:  # np.savez would add .npz to the name of a temporary file
            np.savez(file, rows=self.rows, zero_vectors=self.zero_vectors,
                     sum_of_unit_vectors=self.sum_of_unit_vectors_D)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """UserError if the file is missing or damaged."""
        try:
            with np.load(path) as saved:
                total_D = saved["sum_of_unit_vectors"]
                return cls(int(saved["rows"]), len(total_D), int(saved["zero_vectors"]), total_D)
        except Exception as error:  # a damaged archive fails in as many ways as it has bytes
            raise UserError(f"the statistics of this index cannot be read ({type(error).__name__})",
                            str(path), f"make them again: rm -r {path.parent}") from error


def _sum_of_units(vectors_ND: np.ndarray, ids: Any) -> tuple[np.ndarray, int]:
    """The sum of the unit vectors in grains of 2^-24 [D], and the number of zero vectors."""
    import torch

    stored_ND = as_tensor(vectors_ND)
    library, threads = native.load_if(vectors_ND.size > _WORTH_COMPILING), torch.get_num_threads()
    shape = (stored_ND, vectors_ND.itemsize == 2, *vectors_ND.shape)
    if library is None:
        norms_N = score.norms(stored_ND)
    else:
        norms_N = torch.empty(len(stored_ND), dtype=torch.float64)
        library("norms", *shape, threads, norms_N)
    refuse_unless_finite(norms_N.numpy(), ids)
    total_D = torch.zeros(stored_ND.shape[1], dtype=torch.float64)
    if library is None:
        total_D = sum(in_pieces(partial(_sum_of_piece, stored_ND, norms_N), len(stored_ND), stored_ND.device), total_D)
    else:
        library("sum_of_units", *shape, norms_N, _GRAIN, threads, total_D)
    return (total_D / _GRAIN).numpy(), int((norms_N == 0).sum())


def _sum_of_piece(stored_ND: torch.Tensor, norms_N: torch.Tensor, piece: slice) -> torch.Tensor:
    # a zero vector divided by 1 stays zero, and adds nothing
    scale_N = norms_N[piece].masked_fill(norms_N[piece] == 0, 1.0)
    units_ND = stored_ND[piece].double().div_(scale_N[:, None])
    return units_ND.mul_(_GRAIN).round_().sum(dim=0)


def refuse_unless_finite(norms_N: np.ndarray, ids: Any) -> None:
    """UserError naming the first id whose vector holds NaN or infinity."""
    broken_N = ~np.isfinite(norms_N)
    if broken_N.any():
        raise UserError(f"{int(broken_N.sum())} of {len(norms_N)} vectors hold NaN or infinity",
                        f"first: {ids[int(broken_N.argmax())]}",
                        "embed them again; check the weights and embed.precision")
