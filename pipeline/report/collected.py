"""Rows of collected tables by number or by id. Numbers count over the shards of all tables given, as a search of these
pools numbers its rows.

Of the shards that a request touches, each once, only the columns and rows asked for are kept: memory does not grow
with the size of a pool, and nothing is remembered between requests.

Shapes: C distinct rows in ascending order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import Artifact
from pipeline.embeddings import read_table
from pipeline.plan import manifest_of

Located = tuple[tuple[Path, str], ...]


def located(*tables: Artifact) -> Located:
    """Where tables are, and their fingerprints."""
    return tuple((table.directory, table.fingerprint) for table in tables)


class Collected:
    """Complete tables; `key` is their column of ids. Whatever reads raises UserError as `read_table` does."""

    def __init__(self, tables: Located, key: str):
        self.key = key
        found = [(directory / shard["file"], fingerprint, shard["rows"]) for directory, fingerprint in tables
                 for shard in manifest_of(directory)["shards"]]
        self.shards = [(path, fingerprint) for path, fingerprint, _ in found]
        self.first_rows = np.cumsum([0, *(rows for _, _, rows in found)])

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def ids_of(self, shard: int) -> pa.ChunkedArray:
        return read_table(*self.shards[shard], [self.key])[self.key]

    def rows_by_id(self, ids: Iterable[str]) -> dict[str, int]:
        """The number of each id's row; those that are nowhere are left out."""
        wanted = pa.array(sorted(set(ids)), pa.string())
        found: dict[str, int] = {}
        for shard, first in enumerate(self.first_rows[:-1].tolist()):
            if len(found) == len(wanted):
                break
            column = self.ids_of(shard)
            places = pc.indices_nonzero(pc.is_in(column, value_set=wanted))
            found.update(zip(column.take(places).to_pylist(), (first + place for place in places.to_pylist())))
        return found

    def places(self, row_C: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The shards that have some of these rows, and which of their own rows these are."""
        for shard, (first, last) in enumerate(zip(self.first_rows, self.first_rows[1:])):
            start, end = np.searchsorted(row_C, [first, last])
            if start < end:
                yield shard, row_C[start:end] - first

    def parts(self, row_C: np.ndarray, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """These columns (all of them) of the rows, one table per shard that has some."""
        for shard, place_C in self.places(row_C):
            yield read_table(*self.shards[shard], columns).take(pa.array(place_C))
