"""The order of a run: each query's hits together, ranked 1, 2, 3, ...

`checked_order` refuses a run that is not in order, so that whoever reads it may rely on it; `order_run`
brings a foreign run into order by its scores, under this project's rule for ties or under trec_eval's.

Shapes: H hits (rows of the run), S queries with hits, Q queries.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.support.errors import UserError
from pipeline.tables import RUN

Ties = Literal["candidate_id ascending", "trec_eval"]


class Order(NamedTuple):
    """Which query each hit belongs to, and where each query's hits begin."""

    query_H: np.ndarray
    start_S: np.ndarray


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


def checked_order(run: pa.Table, queries: pa.Array) -> Order:
    query_H = positions(run.column("query_id"), queries)
    if (query_H < 0).any():
        unknown = run.column("query_id")[int((query_H < 0).argmax())]
        raise UserError(f"the run has hits for query {unknown}, which is not a query of this task",
                        do="score a run against the task that it was retrieved for")
    start_S = starts(query_H)
    expected_H = places(start_S, len(query_H)) + 1
    wrong_H = expected_H != run.column("rank").to_numpy()
    wrong_H[start_S] |= np.bincount(query_H[start_S], minlength=len(queries))[query_H[start_S]] > 1
    if wrong_H.any():
        hit = int(wrong_H.argmax())
        raise UserError("the run is not in order: each query's hits must stand together, ranked 1, 2, 3, ...",
                        f"query {run.column('query_id')[hit]}, rank {run.column('rank')[hit]}",
                        "order it by score first")
    return Order(query_H, start_S)


def starts(code_H: np.ndarray) -> np.ndarray:
    """Where each run of equal codes begins."""
    return np.flatnonzero(np.diff(code_H, prepend=-1) != 0) if len(code_H) else np.zeros(0, np.int64)


def places(start_S: np.ndarray, num_hits: int) -> np.ndarray:
    """int32 [H]: 0, 1, 2, ... from each start on."""
    lengths_S = np.diff(np.append(start_S, num_hits))
    return np.arange(num_hits, dtype=np.int32) - np.repeat(start_S.astype(np.int32), lengths_S)


def positions(values: Any, among: pa.Array) -> np.ndarray:
    """int32: position of each value in `among`, -1 if it is not there."""
    values = values.cast(pa.string())
    position = pc.fill_null(pc.index_in(values, value_set=among), -1)
    return np.asarray(position.to_numpy(zero_copy_only=False))


def strings(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One plain array of strings, whatever encoding and chunks the column came in."""
    assert not column.null_count, "identifiers are never null"
    plain = column.cast(pa.string())
    return plain.combine_chunks() if isinstance(plain, pa.ChunkedArray) else plain
