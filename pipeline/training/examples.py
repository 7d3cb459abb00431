"""Examples: queries, candidates and who answers whom, in two Arrow files that all processes map into memory.

They are made once from collected tables, so that a training neither parses a benchmark's files nor holds a copy
of them in each of its processes. A query without a positive in the pools is left out, and counted.

Shapes: Q queries, C candidates, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import atomic_path
from pipeline.support.errors import UserError

QUERIES, CANDIDATES = "queries.arrow", "candidates.arrow"


class TaskTables(NamedTuple):
    """One task: its queries and qrels (as collected), and (query id, ids of its hard negatives) where it has some."""

    name: str
    queries: pa.Table
    qrels: pa.Table
    negatives: Iterable[tuple[str, Sequence[str]]] | None


class Lists:
    """A list of numbers per row: `of(row)`, or all of them as `offsets` [rows + 1] and `values`."""

    def __init__(self, column: pa.ChunkedArray):
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # the former copies nothing
        self.offsets = array.offsets.to_numpy().astype(np.int64)
        self.values: Any = array.values.to_numpy() if pa.types.is_integer(array.type.value_type) else array.values

    def of(self, row: int) -> np.ndarray:
        return np.asarray(self.values[self.offsets[row]:self.offsets[row + 1]])


@dataclass(frozen=True)
class Examples:
    """The examples of a directory; picklable, and opened again by each process."""

    directory: Path

    @cached_property
    def queries(self) -> pa.Table:
        return _mapped(self.directory / QUERIES)

    @cached_property
    def candidates(self) -> pa.Table:
        return _mapped(self.directory / CANDIDATES)

    @cached_property
    def positives(self) -> Lists:
        return Lists(self.queries["positives"])

    @cached_property
    def negatives(self) -> Lists:
        return Lists(self.queries["negatives"])

    @cached_property
    def instructed_texts(self) -> Lists:
        return Lists(self.queries["instructed_texts"])

    @cached_property
    def task_names(self) -> list[str]:
        return list(self.queries["task"].unify_dictionaries().combine_chunks().dictionary.to_pylist())

    @cached_property
    def tasks(self) -> np.ndarray:
        """For each query the number of its task in `task_names`."""
        return np.asarray(self.queries["task"].unify_dictionaries().combine_chunks().indices)

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory}

    def are_positive(self, queries_Q: np.ndarray, candidates_C: np.ndarray) -> np.ndarray:
        """bool [Q, C]: which of the candidates (by row) answer which of the queries (by row)."""
        order_C = np.argsort(candidates_C, kind="stable")
        sorted_C = candidates_C[order_C]
        starts_Q, ends_Q = self.positives.offsets[queries_Q], self.positives.offsets[queries_Q + 1]
        owners_P = np.repeat(np.arange(len(queries_Q)), ends_Q - starts_Q)
        answers_P = self.positives.values[ranges(starts_Q, ends_Q)]
        first_P, last_P = np.searchsorted(sorted_C, answers_P), np.searchsorted(sorted_C, answers_P, "right")
        found = np.zeros((len(queries_Q), len(candidates_C)), bool)
        found[np.repeat(owners_P, last_P - first_P), order_C[ranges(first_P, last_P)]] = True
        return found


def ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """All numbers from starts[0] below ends[0], then those from starts[1], and so on."""
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


def write_examples(directory: Path, tasks: Sequence[TaskTables], candidates: pa.Table,
                   repeats: Mapping[str, int] | None) -> dict[str, Any]:
    """Write both files; returns what is to be known about them. UserError if nothing is left to learn from.

    `repeats` says how often a query stands in an epoch (a query that it does not name: not at all); None: once each.
    """
    candidate_ids = candidates["candidate_id"].combine_chunks()
    parts, left_out, outside = [], 0, 0
    for task in tasks:
        rows, lost_queries, lost_pairs = _task_rows(task, candidate_ids, repeats)
        parts.append(rows)
        left_out, outside = left_out + lost_queries, outside + lost_pairs
    queries = pa.concat_tables(parts).combine_chunks()
    if not len(queries):
        raise UserError("no query has a positive in the pools of the train split", str(directory),
                        "check the tasks and the qrels of the train split")
    _write(directory / QUERIES, queries)
    _write(directory / CANDIDATES, candidates.select(["candidate_id", "text", "image"]).combine_chunks())
    return {"queries": len(queries), "candidates": len(candidates),
            "rows_per_epoch": pc.sum(queries["repeats"]).as_py(),
            "queries_without_positive": left_out, "positives_outside_pools": outside}


def _task_rows(task: TaskTables, candidate_ids: pa.Array,
               repeats: Mapping[str, int] | None) -> tuple[pa.Table, int, int]:
    query_ids = task.queries["query_id"].combine_chunks()
    relevant = task.qrels.filter(pc.greater(task.qrels["relevance"], 0))
    positives, outside = _pairs(relevant["query_id"], relevant["candidate_id"], query_ids, candidate_ids)
    given = [(query_id, candidate_id) for query_id, listed in task.negatives or () for candidate_id in listed]
    columns = [pa.array([pair[side] for pair in given], pa.string()) for side in (0, 1)]
    negatives, _ = _pairs(columns[0], columns[1], query_ids, candidate_ids)
    negatives = negatives[~np.isin(_as_one(negatives), _as_one(positives))]  # never punish what answers the query
    negatives = negatives[np.sort(np.unique(_as_one(negatives), return_index=True)[1])]  # each once, in their order
    rows = pa.table({
        "query_id": query_ids, "task": pa.array([task.name] * len(query_ids), pa.string()).dictionary_encode(),
        **{name: task.queries[name] for name in ("text", "image", "instructed_texts")},
        "positives": _lists(positives, len(query_ids)), "negatives": _lists(negatives, len(query_ids)),
        "repeats": _repeats(query_ids, repeats)})
    answered = rows.filter(pc.greater(pc.list_value_length(rows["positives"]), 0))
    return answered, len(rows) - len(answered), outside


def _pairs(query_column: Any, candidate_column: Any, query_ids: pa.Array,
           candidate_ids: pa.Array) -> tuple[np.ndarray, int]:
    """int64 [P, 2] of rows, sorted by query; and how many pairs name a candidate outside the pools."""
    queries = pc.index_in(query_column, query_ids)
    candidates = pc.index_in(candidate_column, candidate_ids)
    outside = pc.sum(pc.and_(pc.is_valid(queries), pc.is_null(candidates))).as_py() or 0
    rows_P2 = [np.asarray(pc.fill_null(rows, -1)) for rows in (queries, candidates)]
    pairs_P2 = np.stack(rows_P2, axis=1).astype(np.int64)
    known_P2 = pairs_P2[(pairs_P2 >= 0).all(axis=1)]
    return known_P2[np.argsort(known_P2[:, 0], kind="stable")], outside


def _as_one(pairs_P2: np.ndarray) -> np.ndarray:
    return np.asarray(pairs_P2[:, 0] << 32 | pairs_P2[:, 1])


def _lists(pairs_P2: np.ndarray, num_queries: int) -> pa.ListArray:
    offsets = np.zeros(num_queries + 1, np.int32)
    np.cumsum(np.bincount(pairs_P2[:, 0], minlength=num_queries), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(pairs_P2[:, 1].astype(np.int32)))


def _repeats(query_ids: pa.Array, repeats: Mapping[str, int] | None) -> pa.Array:
    counts = [1] * len(query_ids) if repeats is None else [repeats.get(name, 0) for name in query_ids.to_pylist()]
    return pa.array(counts, pa.int32())


def _write(path: Path, table: pa.Table) -> None:
    with atomic_path(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        with pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(unify_dictionaries=True)) as writer:
            writer.write_table(table)


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
