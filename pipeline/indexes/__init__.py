"""Search: the exact engine, FAISS indexes, and the one order in which both give their hits.

The score of a pair is its cosine, computed in float64 from the stored vectors and rounded to float32; hits
are ordered by score descending, then candidate_id ascending (`score.py`). `exact_search` returns exactly
the first k of that order and needs nothing but a stream of vectors; FAISS indexes are faster to search
again and again, and approximate. torch and faiss are imported when a search begins, never when this package
is.
"""

from __future__ import annotations

from pipeline.indexes.approximate import (build_index, check_factory, check_parameters, read_index, search_index,
                                          write_index)
from pipeline.indexes.coarse import COARSE
from pipeline.indexes.exact import KERNELS, exact_search
from pipeline.indexes.hits import Hits, id_order, merge_hits, recall_against_exact
from pipeline.indexes.statistics import Statistics

__all__ = ["COARSE", "KERNELS", "Hits", "Statistics", "build_index", "check_factory", "check_parameters",
           "exact_search", "id_order", "merge_hits", "read_index", "recall_against_exact", "search_index",
           "write_index"]
