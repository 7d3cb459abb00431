"""How fast the exact search is beside FAISS Flat, in one run on one machine: only the ratios carry over.

    python tests/speed/bench_search.py --rows 200000 --queries 1000 --k 100 --dimension 768

Data are CLIP-like (two cones, a decaying spectrum, clusters, outlier dimensions), stored as float16 in a
file that the exact search streams; FAISS holds float32 unit vectors in memory. Repetitions alternate;
medians are printed, one JSON line per method. `wrong` counts sampled queries whose ids differ from float64
brute force.

Shapes: N rows, Q queries, K hits, D dimensions.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline import indexes  # noqa: E402  after the path, so that it runs from anywhere

BLOCK = 50_000
Search = Callable[[], indexes.Hits]


class Pool:
    """float16 vectors in a file, read block by block."""

    def __init__(self, path: Path, rows: int, dimension: int):
        self.path, self.rows, self.dimension = path, rows, dimension
        self.ids = pa.array([f"pool:{number}" for number in range(rows)])

    def blocks(self) -> Iterator[tuple[int, pa.Array, np.ndarray]]:
        with self.path.open("rb") as file:
            for start in range(0, self.rows, BLOCK):
                count = min(BLOCK, self.rows - start)
                values = np.fromfile(file, np.float16, count * self.dimension)
                yield start, self.ids[start : start + count], values.reshape(count, self.dimension)


class Generator:
    """Candidates and queries that share meanings but sit in two different cones."""

    def __init__(self, dimension: int, seed: int = 0):
        self.random = np.random.default_rng(seed)
        self.dimension = dimension
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
        chosen = self.random.integers(0, len(self.centres_CD), count)
        meaning_ND = (0.75 * self.centres_CD[chosen] + 0.66 * self._normal(count)) * self.spectrum_D
        return (20.0 * (0.75 * meaning_ND + self.cones[cone])).astype(np.float16)


def write_pool(path: Path, rows: int, dimension: int, generator: Generator) -> Pool:
    with path.open("wb") as file:
        for start in range(0, rows, BLOCK):
            generator.vectors(min(BLOCK, rows - start), cone=0).tofile(file)
    return Pool(path, rows, dimension)


def brute_force(pool: Pool, queries_QD: np.ndarray, order_N: np.ndarray, k: int) -> np.ndarray:
    """Rows [Q, K] by float64 products of everything."""
    units_QD = queries_QD.astype(np.float64)
    units_QD /= np.linalg.norm(units_QD, axis=1, keepdims=True)
    scores = []
    for _, _, vectors_ND in pool.blocks():
        values_ND = vectors_ND.astype(np.float64)
        scores.append(units_QD @ values_ND.T / np.linalg.norm(values_ND, axis=1))
    scores_QN = np.concatenate(scores, axis=1).astype(np.float32)
    return np.stack([np.lexsort((order_N, -scores_N))[:k] for scores_N in scores_QN])


def peak_memory_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(search: Search) -> tuple[float, indexes.Hits]:
    start = time.perf_counter()
    hits = search()
    return time.perf_counter() - start, hits


def compare(pool: Pool, queries_QD: np.ndarray, k: int, repetitions: int,
            with_faiss: bool) -> Iterator[dict[str, object]]:
    start_memory = peak_memory_gb()
    start = time.perf_counter()
    statistics = indexes.Statistics.of(pool.blocks(), pool.dimension)
    yield {"what": "statistics", "seconds": round(time.perf_counter() - start, 2)}
    order_N = indexes.id_order(pool.ids)

    def exact(coarse: str) -> indexes.Hits:
        return indexes.exact_search(queries_QD, pool.blocks(), order_N, k, statistics, coarse=coarse)

    searches: dict[str, Search] = {name: partial(exact, name) for name in ("float32", "bfloat16")}
    hits = {name: search() for name, search in searches.items()}
    peaks = dict.fromkeys(searches, peak_memory_gb())
    if with_faiss:
        index = indexes.build_index("Flat", pool.blocks, pool.dimension, pool.rows)
        searches["faiss Flat"] = lambda: indexes.search_index(index, queries_QD, k, order_N)
        hits["faiss Flat"] = searches["faiss Flat"]()
        peaks["faiss Flat"] = peak_memory_gb()
    rounds = [{name: timed(search)[0] for name, search in searches.items()} for _ in range(repetitions)]
    seconds_of = {name: median(each[name] for each in rounds) for name in searches}
    best_of = {name: min(each[name] for each in rounds) for name in searches}
    sample = np.unique(np.linspace(0, len(queries_QD) - 1, 20).astype(int))
    truth_QK = brute_force(pool, queries_QD[sample], order_N, k)
    for name in searches:
        yield {"what": name, "seconds": round(seconds_of[name], 2), "best_seconds": round(best_of[name], 2),
               "gflops": round(2e-9 * pool.rows * len(queries_QD) * pool.dimension / seconds_of[name]),
               "times_faiss": round(seconds_of["faiss Flat"] / seconds_of[name], 2) if with_faiss else None,
               "wrong": int((hits[name].rows_QK[sample] != truth_QK).any(axis=1).sum()),
               "sampled": len(sample),
               "examined_per_query": round(hits[name].examined / len(queries_QD), 1),
               "peak_memory_gb": round(peaks[name], 2), "at_start_gb": round(start_memory, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    defaults = {"rows": 200_000, "queries": 1000, "k": 100, "dimension": 768, "repetitions": 3}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-faiss", action="store_true", help="for pools too large for FAISS Flat")
    arguments = parser.parse_args()
    generator = Generator(arguments.dimension)
    queries_QD = generator.vectors(arguments.queries, cone=1)
    with tempfile.TemporaryDirectory() as folder:
        pool = write_pool(Path(folder) / "pool.float16", arguments.rows, arguments.dimension, generator)
        del generator
        facts = {name: getattr(arguments, name) for name in list(defaults)[:4]}
        for line in compare(pool, queries_QD, arguments.k, arguments.repetitions, not arguments.no_faiss):
            sys.stdout.write(json.dumps({**facts, **line}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
