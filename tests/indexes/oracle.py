"""Brute force: the score's definition written a second time, in NumPy, and Python's own sort.

Shapes: N rows, Q queries, K hits, D dimensions.
"""

from __future__ import annotations

import numpy as np

from pipeline.indexes import Statistics


def folded(values: list[float]) -> float:
    """The definition's order of summation, on a list: the upper half onto the lower, a middle one alone."""
    while len(values) > 1:
        half = (len(values) + 1) // 2
        values = [value + values[half + place] if half + place < len(values) else value
                  for place, value in enumerate(values[:half])]
    return values[0]


def folded_rows(terms_ND: np.ndarray) -> np.ndarray:
    while terms_ND.shape[1] > 1:
        half = (terms_ND.shape[1] + 1) // 2
        upper_ND = np.zeros((len(terms_ND), half))
        upper_ND[:, : terms_ND.shape[1] - half] = terms_ND[:, half:]
        terms_ND = terms_ND[:, :half] + upper_ND
    return terms_ND[:, 0]


def true_scores(queries_QD: np.ndarray, vectors_ND: np.ndarray) -> np.ndarray:
    """float32 [Q, N]."""
    queries_QD, vectors_ND = queries_QD.astype(np.float64), vectors_ND.astype(np.float64)
    query_norms_Q, norms_N = (np.sqrt(folded_rows(values**2)) for values in (queries_QD, vectors_ND))
    scores = []
    for query_D, norm in zip(queries_QD, query_norms_Q, strict=True):
        scale_N = norm * norms_N
        dots_N = folded_rows(vectors_ND * query_D)
        scores.append(np.divide(dots_N, scale_N, out=np.zeros_like(dots_N), where=scale_N > 0))
    return np.array(scores).astype(np.float32).reshape(len(queries_QD), len(vectors_ND))


def true_hits(queries_QD: np.ndarray, vectors_ND: np.ndarray, ids: list[str],
              k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores [Q, K], padded with -1 and -inf."""
    rows_QK = np.full((len(queries_QD), k), -1)
    scores_QK = np.full((len(queries_QD), k), -np.inf, np.float32)
    for query, scores_N in enumerate(true_scores(queries_QD, vectors_ND)):
        best = sorted(range(len(ids)), key=lambda row: (-float(scores_N[row]), ids[row]))[:k]
        rows_QK[query, : len(best)] = best
        scores_QK[query, : len(best)] = scores_N[best]
    return rows_QK, scores_QK


def blocks_of(vectors_ND: np.ndarray, ids: list[str], rows: int) -> list[tuple[int, list[str], np.ndarray]]:
    return [(start, ids[start : start + rows], vectors_ND[start : start + rows])
            for start in range(0, len(vectors_ND), rows)]


def statistics_of(vectors_ND: np.ndarray) -> Statistics:
    ids = [str(row) for row in range(len(vectors_ND))]
    return Statistics.of(blocks_of(vectors_ND, ids, max(1, len(ids))), vectors_ND.shape[1])
