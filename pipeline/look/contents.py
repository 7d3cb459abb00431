"""Rows of collected tables by id or by number, read shard by shard: few are in memory, whatever the size of a pool.

A row's number counts over the shards of all tables given, as a search of these pools numbers its rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import Artifact
from pipeline.embeddings import read_table
from pipeline.plan import manifest_of
from pipeline.support.errors import UserError, nearest

_KEPT_SHARDS = 16
_COMPARED = 1000  # ids that are compared letter by letter with a mistyped one


class Contents:
    """`key` is the column of ids."""

    def __init__(self, tables: Sequence[Artifact], key: str):
        self.key = key
        self.shards = [(table.path(shard["file"]), table.fingerprint, shard["rows"])
                       for table in tables for shard in manifest_of(table.directory)["shards"]]
        self.first_rows = np.cumsum([0, *(rows for _, _, rows in self.shards)])

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def shard_of(self, row: int) -> int:
        return int(np.searchsorted(self.first_rows, row, side="right")) - 1

    def rows_of(self, ids: Iterable[str]) -> dict[str, int]:
        """The number of each id's row; those that are nowhere are left out."""
        wanted = pa.array(sorted(set(ids)), pa.string())
        found: dict[str, int] = {}
        for (path, fingerprint, _), first in zip(self.shards, self.first_rows.tolist()):
            if len(found) == len(wanted):
                break
            column = read_table(path, fingerprint, [self.key])[self.key]
            places = pc.indices_nonzero(pc.is_in(column, value_set=wanted))
            names = column.take(places).to_pylist()
            found.update(zip(names, (first + place for place in places.to_pylist())))
        return found

    def row(self, number: int) -> dict[str, Any]:
        shard = self.shard_of(number)
        path, fingerprint, _ = self.shards[shard]
        values: dict[str, Any] = _table(path, fingerprint).slice(number - int(self.first_rows[shard]), 1).to_pylist()[0]
        return values

    def row_number(self, identifier: str) -> int:
        """UserError with the nearest ids if there is none of this name."""
        found = self.rows_of([identifier])
        if identifier not in found:
            what = f"there is no {self.key} '{identifier}' among {len(self):,}"
            raise UserError(what, None, self._nearest(identifier))
        return found[identifier]

    def _nearest(self, identifier: str) -> str:
        """Comparing every id of a large task letter by letter would take minutes: those that look alike are."""
        ids = sorted(name for path, fingerprint, _ in self.shards
                     for name in read_table(path, fingerprint, [self.key])[self.key].to_pylist())
        place = bisect_left(ids, identifier)
        alike = [name for name in ids if identifier in name or name in identifier]
        around = ids[max(0, place - _COMPARED // 2):place + _COMPARED // 2]
        return nearest(identifier, dict.fromkeys([*alike[:_COMPARED], *around])) or f"the first is {ids[0]}"


@lru_cache(maxsize=_KEPT_SHARDS)
def _table(path: Path, fingerprint: str) -> pa.Table:
    return read_table(path, fingerprint)
