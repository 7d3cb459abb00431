"""The candidates of a pool, or of a union's members, by row number over all their shards.

Ids are held (5.6 million take a quarter of a gigabyte); everything else is read from the shards that a request
touches, each once per request.

Shapes: H hits, C distinct rows in ascending order, N rows of all pools.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.artifacts import Artifact
from pipeline.embeddings import read_table
from pipeline.metrics.order import positions
from pipeline.plan import manifest_of
from pipeline.support.errors import UserError


class CandidatePools:
    """Pools by directory and fingerprint; get them by `of`, which holds the last two in memory for all that ask."""

    def __init__(self, pools: Sequence[tuple[Path, str]]):
        self.shards = [(directory / shard["file"], fingerprint) for directory, fingerprint in pools
                       for shard in manifest_of(directory)["shards"]]
        columns = [read_table(path, fingerprint, ["candidate_id"])["candidate_id"] for path, fingerprint in self.shards]
        self.first_rows = np.cumsum([0, *map(len, columns)])
        self.ids = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())

    @staticmethod
    def of(pools: Sequence[Artifact]) -> CandidatePools:
        return _opened(tuple((pool.directory, pool.fingerprint) for pool in pools))

    def rows_of(self, candidate_ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """int32 [H]: the row of each candidate; UserError naming the first that is in none of the pools."""
        row_H = positions(candidate_ids, self.ids)
        if (row_H < 0).any():
            lost = candidate_ids[int((row_H < 0).argmax())]
            raise UserError(f"candidate {lost} of this run is in none of its pools",
                            do="the pools were collected anew: run `retrieve` again")
        return row_H

    def parts(self, row_C: np.ndarray, columns: Sequence[str]) -> Iterator[pa.Table]:
        """These columns of ascending rows, one table per shard that has some of them."""
        for (path, fingerprint), first, last in zip(self.shards, self.first_rows, self.first_rows[1:]):
            start, end = np.searchsorted(row_C, [first, last])
            if start < end:
                yield read_table(path, fingerprint, columns).take(pa.array(row_C[start:end] - first))

    def table(self, row_C: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """The same as one table, dictionaries as plain strings; UserError is that of `read_table`."""
        parts = [_plain(part) for part in self.parts(row_C, columns)]
        return pa.concat_tables(parts) if parts else pa.table({name: pa.array([], pa.string()) for name in columns})


@lru_cache(maxsize=2)
def _opened(pools: tuple[tuple[Path, str], ...]) -> CandidatePools:
    return CandidatePools(pools)


def _plain(table: pa.Table) -> pa.Table:
    return pa.table({name: column.cast(pa.string()) for name, column in zip(table.column_names, table.columns)})
