"""Queries scored per second beside pytrec_eval: every metric at every usual cutoff, with a value per query.

Both are asked for the same 32 measures of the same random run, a deep one over a large pool. Three comparisons: from
the run's files on disk; from its tables in memory, of which pytrec_eval needs nested dictionaries first; and with
these dictionaries ready. They are built without a Python operation per hit but `zip`, faster than any of its users
does it. Ours joins with the qrels each time. Peaks are those of processes of their own that begin with the files.

Shapes: Q queries, K hits per query, R judged candidates per query.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pyarrow as pa
import pytrec_eval

from pipeline.artifacts import Artifact, Identity, shard_file
from pipeline.embeddings import read_table, write_table
from pipeline.metrics import native
from pipeline.metrics.ranking import Metric, evaluate, judge
from pipeline.stages import retrieve, score
from pipeline.support.errors import UserError
from pipeline.tables import QRELS, RUN
from tests.speed.comparison import Row, alone, at_least_one, by_turns, peak_of, processes_by_turns

CUTOFFS = (1, 5, 10, 20, 50, 100)
CUT = {"hit": "success", "recall": "recall", "precision": "P", "ndcg": "ndcg_cut", "map": "map_cut"}
NAMES = {**{f"{ours}@{k}": f"{theirs}_{k}" for ours, theirs in CUT.items() for k in CUTOFFS},
         "mrr": "recip_rank", "map": "map"}
MEASURES = {f"{theirs}.{','.join(map(str, CUTOFFS))}" for theirs in CUT.values()} | {"recip_rank", "map"}
QUERIES_PER_SHARD = 10_000  # as collect and embed cut them
JUDGED = ["query_id", "rank", "candidate_id"]
_STRIDE = 7919  # prime

Nested = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Options:
    queries: int = 100_000
    depth: int = 100
    relevant: int = 3
    pool: int = 1_000_000
    repetitions: int = 5
    directory: Optional[str] = None

    def __post_init__(self) -> None:
        at_least_one(self, "queries", "depth", "relevant", "repetitions")
        if not (self.relevant <= self.depth <= self.pool and self.pool % _STRIDE):
            raise UserError(f"pool={self.pool} depth={self.depth} relevant={self.relevant}: candidates would repeat",
                            "command line", f"relevant <= depth <= pool, and no multiple of {_STRIDE} as pool")


def rows(options: Options) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        root, sizes = Path(folder), [str(size) for size in vars(options).values()][:4]
        alone("-m", "tests.speed.score", "write", root, *sizes)
        flows = {name: partial(alone, "-m", "tests.speed.score", name, root) for name in ("ours", "theirs")}
        turns = processes_by_turns(flows, 1)
        facts = {"depth": options.depth, "pool": options.pool, "measures": len(NAMES),
                 "matching": "NumPy" if native.load_for(options.queries * options.depth) is None else "native",
                 "peak_gb": peak_of(turns["ours"]), "baseline_peak_gb": peak_of(turns["theirs"])}
        yield from _compared(root, options, facts)


def _compared(root: Path, options: Options, facts: dict[str, Any]) -> Iterator[Row]:
    tables, plain = list(score.run_tables(artifact(root), JUDGED)), plain_tables(root)
    qrels, query_ids = read_qrels(root), read_query_ids(root)
    ready = dictionaries(plain, qrels)
    flows: dict[str, Callable[[], Any]] = {
        "ours from files": partial(ours, root), "theirs from files": partial(theirs, root),
        "ours from tables": lambda: scored(tables, qrels, query_ids),
        "theirs from tables": lambda: trec_eval(*dictionaries(plain, qrels)), "theirs ready": lambda: trec_eval(*ready)}
    found, expected = scored(tables, qrels, query_ids), trec_eval(*ready)
    in_order = [expected[query_id] for query_id in query_ids.to_pylist()]
    difference = max(float(np.abs(found[name] - [values[theirs_name] for values in in_order]).max())
                     for name, theirs_name in NAMES.items())
    del found, expected, in_order
    seconds = by_turns(flows, options.repetitions)
    work = f"{options.queries} queries x {options.depth}"
    for what, mine, other in (("run files", "ours from files", "theirs from files"),
                              ("tables", "ours from tables", "theirs from tables"),
                              ("tables, dictionaries ready", "ours from tables", "theirs ready")):
        yield Row.of("score", f"{work}, {what}", options.queries, "queries/s", seconds[mine], seconds[other],
                     "pytrec_eval", difference < 1e-12, max_difference=difference, **facts)


def scored(run: Iterable[pa.Table], qrels: pa.Table, query_ids: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """As the stage does it."""
    return evaluate(judge(run, qrels, query_ids), [Metric.parse(name) for name in NAMES])


def trec_eval(run: Nested, qrels: Nested) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = pytrec_eval.RelevanceEvaluator(qrels, MEASURES).evaluate(run)
    return found


def ours(root: Path) -> dict[str, np.ndarray]:
    return scored(score.run_tables(artifact(root), JUDGED), read_qrels(root), read_query_ids(root))


def theirs(root: Path) -> dict[str, dict[str, float]]:
    return trec_eval(*dictionaries(plain_tables(root), read_qrels(root)))


def dictionaries(run: list[pa.Table], qrels: pa.Table) -> tuple[Nested, Nested]:
    """{query_id: {candidate_id: number}} of scores and of relevance."""
    scores: Nested = {}
    for table in run:
        scores.update(nested(table, "score"))
    return scores, nested(qrels, "relevance")


def nested(table: pa.Table, name: str) -> Nested:
    """Of a table in which each query's rows stand together."""
    encoded = table["query_id"].combine_chunks().dictionary_encode()
    edges = np.flatnonzero(np.diff(encoded.indices.to_numpy(), prepend=-1, append=-1)).tolist()
    candidate_ids, numbers = table["candidate_id"].to_pylist(), table[name].to_pylist()
    return {query_id: dict(zip(candidate_ids[first:last], numbers[first:last]))
            for query_id, first, last in zip(encoded.dictionary.to_pylist(), edges, edges[1:])}


