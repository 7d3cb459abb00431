"""A stream of vectors, cut anew into pieces of one size, so that no result and no speed depends on how it
came.

A block is a tuple that begins with the number of its first row and ends with its vectors [N, D] (float16 or
float32); `pipeline.embeddings.Block` is one. Vectors are copied once where blocks are joined.

Shapes: N rows of a piece, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Piece = tuple[np.ndarray, np.ndarray]  # row numbers [N], vectors [N, D]


def regroup(blocks: Iterable[tuple[Any, ...]], rows_per_piece: int) -> Iterator[Piece]:
    """The same rows in the same order, in pieces of `rows_per_piece` (the last may be shorter)."""
    held: list[Piece] = []
    count = 0
    for block in blocks:
        first_row, vectors_ND = int(block[0]), block[-1]
        start = 0
        while start < len(vectors_ND):
            stop = min(start + rows_per_piece - count, len(vectors_ND))
            held.append((np.arange(first_row + start, first_row + stop), vectors_ND[start:stop]))
            count, start = count + stop - start, stop
            if count == rows_per_piece:
                piece, held, count = _joined(held), [], 0
                yield piece
    if held:
        yield _joined(held)


def _joined(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    rows, vectors = zip(*pieces, strict=True)
    return np.concatenate(rows), np.concatenate(vectors)


def as_tensor(vectors_ND: np.ndarray, device: str = "cpu") -> torch.Tensor:
    """The same memory as a tensor, moved to `device`; it may be read-only, and nothing here writes to it."""
    import torch

    assert vectors_ND.dtype in (np.float16, np.float32), vectors_ND.dtype
    return torch.from_dlpack(np.ascontiguousarray(vectors_ND)).to(device)
