"""The queries on which two runs differ most, with what they ask and from which rank to which they moved.

hit@k changes by 1 or not at all, so queries whose metric changed by as much are told apart by their reciprocal ranks,
then by their order in the task: the choice is always the same. The trade: a query is one row of a table, no picture.

Shapes: Q queries of a task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.embeddings import read_table
from pipeline.metrics.ranking import Metric
from pipeline.plan import Scored
from pipeline.stages.score import PER_QUERY, tables_of

FINER = "mrr"


@dataclass(frozen=True)
class Change:
    """A query: its metric with the first and with the second, and the ranks of the first relevant candidates.

    A rank is None where the run has no relevant candidate; there are no ranks where mrr was not measured.
    """

    query_id: str
    text: str | None
    image: str | None
    modality: str
    values: tuple[float, float]
    ranks: tuple[int | None, int | None] | None

    @property
    def difference(self) -> float:
        return self.values[0] - self.values[1]


class Values(NamedTuple):
    """Of one task, one pool and two encoders: the metric's name, its values, and reciprocal ranks if they are known."""

    metric: str
    values_2Q: np.ndarray
    reciprocal_2Q: np.ndarray | None

    @property
    def difference_Q(self) -> np.ndarray:
        return np.asarray(self.values_2Q[0] - self.values_2Q[1])


def values_of(cells: tuple[Scored, Scored], metric: str | None) -> Values:
    """As `score` has kept them, in the order of the task; `metric`: the headline without it."""
    name = metric or str(Metric.parse(cells[0].task.headline))
    are_known = all(FINER in cell.job.artifact.params.metrics for cell in cells)
    columns = [name, *([FINER] if are_known and FINER != name else [])]
    first, second = (read_table(cell.job.artifact.path(PER_QUERY), cell.job.artifact.fingerprint,
                                ["query_id", *columns]) for cell in cells)
    assert first["query_id"].equals(second["query_id"]), "equal tables of queries have equal orders"
    arrays = {column: np.stack([table[column].to_numpy().astype(np.float64) for table in (first, second)])
              for column in columns}
    return Values(name, arrays[name], arrays.get(FINER))


def changes_of(cell: Scored, values: Values, count: int) -> tuple[tuple[Change, ...], tuple[Change, ...]]:
    """(gains, drops): where the first is ahead by most, where the second; `count` of each at most."""
    difference_Q, reciprocal_2Q = values.difference_Q, values.reciprocal_2Q
    finer_Q = difference_Q if reciprocal_2Q is None else reciprocal_2Q[0] - reciprocal_2Q[1]
    queries = tables_of(cell.job.task, ["query_id", "text", "image", "modality"])
    gained = [row for row in np.lexsort((-finer_Q, -difference_Q))[:count] if difference_Q[row] > 0]
    lost = [row for row in np.lexsort((finer_Q, difference_Q))[:count] if difference_Q[row] < 0]
    return _told(queries, gained, values), _told(queries, lost, values)


def _told(queries: pa.Table, rows: list[int], values: Values) -> tuple[Change, ...]:
    taken = queries.take(pa.array(rows, pa.int64()))
    plain = taken.set_column(3, "modality", pc.cast(taken["modality"], pa.string())).to_pylist()
    return tuple(Change(**query, values=_pair(values.values_2Q, row), ranks=_ranks(values, row))
                 for query, row in zip(plain, rows))


def _pair(values_2Q: np.ndarray, row: int) -> tuple[float, float]:
    return float(values_2Q[0, row]), float(values_2Q[1, row])


def _ranks(values: Values, row: int) -> tuple[int | None, int | None] | None:
    """The reciprocal of a reciprocal rank; float32 is exact enough for any rank that is looked at."""
    if values.reciprocal_2Q is None:
        return None
    first, second = (round(1 / value) if value else None for value in _pair(values.reciprocal_2Q, row))
    return first, second
