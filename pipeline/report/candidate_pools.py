"""The candidates of a pool, or of a union's members, with their ids in memory: for many requests of many candidates.

5.6 million ids take a quarter of a gigabyte; everything else is read as `Collected` reads it.

Shapes: H hits, C distinct rows in ascending order, N rows of all pools.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa

from pipeline.artifacts import Artifact
from pipeline.metrics.order import positions
from pipeline.report.collected import Collected, Located, located
from pipeline.support.errors import UserError


class CandidatePools(Collected):
    """Get them by `of`, which holds the last two in memory for all that ask."""

    def __init__(self, pools: Located):
        super().__init__(pools, "candidate_id")
        columns = map(self.ids_of, range(len(self.shards)))
        self.ids = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())

    @staticmethod
    def of(pools: Sequence[Artifact]) -> CandidatePools:
        return _opened(located(*pools))

    def rows_of(self, candidate_ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """int32 [H]: the row of each candidate; UserError naming the first that is in none of the pools."""
        row_H = positions(candidate_ids, self.ids)
        if (row_H < 0).any():
            lost = candidate_ids[int((row_H < 0).argmax())]
            raise UserError(f"candidate {lost} of this run is in none of its pools",
                            do="the pools were collected anew: run `retrieve` again")
        return row_H

    def table(self, row_C: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """What `parts` gives as one table, dictionaries as plain strings."""
        parts = [_plain(part) for part in self.parts(row_C, columns)]
        return pa.concat_tables(parts) if parts else pa.table({name: pa.array([], pa.string()) for name in columns})


@lru_cache(maxsize=2)
def _opened(pools: Located) -> CandidatePools:
    return CandidatePools(pools)


def _plain(table: pa.Table) -> pa.Table:
    return pa.table({name: column.cast(pa.string()) for name, column in zip(table.column_names, table.columns)})
