"""Exact search beside what others search with, over the same float16 vectors.

Ours streams them from a file (in the page cache); the others hold float32 unit vectors ready in memory, which is
their best case. Each is timed by turns with ours. `equal` says whether our ids are those of the exact order (float64
cosines, ties by id), checked against brute force on `sample` queries; `baseline_equal` is the share of all queries for
which the baseline's are ours too, and `baseline_same_sets` takes no notice of the order. Peaks of memory are those of
processes that do nothing else: one that only imports the libraries has `imports_gb`. With faiss=true, approximate
indexes follow: how fast, and how much they find.

Shapes: N rows, Q queries, K hits, D dimensions.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, List, Optional

import numpy as np

from pipeline import indexes
from pipeline.support.errors import UserError
from tests.speed.comparison import Row, alone, at_least_one, by_turns, digits, disk_flaw, memory_flaw, one_of
from tests.speed.searchers import BASELINES, Case
from tests.speed.synthetic import DATA, Generator, Pool, alike, brute_force, write_pool

_SAMPLE = 20
_ALONE = "import sys; from tests.speed.search import once; once(*sys.argv[1:])"
_WIDTHS = {"IVF": ("nprobe", (1, 4, 16, 64)), "HNSW": ("efSearch", (16, 64, 256))}


@dataclass(frozen=True)
class Options:
    rows: int = 200_000
    queries: int = 1000
    k: int = 100
    dimension: int = 768
    repetitions: int = 5
    data: str = "clip"  # clip, gauss, cone, duplicates: see synthetic.py
    baselines: List[str] = field(default_factory=lambda: ["flat", "knn", "matrix", "heaps"])  # also: blocks, half
    faiss: bool = False  # approximate indexes as well:
    factories: List[str] = field(default_factory=lambda: ["HNSW32", "IVF{lists},Flat", "IVF{lists},PQ{codes}"])
    peak: bool = True  # every flow once more, in a process of its own, for its peak of memory
    coarse: str = "auto"
    kernel: str = "auto"  # native, torch
    memory_gb: float = 2.0
    device: str = "cpu"  # of ours and of the baselines in torch
    directory: Optional[str] = None  # where the vectors are written: 2 x rows x dimension bytes

    def __post_init__(self) -> None:
        at_least_one(self, "rows", "queries", "k", "dimension", "repetitions")
        if self.k > self.rows:
            raise UserError(f"k={self.k} is more than rows={self.rows}", "command line")
        one_of("data", self.data, DATA)
        one_of("coarse", self.coarse, indexes.COARSE)
        one_of("kernel", self.kernel, indexes.KERNELS)
        for name in self.baselines:
            one_of("baselines", name, tuple(BASELINES))


def rows(options: Options) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        comparison = _Comparison(options, Path(folder))
        if flaw := disk_flaw(Path(folder), 2 * options.rows * options.dimension / 2**30):
            yield Row.skipped("search", comparison.work, "queries/s", "all", flaw)
            return
        comparison.prepare()
        for name in options.baselines:
            yield comparison.with_baseline(name)
        if options.faiss:
            for factory in options.factories:
                yield from comparison.with_index(factory)


class _Comparison:
    """One pool, one set of queries, and what our search finds."""

    def __init__(self, options: Options, folder: Path):
        self.options, self.folder = options, folder
        unusual = [name for name in (options.device, options.kernel) if name not in ("cpu", "auto")]
        self.work = ", ".join([f"{options.rows:,} x {options.dimension} {options.data}", f"{options.queries:,} queries",
                               f"k={options.k}", *unusual])

    def prepare(self) -> None:
        options = self.options
        generator = Generator(options.dimension, data=options.data)
        queries_QD = generator.vectors(options.queries, cone=1)
        self.case = Case(write_pool(self.folder / "pool.float16", options.rows, generator), queries_QD, options.k,
                         options.device)
        np.save(self.folder / "queries.npy", queries_QD)
        (self.folder / "options.json").write_text(json.dumps(asdict(options)))
        self.ours = ours(self.case, options, self.folder)
        hits = self.ours()
        self.exact_QK, self.hits = hits.rows_QK, hits
        self.facts = self._sample(queries_QD)
        if options.peak:
            self.facts |= {"imports_gb": self._peak("nothing"), "peak_gb": self._peak("ours")}

    def _sample(self, queries_QD: np.ndarray) -> dict[str, Any]:
        sample = np.unique(np.linspace(0, len(queries_QD) - 1, _SAMPLE).astype(int))
        pool = self.case.pool
        truth_QK = brute_force(pool, queries_QD[sample], indexes.id_order(pool.ids), self.options.k)
        right = int((self.exact_QK[sample] == truth_QK).all(axis=1).sum())
        self.is_exact = right == len(sample)
        return {"sample": len(sample)}

    def _peak(self, flow: str) -> float:
        return round(alone("-c", _ALONE, self.folder, flow).peak_gb, 2)

    def with_baseline(self, name: str) -> Row:
        baseline, facts = BASELINES[name], dict(self.facts)
        title = baseline.title + (", on the CPU" if baseline.is_cpu_only and self.options.device != "cpu" else "")
        if flaw := memory_flaw(baseline.needs_gb(self.case)):
            seconds = by_turns({"ours": self.ours}, self.options.repetitions)["ours"]
            rate = len(self.case.queries_QD) / float(np.median(seconds))
            return Row.skipped("search", self.work, "queries/s", title, flaw, rate, **facts)
        if self.options.peak:
            facts["baseline_peak_gb"] = self._peak(name)
        searcher = baseline.prepare(self.case)
        return self._row(title, searcher.search, searcher.rows(searcher.search()), facts)

    def _row(self, title: str, search: Callable[[], Any], rows_QK: np.ndarray, facts: dict[str, Any]) -> Row:
        seconds = by_turns({"ours": self.ours, "baseline": search}, self.options.repetitions)
        order, same_sets = alike(rows_QK, self.exact_QK)
        work = 2e-9 * self.options.rows * self.options.queries * self.options.dimension
        facts = {"gflops": digits(work / float(np.median(seconds["ours"]))), "baseline_equal": order,
                 "baseline_same_sets": same_sets, **facts}
        return Row.of("search", self.work, self.options.queries, "queries/s", seconds["ours"], seconds["baseline"],
                      title, self.is_exact, **facts)

    def with_index(self, pattern: str) -> Iterator[Row]:
        """One approximate index, searched with several widths; where `ratio` is below 1, the exact search is slower."""
        pool, options = self.case.pool, self.options
        factory = pattern.replace("{lists}", str(_lists(pool.rows))).replace("{codes}", str(pool.dimension // 8))
        started = time.perf_counter()
        built = indexes.build_index(factory, pool.blocks, pool.dimension, pool.rows, train_rows=100_000)
        facts = {"build_seconds": round(time.perf_counter() - started, 1)}
        path = self.folder / "approximate.faiss"
        indexes.write_index(built, path)
        facts["index_gb"] = digits(path.stat().st_size / 2**30)
        index, order_N = indexes.read_index(path), indexes.id_order(pool.ids)
        del built
        for parameters in _parameters(factory, _lists(pool.rows)):
            def search(parameters: str = parameters) -> indexes.Hits:
                return indexes.search_index(index, self.case.queries_QD, options.k, order_N, parameters)
            hits = search()
            recall = {f"recall@{cutoff}": round(indexes.recall_against_exact(hits, self.hits, cutoff), 4)
                      for cutoff in sorted({min(10, options.k), options.k})}
            title = f"FAISS {factory}, mapped from a file" + (f", {parameters}" if parameters else "")
            yield self._row(title, search, hits.rows_QK, {**recall, **facts})


def _lists(rows: int) -> int:
    """The power of two nearest to the square root of the rows."""
    return 2 ** max(0, round(math.log2(rows) / 2))


def _parameters(factory: str, lists: int) -> list[str]:
    for kind, (name, widths) in _WIDTHS.items():
        if factory.startswith(kind):
            return [f"{name}={width}" for width in widths if kind != "IVF" or width <= lists]
    return [""]


def ours(case: Case, options: Options, folder: Path) -> Callable[[], Any]:
    """The exact search with what the index stage leaves for it: the statistics are taken once, untimed."""
    path, pool = folder / "statistics.npz", case.pool
    if not path.exists():
        indexes.Statistics.of(pool.blocks(), pool.dimension).save(path)
    statistics, order_N = indexes.Statistics.load(path), indexes.id_order(pool.ids)
    return lambda: indexes.exact_search(case.queries_QD, pool.blocks(), order_N, case.k, statistics,
                                        device=case.device, coarse=options.coarse, kernel=options.kernel,
                                        memory_bytes=int(options.memory_gb * 2**30))


def once(folder: str, flow: str) -> None:
    """One flow over what `prepare` wrote, in this process."""
    import torch  # noqa: F401  before faiss: one pool of threads

    import faiss  # noqa: F401
    options = Options(**json.loads((Path(folder) / "options.json").read_text()))
    pool = Pool(Path(folder) / "pool.float16", options.rows, options.dimension)
    case = Case(pool, np.load(Path(folder) / "queries.npy"), options.k, options.device)
    if flow == "ours":
        ours(case, options, Path(folder))()
    elif flow != "nothing":
        BASELINES[flow].prepare(case).search()
