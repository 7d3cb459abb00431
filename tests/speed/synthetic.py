"""Vectors to search: made with a seed, alike in what makes real ones easy or hard to search, stored as float16.

    clip        CLIP-like: queries and candidates in two cones, a decaying spectrum, clusters, outlier dimensions
    gauss       independent normal components: nothing is near anything
    cone        all in one narrow cone, any two at a cosine of about 0.9, as of an untrained tower
    duplicates  CLIP-like, and of every block of rows one in 20 is the copy of another, one in 20 almost one

Shapes: N rows, D dimensions, C centres of clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from tests.speed.comparison import one_of

DATA = ("clip", "gauss", "cone", "duplicates")
BLOCK = 50_000
_CONE_TO_MEANING = 3.0  # lengths c and m of the shared and the own part: cosine c^2 / (c^2 + m^2) = 0.9


class Generator:
    """Candidates (cone 0) and queries (cone 1) that share meanings."""

    def __init__(self, dimension: int, seed: int = 0, data: str = "clip"):
        one_of("data", data, DATA)
        self.random = np.random.default_rng(seed)
        self.dimension, self.data = dimension, data
        decay_D = np.sqrt(np.arange(1, dimension + 1, dtype=np.float32) ** -0.7)
        self.spectrum_D = decay_D / np.linalg.norm(decay_D)
        self.centres_CD = self._normal(4000)
        self.cones = [self._cone(), self._cone()]

    def _normal(self, count: int) -> np.ndarray:
        return self.random.standard_normal((count, self.dimension), dtype=np.float32)

    def _cone(self) -> np.ndarray:
        cone_D = 0.3 * self._normal(1)[0] * self.spectrum_D
        cone_D[self.random.integers(0, self.dimension, 2)] += (0.5, -0.3)
        return cone_D

    def vectors(self, count: int, cone: int) -> np.ndarray:
        """float16 [count, D], not normalised."""
        if self.data == "gauss":
            return self._normal(count).astype(np.float16)
        chosen = self.random.integers(0, len(self.centres_CD), count)
        meaning_ND = (0.75 * self.centres_CD[chosen] + 0.66 * self._normal(count)) * self.spectrum_D
        if self.data == "cone":
            axis_D = self.cones[0] / np.linalg.norm(self.cones[0])
            return (20.0 * (meaning_ND + _CONE_TO_MEANING * axis_D)).astype(np.float16)
        values_ND = 20.0 * (0.75 * meaning_ND + self.cones[cone])
        if self.data == "duplicates" and cone == 0:
            some = count // 20
            values_ND[:some] = values_ND[-some:]
            values_ND[some : 2 * some] = values_ND[-2 * some : -some] * (1 + 1e-3 * self._normal(some))
        return values_ND.astype(np.float16)


@dataclass(frozen=True)
class Pool:
    """float16 vectors in a file, read block by block."""

    path: Path
    rows: int
    dimension: int

    @cached_property
    def ids(self) -> pa.Array:
        return pa.array([f"pool:{number}" for number in range(self.rows)])

    def blocks(self) -> Iterator[tuple[int, pa.Array, np.ndarray]]:
        """(first row, ids, vectors [N, D])."""
        with self.path.open("rb") as file:
            for start in range(0, self.rows, BLOCK):
                count = min(BLOCK, self.rows - start)
                values = np.fromfile(file, np.float16, count * self.dimension)
                yield start, self.ids[start : start + count], values.reshape(count, self.dimension)

    def units(self) -> np.ndarray:
        """All vectors as float32 of length 1 [N, D], in memory: what the flows of others hold ready."""
        units_ND = np.empty((self.rows, self.dimension), np.float32)
        for start, _, vectors_ND in self.blocks():
            units_ND[start : start + len(vectors_ND)] = normalised(vectors_ND)
        return units_ND


def write_pool(path: Path, rows: int, generator: Generator) -> Pool:
    with path.open("wb") as file:
        for start in range(0, rows, BLOCK):
            generator.vectors(min(BLOCK, rows - start), cone=0).tofile(file)
    return Pool(path, rows, generator.dimension)


def normalised(vectors_ND: np.ndarray) -> np.ndarray:
    """float32 vectors of length 1."""
    values_ND = vectors_ND.astype(np.float32)
    return values_ND / np.linalg.norm(values_ND, axis=1, keepdims=True)


def brute_force(pool: Pool, queries_QD: np.ndarray, order_N: np.ndarray, k: int) -> np.ndarray:
    """The exact order by its definition: rows [Q, k] by float64 cosines of everything, rounded, ties by id."""
    units_QD = queries_QD.astype(np.float64)
    units_QD /= np.linalg.norm(units_QD, axis=1, keepdims=True)
    scores = []
    for _, _, vectors_ND in pool.blocks():
        values_ND = vectors_ND.astype(np.float64)
        scores.append((units_QD @ values_ND.T / np.linalg.norm(values_ND, axis=1)).astype(np.float32))
    scores_QN = np.concatenate(scores, axis=1)
    return np.stack([np.lexsort((order_N, -scores_N))[:k] for scores_N in scores_QN])


def alike(rows_QK: np.ndarray, exact_QK: np.ndarray) -> tuple[float, float]:
    """Shares of queries with the same rows in the same order, and with the same set of rows."""
    in_order = (rows_QK == exact_QK).all(axis=1).mean()
    as_sets = (np.sort(rows_QK, axis=1) == np.sort(exact_QK, axis=1)).all(axis=1).mean()
    return round(float(in_order), 5), round(float(as_sets), 5)
