"""The order of a run: each query's hits together, ranked 1, 2, 3, ...

`refuse_disorder` names what is wrong with a run that is not; `order_run` brings a foreign run into order by its
scores, under this project's rule for ties or under trec_eval's.

Shapes: H hits (rows of the run), S queries with hits, Q queries.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.support.errors import UserError
from pipeline.tables import RUN

Ties = Literal["candidate_id ascending", "trec_eval"]


def order_run(run: pa.Table, ties: Ties = "candidate_id ascending") -> pa.Table:
    """`run` with each query's hits together, highest score first, ranked 1, 2, 3, ...; old ranks are ignored.

    Scores are compared as float32, as trec_eval does. Equal scores are ordered by the bytes of the candidate
    id: ascending is this project's rule, "trec_eval" is descending. Queries keep the order of their first
    appearance. UserError: a score that is not a number.
    """
    candidate_order = {"candidate_id ascending": "ascending", "trec_eval": "descending"}[ties]
    query_ids, candidate_ids = strings(run.column("query_id")), strings(run.column("candidate_id"))
    score_H = run.column("score").to_numpy().astype(np.float32)
    if np.isnan(score_H).any():
        hit = int(np.isnan(score_H).argmax())
        raise UserError("a score is not a number", f"query {query_ids[hit]}, candidate {candidate_ids[hit]}",
                        "every hit needs a score that can be compared")
    query_H = query_ids.dictionary_encode().indices
    keys = pa.table({"query": query_H, "score": pa.array(score_H), "candidate": candidate_ids})
    order_H = pc.sort_indices(keys, sort_keys=[
        ("query", "ascending"), ("score", "descending"), ("candidate", candidate_order)])
    rank_H = places(starts(query_H.to_numpy()[order_H.to_numpy()]), len(order_H)) + 1
    return pa.Table.from_arrays(
        [query_ids.take(order_H), pa.array(rank_H), candidate_ids.take(order_H),
         pa.array(score_H[order_H.to_numpy()])], schema=RUN)


def refuse_disorder(run: pa.Table, queries: pa.Array) -> None:
    """UserError naming the first hit of a query that is not among `queries`, or the first that is out of order."""
    query_H = positions(run.column("query_id"), queries)
    if (query_H < 0).any():
        unknown = run.column("query_id")[int((query_H < 0).argmax())]
        raise UserError(f"the run has hits for query {unknown}, which is not a query of this task",
                        do="score a run against the task that it was retrieved for")
    start_S = starts(query_H)
    wrong_H = places(start_S, len(query_H)) + 1 != run.column("rank").to_numpy()
    wrong_H[start_S] |= np.bincount(query_H[start_S], minlength=len(queries))[query_H[start_S]] > 1
    if wrong_H.any():
        hit = int(wrong_H.argmax())
        raise UserError("the run is not in order: each query's hits must stand together, ranked 1, 2, 3, ...",
                        f"query {run.column('query_id')[hit]}, rank {run.column('rank')[hit]}",
                        "order it by score first")


def is_in_order(query_ids: pa.ChunkedArray, rank_H: np.ndarray, edge_S: np.ndarray) -> bool:
    """Whether between the edges, and only there, another query begins, and ranks count up from each edge to the next.

    May be False where only a dictionary is at odds with itself: `refuse_disorder` is exact, and slow.
    """
    first, last, inner = int(edge_S[0]), int(edge_S[-1]), edge_S[1:-1] - edge_S[0]
    return (np.array_equal(np.flatnonzero(np.diff(rank_H[first:last]) != 1) + 1, inner)
            and np.array_equal(changes(query_ids.slice(first, last - first)), inner))


def changes(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """int64: where a value differs from the one before it, or at least its code in a dictionary does."""
    values = column.chunk(0) if isinstance(column, pa.ChunkedArray) and column.num_chunks == 1 else column
    if isinstance(values, pa.DictionaryArray):
        code_H = values.indices.to_numpy()
        return np.flatnonzero(code_H[1:] != code_H[:-1]) + 1
    values = strings(values)
    length_H = pc.binary_length(values).to_numpy()
    if len(values) and length_H[0] and (length_H == length_H[0]).all():
        return _changes_of_equal_lengths(values, int(length_H[0]))
    return pc.indices_nonzero(pc.not_equal(values[1:], values[:-1])).to_numpy().astype(np.int64) + 1


def _changes_of_equal_lengths(values: pa.StringArray, length: int) -> np.ndarray:
    """Byte by byte with the string before, which takes a quarter of the time that comparing strings does."""
    first = int(np.frombuffer(values.buffers()[1], np.int32)[values.offset])
    bytes_N = np.frombuffer(values.buffers()[2], np.uint8)[first:first + len(values) * length]
    at = np.flatnonzero(bytes_N[length:] != bytes_N[:-length]) // length + 1
    return at[np.diff(at, prepend=0) != 0]


def starts(code_H: np.ndarray) -> np.ndarray:
    """Where each run of equal codes begins."""
    return np.flatnonzero(np.diff(code_H, prepend=-1) != 0) if len(code_H) else np.zeros(0, np.int64)


def places(start_S: np.ndarray, num_hits: int) -> np.ndarray:
    """int32 [H]: 0, 1, 2, ... from each start on."""
    lengths_S = np.diff(np.append(start_S, num_hits))
    return np.arange(num_hits, dtype=np.int32) - np.repeat(start_S.astype(np.int32), lengths_S)


def positions(values: pa.Array | pa.ChunkedArray, among: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """int32: position of each value in `among`, -1 if it is not there; equal neighbours are looked up once."""
    values = strings(values)
    start_S = np.append(0, changes(values))[:len(values)]
    distinct = values.take(pa.array(start_S)) if len(start_S) < len(values) else values
    position_S = _positions_of_stretch(distinct, among)
    if position_S is None:
        position_S = pc.fill_null(pc.index_in(distinct, value_set=among), -1).to_numpy()
    return np.repeat(position_S, np.diff(np.append(start_S, len(values))))


def _positions_of_stretch(values: pa.Array, among: pa.Array | pa.ChunkedArray) -> np.ndarray | None:
    """The positions if all values stand in `among` one after the other, as in a run they mostly do: no table needed."""
    first = pc.index(among, values[0]).as_py() if len(values) and isinstance(among, pa.StringArray) else -1
    if first < 0 or not values.equals(among[first:first + len(values)]):
        return None
    return np.arange(first, first + len(values), dtype=np.int32)


def strings(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One plain array of strings, whatever encoding and chunks the column came in."""
    assert not column.null_count, "identifiers are never null"
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.cast(pa.string()).combine_chunks()
    return column.cast(pa.string())
