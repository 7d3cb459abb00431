"""Retrieved candidates written per second beside json.dumps per row; complements beside embedding anew.

The first writes the same lines from the same artifacts; the baseline holds the pool as dictionaries and calls
json.dumps once per query. The second runs `complements` over one search of mini M-BEIR twice, in copies of one work
directory: with vectors that are there, and with `reuse=never`; with instructions, and without.

Shapes: Q queries, K hits per query.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np

from pipeline import artifacts
from pipeline.artifacts import Artifact, Identity, shard_file
from pipeline.complements.making import Wanted, make_complements
from pipeline.config import Experiment, load
from pipeline.embeddings import read_table, write_table
from pipeline.plan import make_plan
from pipeline.rag import load_results
from pipeline.report.results import Cells, complements_path
from pipeline.report.retrieved import write_retrieved
from pipeline.report.retrieved_parquet import write_parquet
from pipeline.run import run_experiment
from pipeline.stages.score import Job, run_tables, tables_of
from pipeline.tables import CANDIDATES, QRELS, QUERIES, Candidate, Qrel, Query, table_of
from tests.speed.comparison import Row, at_least_one, by_turns
from tests.speed.score import QUERIES_PER_SHARD, run_table

_STRIDE = 7919  # prime
_WORDS = " ".join(["A photograph of something that stands in a street, in the words of whoever took it"] * 2)


@dataclass(frozen=True)
class Options:
    queries: int = 20_000
    depth: int = 50
    pool: int = 100_000
    repetitions: int = 3
    scale: float = 10.0  # of mini M-BEIR: 10 gives about 10,000 candidates that look for partners
    encoder: str = "quickstart_clip"
    directory: Optional[str] = None

    def __post_init__(self) -> None:
        at_least_one(self, "queries", "depth", "pool", "repetitions")


def rows(options: Options) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        yield from _written(Path(folder), options)
        for rule in ("hashed", "none"):
            yield _complements(Path(folder), options, rule)


@dataclass(frozen=True)
class _Params(artifacts.Params):
    noun: str


def _artifact(root: Path, noun: str) -> Artifact:
    return Artifact(root, noun, Identity("collect", 1, _Params(noun), {}))


def _job(root: Path, options: Options) -> Job:
    """Every third candidate is a text; hits go through the pool in strides."""
    task, pool, run = (_artifact(root, noun) for noun in ("task", "pool", "run"))
    candidates = [Candidate(f"9:{row}", f"{_WORDS}, number {row}.", None, "text") if row % 3 == 0 else
                  Candidate(f"9:{row}", None, f"images/{row % 1000:03}/{row}.jpg", "image")
                  for row in range(options.pool)]
    random, shards = np.random.default_rng(0), []
    for number, first in enumerate(range(0, options.queries, QUERIES_PER_SHARD)):
        query_Q = np.arange(first, min(first + QUERIES_PER_SHARD, options.queries))
        queries = [Query(f"9:{row}", f"What is {row}?", None, "text", ["Find it."], ["Find it. What?"])
                   for row in query_Q.tolist()]
        file = shard_file("queries", number)
        write_table(task.path(file), table_of(queries, QUERIES), task.fingerprint)
        shards.append({"file": file, "rows": len(queries)})
        candidate_QK = (random.integers(options.pool, size=(len(query_Q), 1))
                        + _STRIDE * np.arange(options.depth)) % options.pool
        write_table(run.path(shard_file("run", number)), run_table(query_Q, candidate_QK), run.fingerprint)
    qrels = [Qrel(f"9:{row}", f"9:{row * 3 % options.pool}", 1) for row in range(options.queries)]
    write_table(task.path("qrels.parquet"), table_of(qrels, QRELS), task.fingerprint)
    write_table(pool.path("all.parquet"), table_of(candidates, CANDIDATES), pool.fingerprint)
    for owner, facts in ((task, shards), (pool, [{"file": "all.parquet", "rows": options.pool}])):
        owner.seal({"shards": facts})
    run.seal({"shards": len(shards)})
    return Job(_artifact(root, "score"), run, task, (pool,), _artifact(root, "audit"))


def _plainly(job: Job, path: Path, depth: int) -> None:
    """What anybody would write first."""
    content = {row["candidate_id"]: row for pool in job.pools for row in tables_of(pool, CANDIDATES.names).to_pylist()}
    qrels = read_table(job.task.path("qrels.parquet"), None).to_pylist()
    relevance = {(row["query_id"], row["candidate_id"]): row["relevance"] for row in qrels}
    queries = {row["query_id"]: row for row in tables_of(job.task).to_pylist()}
    hits: dict[str, list[dict[str, Any]]] = {}
    with path.open("w") as file:
        for table in run_tables(job.run):
            hits.clear()
            for hit in table.to_pylist():
                query_id, found = hit["query_id"], content[hit["candidate_id"]]
                judged = relevance.get((query_id, hit["candidate_id"]))
                hits.setdefault(query_id, []).append(
                    {"candidate_id": hit["candidate_id"], "rank": hit["rank"], "score": hit["score"],
                     "relevance": judged, "text": found["text"], "image": found["image"],
                     "modality": found["modality"]})
            for query_id, candidates in hits.items():
                query = {name: queries[query_id][name] for name in ("query_id", "text", "image", "modality")}
                query["instruction"] = queries[query_id]["instructions"][0]
                file.write(json.dumps({"query": query, "candidates": candidates[:depth]}, ensure_ascii=False) + "\n")


def _written(root: Path, options: Options) -> Iterator[Row]:
    job = _job(root, options)
    ours, packed, columns, plain = (root / name for name in ("ours.jsonl", "ours.jsonl.zst", "ours.parquet", "plain"))
    flows: dict[str, Callable[[], Any]] = {
        "ours": partial(write_retrieved, job, ours, options.depth, "first"),
        "zstd": partial(write_retrieved, job, packed, options.depth, "first", "zstd"),
        "parquet": partial(write_parquet, job, columns, options.depth, "first"),
        "plain": partial(_plainly, job, plain, options.depth)}
    seconds = by_turns(flows, options.repetitions)
    expected = list(load_results(plain))
    for name, path in (("ours", ours), ("zstd", packed), ("parquet", columns)):
        equal = all(one == other for one, other in zip(load_results(path), expected, strict=True))
        yield Row.of("results", f"{options.queries} queries x {options.depth}, {name}", options.queries, "rows/s",
                     seconds[name], seconds["plain"], "dictionaries, json.dumps per row", equal, pool=options.pool,
                     megabytes=round(path.stat().st_size / 1e6))


def _complements(root: Path, options: Options, rule: str) -> Row:
    arguments = [f"benchmark.root={root}/data", f"benchmark.options.scale={options.scale}", "pools=[pair]",
                 "unions={pair: [scenes_task0, scenes_task3]}", "tasks=[scenes_task0]", "score.resamples=1",
                 "export.formats=[]", f"encoders=[{options.encoder}]",
                 f"embed.instruction={rule}"]
    run_experiment(load("quickstart", [*arguments, f"work_dir={root}/work"]), [], say=lambda *_: None)
    seconds: dict[str, list[float]] = {"measured": [], "never": []}
    found: dict[str, list[str]] = {}
    for turn in range(options.repetitions):
        for reuse, times in seconds.items():
            copy = root / f"{rule}.{reuse}.{turn}"
            shutil.copytree(root / "work", copy)
            experiment = load("quickstart", [*arguments, f"work_dir={copy}"])
            started = time.perf_counter()
            make_complements(experiment, Wanted(Cells(), depth=100, partners="pair", reuse=reuse), lambda *_: None)
            times.append(time.perf_counter() - started)
            found[reuse] = _partners(experiment)
            asked = _asked(copy)
            shutil.rmtree(copy)
    equal = float(np.mean([one == other for one, other in zip(found["measured"], found["never"], strict=True)]))
    work = f"complements of {asked} candidates, instructions: {rule}"
    return Row.of("results", work, asked, "items/s", seconds["measured"], seconds["never"],
                  "their queries encoded anew", equal, encoder=options.encoder)


def _asked(work: Path) -> int:
    manifests = [path / "manifest.json" for path in (work / "artifacts/collect").iterdir()
                 if "_to_" in path.name and ".sample-" not in path.name]
    return sum(json.loads(path.read_text())["rows"] for path in manifests)


def _partners(experiment: Experiment) -> list[str]:
    cell, = make_plan(experiment).scored
    lines = complements_path(experiment, cell, 100).open()
    return [each and each["candidate_id"] for line in lines for each in json.loads(line)["complements"]]
