"""Which candidate becomes the partner: what a derived search found, held against a rule.

Ours: the best of the wanted modality that is neither the item itself nor what the user's query shows (of which a pair
would tell a generator nothing new), sought among the pools that have this modality. UniRAG's, as published (UniIR,
src/common/mbeir_retriever.py, `get_raw_retrieved_candidates`): of the first ten in the pool of the search, the first of
the wanted modality whose picture or text is not that of the user's query; the item itself is not looked at.

Shapes: A askers (derived queries), O options (what may become a partner), H hits, N rows of the pools.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import Artifact
from pipeline.metrics.order import places, positions, starts
from pipeline.report.candidate_pools import CandidatePools
from pipeline.stages.score import run_tables

PLUMBLINE, UNIRAG = RULES = ("plumbline", "unirag")
UNIRAG_TOP = 10
_KEPT = 8  # options per asker under our rule: a query's own content rarely stands there under more ids


@dataclass(frozen=True)
class Options:
    """What each asker may take, best first: options `start_A[a]` to `start_A[a + 1]` are those of asker a."""

    seeks: str
    pools: CandidatePools
    askers: pa.Array
    start_A: np.ndarray
    row_O: np.ndarray
    rank_O: np.ndarray
    score_O: np.ndarray

    @classmethod
    def of(cls, run: Artifact, pools: CandidatePools, seeks: str, rule: str) -> Options:
        is_sought_N = pc.equal(pools.table(np.arange(len(pools.ids)), ["modality"])["modality"], seeks).to_numpy()
        kept: list[tuple[pa.Array, np.ndarray, np.ndarray, np.ndarray]] = []
        for table in run_tables(run):
            kept.append(_kept(table, pools, is_sought_N, rule))
        askers_O = pa.concat_arrays([each[0] for each in kept])
        row_O, rank_O, score_O = (np.concatenate([each[number] for each in kept]) for number in (1, 2, 3))
        start_O = starts(askers_O.dictionary_encode().indices.to_numpy()) if len(askers_O) else np.zeros(0, np.int64)
        return cls(seeks, pools, askers_O.take(pa.array(start_O)), np.append(start_O, len(row_O)), row_O, rank_O,
                   score_O)

    def chosen(self, candidate_ids: pa.ChunkedArray, query_H: np.ndarray, own_Q: pa.ChunkedArray) -> np.ndarray:
        """int64 [H]: the option that each hit takes, -1 where it asks for nothing or nothing fits.

        `own_Q` is the text or the picture of each query, whichever is sought; `query_H` the query of each hit.
        """
        asker_H = positions(candidate_ids, self.askers)
        option_H = np.where(asker_H < 0, -1, self.start_A[asker_H])
        if not (asker_H >= 0).any():
            return option_H
        end_H = np.where(asker_H < 0, -1, self.start_A[asker_H + 1])
        code_O, code_Q = self._codes(np.unique(asker_H[asker_H >= 0]), own_Q)
        same_H = np.zeros(len(option_H), bool)
        open_H = option_H >= 0
        while open_H.any():
            same_H[open_H] = code_O[option_H[open_H]] == code_Q[query_H[open_H]]
            open_H &= same_H
            option_H[open_H] += 1
            ended_H = open_H & (option_H >= end_H)
            option_H[ended_H] = -1
            open_H &= ~ended_H
        return option_H

    def _codes(self, asker_U: np.ndarray, own_Q: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers that are equal where contents are: of the options of these askers, and of the queries."""
        count_U = self.start_A[asker_U + 1] - self.start_A[asker_U]
        before_U = np.cumsum(count_U) - count_U
        options = np.repeat(self.start_A[asker_U] - before_U, count_U) + np.arange(count_U.sum())
        row_C, place = np.unique(self.row_O[options], return_inverse=True)
        content = self.pools.table(row_C, [self.seeks])[self.seeks].combine_chunks().dictionary_encode()
        code_O = np.full(len(self.row_O), -1)
        code_O[options] = content.indices.to_numpy()[place]
        code_Q = pc.fill_null(pc.index_in(own_Q, value_set=content.dictionary, skip_nulls=True), -2).to_numpy()
        return code_O, code_Q


def _kept(table: pa.Table, pools: CandidatePools, is_sought_N: np.ndarray,
          rule: str) -> tuple[pa.Array, np.ndarray, np.ndarray, np.ndarray]:
    """Askers, rows, ranks and scores of what may become a partner, of one shard of a derived run."""
    row_H = pools.rows_of(table["candidate_id"])
    askers, candidates = (table[name].cast(pa.string()).combine_chunks() for name in ("query_id", "candidate_id"))
    fits_H = is_sought_N[row_H]
    if rule == PLUMBLINE:
        fits_H = fits_H & pc.not_equal(askers, candidates).to_numpy(zero_copy_only=False)
        hit_O = np.flatnonzero(fits_H)
        start_A = starts(askers.dictionary_encode().indices.to_numpy()[hit_O])
        hit_O = hit_O[places(start_A, len(hit_O)) < _KEPT]
    else:
        hit_O = np.flatnonzero(fits_H & (table["rank"].to_numpy() <= UNIRAG_TOP))
    return askers.take(pa.array(hit_O)), row_H[hit_O], table["rank"].to_numpy()[hit_O], table["score"].to_numpy()[hit_O]
