"""JSON put together by Arrow's string kernels: columns of text joined row by row, without Python per row.

Shapes: H rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.metrics.order import strings

SEPARATOR = b", "
LARGE = pa.large_string()  # a plain string array ends at 2 GiB


class Joined(NamedTuple):
    """JSON values one after the other, a separator behind each; `start_H` has the end as its last entry."""

    text: bytes
    start_H: np.ndarray

    def lists(self, edges: np.ndarray) -> Iterable[bytes]:
        """What stands between neighbouring edges (row numbers), the last separator of each stretch left out."""
        at = self.start_H[edges].tolist()
        return (self.text[begin:end].removesuffix(SEPARATOR) for begin, end in zip(at, at[1:]))


def quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def quoted_ids(ids: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Each id as a JSON string; Python sees each distinct one once."""
    encoded = strings(ids).dictionary_encode()
    return pa.array(map(quoted, encoded.dictionary.to_pylist()), LARGE).take(encoded.indices)


def number_text(numbers: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Numbers as JSON has them; a float32 in the fewest digits that give it again."""
    plain = numbers.combine_chunks() if isinstance(numbers, pa.ChunkedArray) else numbers
    return plain.cast(LARGE)


def concatenated(parts: Sequence[str | pa.Array]) -> pa.Array:
    """Row by row: a string stands in every row, an array gives each row its own."""
    columns = [pa.scalar(part, LARGE) if isinstance(part, str) else part for part in parts]
    return pc.binary_join_element_wise(*columns, pa.scalar("", LARGE))


def joined(values: pa.Array) -> Joined:
    """The values with separators, as one stretch of bytes."""
    text_H = concatenated([values, SEPARATOR.decode()])
    assert text_H.offset == 0, "a newly computed array starts at its buffers' start"
    _, offsets, text = text_H.buffers()
    start_H = np.frombuffer(offsets, np.int64)[:len(text_H) + 1] if len(text_H) else np.zeros(1, np.int64)
    return Joined(text.to_pybytes() if text else b"", start_H)
