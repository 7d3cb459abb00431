"""Rows of collected tables one at a time, as somebody who looks around asks for them: the last shards stay in memory,
and a mistyped id is answered with those that it may be."""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.embeddings import read_table
from pipeline.look.cells import Cell
from pipeline.report.collected import Collected, located
from pipeline.support.errors import UserError, nearest

_KEPT_SHARDS = 16
_COMPARED = 1000  # ids that are compared letter by letter with a mistyped one


def contents_of(cell: Cell) -> tuple[Contents, Contents]:
    """Its queries, and its candidates in the order in which a search numbers their rows."""
    pools = located(*(pool.table for pool in cell.pools))
    return Contents(located(cell.queries.table), "query_id"), Contents(pools, "candidate_id")


class Contents(Collected):
    """What `Collected` promises, and a row at a time."""

    def shard_of(self, row: int) -> int:
        return int(np.searchsorted(self.first_rows, row, side="right")) - 1

    def row(self, number: int) -> dict[str, Any]:
        shard = self.shard_of(number)
        place = number - int(self.first_rows[shard])
        values: dict[str, Any] = _table(*self.shards[shard]).slice(place, 1).to_pylist()[0]
        return values

    def row_number(self, identifier: str) -> int:
        """UserError with the nearest ids if there is none of this name."""
        found = self.rows_by_id([identifier])
        if identifier not in found:
            what = f"there is no {self.key} '{identifier}' among {len(self):,}"
            raise UserError(what, None, self._nearest(identifier))
        return found[identifier]

    def _nearest(self, identifier: str) -> str:
        """Comparing every id of a large task letter by letter would take minutes: those that look alike are."""
        ids = sorted(name for shard in range(len(self.shards)) for name in self.ids_of(shard).to_pylist())
        place = bisect_left(ids, identifier)
        alike = [name for name in ids if identifier in name or name in identifier]
        around = ids[max(0, place - _COMPARED // 2):place + _COMPARED // 2]
        return nearest(identifier, dict.fromkeys([*alike[:_COMPARED], *around])) or f"the first is {ids[0]}"


@lru_cache(maxsize=_KEPT_SHARDS)
def _table(path: Path, fingerprint: str) -> pa.Table:
    return read_table(path, fingerprint)
