"""Values per query for programs that do their own statistics: one parquet table of an experiment, or a CSV per cell.

Every row names its encoder, task and pool. In the one table a metric that a task does not have (tasks differ in their
cutoffs) is null. Values are the float32 that means were taken of, in the fewest digits that give them again. Cells are
written one after the other: memory is that of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.embeddings import read_table
from pipeline.plan import Scored
from pipeline.stages.score import PER_QUERY

_NAMES = ("encoder", "task", "pool")
_CODED = pa.dictionary(pa.int32(), pa.string())


def write_csv(scored: Scored, path: Path) -> None:
    """The queries of one cell."""
    table = _table(scored)
    plain = pa.table([column.cast(pa.string()) for column in table.columns[:len(_NAMES)]]
                     + table.columns[len(_NAMES):], names=table.column_names)
    pyarrow.csv.write_csv(plain, path)


def write_parquet(cells: Sequence[Scored], path: Path) -> None:
    """All queries of all cells."""
    metrics = dict.fromkeys(name for scored in cells for name in scored.job.artifact.params.metrics)
    schema = pa.schema([*((name, _CODED) for name in _NAMES), ("query_id", pa.string()),
                        *((name, pa.float32()) for name in metrics)])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for scored in cells:
            table = _table(scored)
            columns = [table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
                       for field in schema]
            writer.write_table(pa.table(columns, schema=schema))


def _table(scored: Scored) -> pa.Table:
    """The kept values with the names of their cell before them, in dictionaries of one entry."""
    job = scored.job
    values = read_table(job.artifact.path(PER_QUERY), job.artifact.fingerprint)
    names = [pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), len(values)), pa.array([name]))
             for name in (scored.encoder, scored.task.name, scored.pool)]
    return pa.table([*names, *values.columns], names=[*_NAMES, *values.column_names])