def artifact(root: Path) -> Artifact:
    return Artifact(root, "run", Identity("retrieve", 1, retrieve.Params(100, "", 0), {}))


def plain_tables(root: Path) -> list[pa.Table]:
    run = artifact(root)
    return [read_table(path, run.fingerprint, ["query_id", "candidate_id", "score"])
            for path in sorted(run.directory.glob("run-*"))]


def read_qrels(root: Path) -> pa.Table:
    return read_table(root / "qrels.parquet", None)


def read_query_ids(root: Path) -> pa.ChunkedArray:
    return read_table(root / "queries.parquet", None)["query_id"]


def write(root: Path, queries: int, depth: int, relevant: int, pool: int) -> None:
    """Strides through the pool: no candidate twice under one query. About half of what is judged is in the run."""
    random, run = np.random.default_rng(0), artifact(root)
    qrels = []
    for number, first in enumerate(range(0, queries, QUERIES_PER_SHARD)):
        query_Q = np.arange(first, min(first + QUERIES_PER_SHARD, queries))
        candidate_QK = (random.integers(pool, size=(len(query_Q), 1)) + _STRIDE * np.arange(depth)) % pool
        path = run.path(shard_file("run", number))
        write_table(path, run_table(query_Q, candidate_QK), run.fingerprint, compression="zstd")
        place_QR = np.argsort(random.random(candidate_QK.shape), axis=1)[:, :relevant]
        judged_QR = np.take_along_axis(candidate_QK, place_QR, axis=1)
        judged_QR += pool * (random.random(judged_QR.shape) < 0.5)  # not in the run, nor in the pool
        qrels.append(pa.Table.from_arrays(
            [ids(np.repeat(query_Q, relevant)), ids(judged_QR.reshape(-1)),
             pa.array(random.integers(0, 3, judged_QR.size, np.int32))], schema=QRELS))
    write_table(root / "qrels.parquet", pa.concat_tables(qrels), run.fingerprint)
    write_table(root / "queries.parquet", pa.table({"query_id": ids(np.arange(queries))}), run.fingerprint)
    run.seal({})


def run_table(query_Q: np.ndarray, candidate_QK: np.ndarray) -> pa.Table:
    num_queries, depth = candidate_QK.shape
    return pa.Table.from_arrays(
        [ids(np.repeat(query_Q, depth)), pa.array(np.tile(np.arange(1, depth + 1, dtype=np.int32), num_queries)),
         ids(candidate_QK.reshape(-1)), pa.array(np.tile(np.linspace(1, 0, depth, dtype=np.float32), num_queries))],
        schema=RUN)


def ids(numbers: np.ndarray) -> pa.Array:
    """Written as M-BEIR writes them."""
    return pa.array(np.char.add("9:", numbers.astype(str)))


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        {"ours": ours, "theirs": theirs}[sys.argv[1]](Path(sys.argv[2]))
