"""The relevant hits of a table of a run, in one of two ways that find the same.

The compiled way (native.py) takes a quarter of the time. Where it is not to be had, or finds a fault, identifiers
become numbers that are sorted row by row, and faults are named.

Shapes: H hits (rows of the table), S queries with hits, B queries of a block, T twins.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyarrow as pa

from pipeline.metrics import native
from pipeline.metrics.identifiers import Numbered, exact_numbers
from pipeline.metrics.matching import Part, twins
from pipeline.metrics.order import is_in_order, refuse_disorder
from pipeline.metrics.relevance import Relevant
from pipeline.support.errors import UserError

Matches = tuple[np.ndarray, np.ndarray]


class Hits:
    """Row by row: query_S[i], a position among the queries, has the hits from edge_S[i] to the next edge."""

    def __init__(self, run: pa.Table, rank_H: np.ndarray, edge_S: np.ndarray, query_S: np.ndarray, relevant: Relevant):
        self._run, self._rank_H, self._edge_S, self._query_S, self._relevant = run, rank_H, edge_S, query_S, relevant
        num_expected = len(rank_H) / max(len(query_S), 1) * len(relevant.queries)  # in all tables of the run
        library = native.load_for(num_expected) if rank_H.dtype == np.int32 else None
        self._columns = None if library is None else native.Columns(
            library, run.column("candidate_id"), relevant.candidate_J, run.column("query_id"), rank_H)

    def matches(self, first: int, last: int) -> Matches:
        """(hit, position among the relevant candidates) of each relevant hit of some rows, in order of the hits.

        UserError: the rows are out of order, or a candidate stands twice under one query.
        """
        edge_B, query_B = self._edge_S[first:last + 1], self._query_S[first:last]
        if self._columns is not None:
            start_B, count_B = self._relevant.start_Q[query_B], self._relevant.count_Q[query_B]
            found = self._columns.matches(edge_B, start_B, count_B)
            if found is not None:
                return found
        if not is_in_order(self._run.column("query_id"), self._rank_H, edge_B):
            refuse_disorder(self._run, self._relevant.queries)
        return self._sorted_matches(edge_B, query_B)

    def _sorted_matches(self, edge_B: np.ndarray, query_B: np.ndarray) -> Matches:
        """Hashes find them and the strings confirm it; where they do not, exact numbers decide."""
        first, num_hits, count_B = int(edge_B[0]), int(edge_B[-1] - edge_B[0]), np.diff(edge_B)
        relevant, candidates = self._relevant, self._numbered
        wanted_J, wanted_B = relevant.of_queries(query_B)
        left_T, right_T = twins([Part(candidates.hashes(first, num_hits), count_B),
                                 Part(relevant.hash_J[wanted_J], wanted_B)])
        is_found_T = (left_T >= 0) & (left_T < num_hits) & (right_T >= num_hits)
        if not is_found_T.all() or not candidates.strings(first, num_hits, left_T).equals(
                relevant.candidate_J.take(pa.array(wanted_J[right_T - num_hits]))):
            ids, wanted = candidates.strings(first, num_hits), relevant.candidate_J.take(pa.array(wanted_J))
            number_N = exact_numbers(pa.concat_arrays([ids, wanted]))
            left_T, right_T = twins([Part(number_N[:num_hits], count_B), Part(number_N[num_hits:], wanted_B)])
            if (right_T < num_hits).any():
                self._refuse_repeated(first + int(left_T[right_T < num_hits].min()))
        order_T = np.argsort(left_T)
        return first + left_T[order_T], wanted_J[right_T[order_T] - num_hits]

    @cached_property
    def _numbered(self) -> Numbered:
        return Numbered(self._run.column("candidate_id"))

    def _refuse_repeated(self, hit: int) -> None:
        row = int(np.searchsorted(self._edge_S, hit, side="right")) - 1
        raise UserError(f"the run has candidate {self._run.column('candidate_id')[hit]} more than once for one query",
                        f"query {self._relevant.queries[int(self._query_S[row])]}",
                        "a candidate has one rank per query: remove the others")
