"""Identifiers as numbers of 64 bits: a hash in the upper 40, zeros below, where a place in a row finds room.

Equal identifiers have equal hashes, whatever array they stand in; whoever finds equal hashes has to look whether the
identifiers are equal too, or takes exact numbers from the start, which cost ten times as much.

Shapes: N identifiers, W words of eight bytes, C chunks.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.metrics.order import strings

ONE = np.uint64(1 << 24)  # the least number but zero
ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio (Knuth, The Art of Computer Programming, 6.4)
_WASTE = 4  # padding may make an array so many times longer, no more


def hashes(ids: pa.Array) -> np.ndarray:
    """uint64 [N]: the top bits of a sum of each string's words times odd numbers (Dietzfelbinger, STACS 1996)."""
    length_N = pc.binary_length(ids).to_numpy()
    width = 8 * max(1, -(-int(length_N.max(initial=0)) // 8))
    if len(ids) > 1 and width * len(ids) > _WASTE * (int(length_N.sum()) + 8 * len(ids)):
        half = len(ids) // 2  # one long identifier shall not widen all the others
        return np.concatenate([hashes(ids[:half]), hashes(ids[half:])])
    padded = pc.ascii_rpad(ids, width, "\0").buffers()[2]
    words_NW = np.frombuffer(padded, np.uint64, len(ids) * width // 8).reshape(len(ids), width // 8)
    total_N = words_NW[:, 0] * np.uint64(ODD)
    for word in range(1, words_NW.shape[1]):
        total_N += words_NW[:, word] * np.uint64(pow(ODD, word + 1, 1 << 64))
    total_N &= ~(ONE - np.uint64(1))
    return total_N


def exact_numbers(ids: pa.Array) -> np.ndarray:
    """uint64 [N]: equal numbers for equal strings, different ones for different strings, of this array only."""
    return np.asarray(ids.dictionary_encode().indices.to_numpy(), np.uint64) * ONE


class Numbered:
    """A column of identifiers that is read in stretches; a dictionary is hashed once, not once per stretch."""

    def __init__(self, column: pa.ChunkedArray):
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._column = pa.chunked_array(chunks, column.type)
        self._end_C = np.cumsum([len(chunk) for chunk in chunks])
        self._dictionaries = [hashes(strings(chunk.dictionary)) if _has_short_dictionary(chunk) else None
                              for chunk in chunks]

    def hashes(self, first: int, length: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._end_C, first, side="right"))
        pieces = self._column.slice(first, length).chunks
        numbers = [hashes(strings(piece)) if number_D is None else number_D.take(piece.indices.to_numpy())
                   for piece, number_D in zip(pieces, self._dictionaries[chunk:])]
        return numbers[0] if len(numbers) == 1 else np.concatenate(numbers)

    def strings(self, first: int, length: int, some_N: np.ndarray | None = None) -> pa.Array:
        """Those of a stretch, or some of them, counted from `first`: then only these are decoded."""
        stretch = self._column.slice(first, length)
        if some_N is None:
            return strings(stretch)
        one = stretch.chunk(0) if stretch.num_chunks == 1 else strings(stretch)
        return strings(one.take(pa.array(some_N)))


def _has_short_dictionary(chunk: pa.Array) -> bool:
    return isinstance(chunk, pa.DictionaryArray) and len(chunk.dictionary) <= len(chunk)
