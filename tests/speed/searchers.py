"""Exact searches as others do them, each prepared so that its clock runs over its own best case.

All hold the pool as float32 unit vectors in memory; loading and normalising them is not timed. `search` is what is
timed, `rows` turns its result into row numbers afterwards. They differ from the exact order where scores in float32
do: near ties, and ties, which they leave as they come.

Shapes: N rows, Q queries, K hits, D dimensions.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tests.speed.synthetic import Pool, normalised

CHUNK = 50_000  # rows of a chunk in MTEB 2; its version 1 took 20,000, which makes more work for the heaps
_QUERY_BLOCK, _ROW_BLOCK = 1024, 16_384


@dataclass(frozen=True)
class Case:
    """What is searched for, and where."""

    pool: Pool
    queries_QD: np.ndarray
    k: int
    device: str = "cpu"

    @property
    def units_gb(self) -> float:
        return 4 * self.pool.rows * self.pool.dimension / 2**30

    def scores_gb(self, rows: int) -> float:
        """A matrix of float32 scores of all queries with so many rows."""
        return 4 * len(self.queries_QD) * rows / 2**30


class Searcher(NamedTuple):
    search: Callable[[], Any]
    rows: Callable[[Any], np.ndarray]


def flat(case: Case) -> Searcher:
    import torch  # noqa: F401  before faiss: one pool of threads

    import faiss

    index = faiss.IndexFlatIP(case.pool.dimension)
    for _, _, vectors_ND in case.pool.blocks():
        index.add(normalised(vectors_ND))
    queries_QD = normalised(case.queries_QD)
    return Searcher(lambda: index.search(queries_QD, case.k)[1], np.asarray)


def knn(case: Case) -> Searcher:
    import torch  # noqa: F401  before faiss: one pool of threads

    import faiss

    units_ND, queries_QD = case.pool.units(), normalised(case.queries_QD)
    return Searcher(lambda: faiss.knn(queries_QD, units_ND, case.k, metric=faiss.METRIC_INNER_PRODUCT)[1], np.asarray)


def matrix(case: Case) -> Searcher:
    """All scores at once, as CLIP_benchmark makes them for its recall."""
    queries_QD, units_ND = _tensors(case, "float32")
    return Searcher(lambda: (queries_QD @ units_ND.T).topk(case.k, dim=1).indices.cpu().numpy(), np.asarray)


def blocks(case: Case, dtype: str = "float32") -> Searcher:
    """Products and topk block by block, the best so far merged with each: what one writes with torch alone."""
    import torch

    queries_QD, units_ND = _tensors(case, dtype)

    def search() -> np.ndarray:
        found = []
        for queries_BD in queries_QD.split(_QUERY_BLOCK):
            scores, rows = [], []
            for start in range(0, len(units_ND), _ROW_BLOCK):
                product = queries_BD @ units_ND[start : start + _ROW_BLOCK].T
                best = product.topk(min(case.k, product.shape[1]), dim=1)
                scores.append(best.values)
                rows.append(best.indices + start)
            place_BK = torch.cat(scores, dim=1).topk(case.k, dim=1).indices
            found.append(torch.cat(rows, dim=1).gather(1, place_BK))
        return np.asarray(torch.cat(found).cpu())

    return Searcher(search, np.asarray)


def heaps(case: Case) -> Searcher:
    """MTEB's way: topk of all queries with a chunk of the pool, then a heap of (score, id) per query in Python."""
    import torch

    queries_QD, units_ND = _tensors(case, "float32")
    ids = case.pool.ids.to_pylist()

    def search() -> list[list[tuple[float, str]]]:
        kept: list[list[tuple[float, str]]] = [[] for _ in range(len(queries_QD))]
        for start in range(0, len(units_ND), CHUNK):
            scores_QC = torch.mm(queries_QD, units_ND[start : start + CHUNK].T)
            best = scores_QC.topk(min(case.k + 1, scores_QC.shape[1]), dim=1)
            for heap, scores, places in zip(kept, best.values.tolist(), best.indices.tolist()):
                for score, place in zip(scores, places):
                    hit = (score, ids[start + place])
                    if len(heap) < case.k:
                        heapq.heappush(heap, hit)
                    else:
                        heapq.heappushpop(heap, hit)
        return kept

    def rows(kept: list[list[tuple[float, str]]]) -> np.ndarray:
        return np.array([[int(name.partition(":")[2]) for _, name in sorted(heap, reverse=True)] for heap in kept])

    return Searcher(search, rows)


def _tensors(case: Case, dtype: str) -> tuple[Any, Any]:
    import torch

    to = partial(torch.Tensor.to, device=case.device, dtype=getattr(torch, dtype))
    return to(torch.from_numpy(normalised(case.queries_QD))), to(torch.from_numpy(case.pool.units()))


@dataclass(frozen=True)
class Baseline:
    """`needs_gb`: memory of preparing and searching; it runs on `device` unless that is CPU only."""

    title: str
    prepare: Callable[[Case], Searcher]
    needs_gb: Callable[[Case], float]
    is_cpu_only: bool = False


BASELINES = {
    "flat": Baseline("FAISS IndexFlatIP (its own copy of the unit vectors in memory)", flat,
                     lambda case: case.units_gb, is_cpu_only=True),
    "knn": Baseline("faiss.knn (unit vectors in memory)", knn, lambda case: case.units_gb, is_cpu_only=True),
    "matrix": Baseline("torch: the whole matrix of scores, then topk (CLIP_benchmark)", matrix,
                       lambda case: case.units_gb + case.scores_gb(case.pool.rows)),
    "blocks": Baseline("torch: float32 products in blocks, topk of each", blocks, lambda case: case.units_gb),
    "half": Baseline("torch: float16 products in blocks, topk of each (not exact)", partial(blocks, dtype="float16"),
                     lambda case: case.units_gb),
    "heaps": Baseline("torch: chunks of 50,000, topk of each, a Python heap per query (MTEB)", heaps,
                      lambda case: case.units_gb + case.scores_gb(min(CHUNK, case.pool.rows)) * 1.5),
}
