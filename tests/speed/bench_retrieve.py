"""index and retrieve over a large pool on disk, beside UniIR's flow on the same vectors, in one run: time and memory.

    python -m tests.speed.bench_retrieve --rows 1000000 --queries 1000 --dimension 768 --depth 100

UniIR loads all vectors as float32, normalises them, adds them to a flat FAISS index, writes and reads it, and
searches; we stream the float16 shards. Every flow runs as a process of its own, alternating; the peak is that of the
process, as the operating system tells it. One JSON line; `equal` compares the ids of both (they may differ where
scores differ by 1e-6).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from pipeline.artifacts import Artifact, Identity, shard_file
from pipeline.embeddings import EmbeddingStore, write_shard
from pipeline.stages import embed, index, retrieve, score
from tests.speed.bench_search import Generator

ROOT = Path(__file__).resolve().parents[2]
ROWS_PER_SHARD = 10_000
SIZES = {"rows": 1_000_000, "queries": 1000, "dimension": 768, "depth": 100, "repetitions": 5}
RUNTIME = retrieve.Runtime(coarse="auto", device="cpu", queries_per_pass=20_000, memory_gb=2.0)


def store(root: Path, name: str) -> Artifact:
    return Artifact(root, name, Identity("embed", 1, embed.Params({"name": name}, "fp32", "float16", ""), {}))


def write_store(root: Path, name: str, rows: int, cone: int, generator: Generator) -> None:
    artifact = store(root, name)
    for number, start in enumerate(range(0, rows, ROWS_PER_SHARD)):
        vectors_ND = generator.vectors(min(ROWS_PER_SHARD, rows - start), cone)
        ids = [f"{name}:{start + row}" for row in range(len(vectors_ND))]
        write_shard(artifact.path(shard_file("embeddings", number)), ids, vectors_ND, [None] * len(ids), "float16",
                    artifact.fingerprint)
    artifact.seal({"rows": rows, "dimension": generator.dimension})


def ours(root: Path, work: Path, depth: int) -> None:
    """The two stages, as a worker runs them."""
    pool, queries = store(root, "pool"), store(root, "queries")
    indexed = index.Job(Artifact(work, "pool", Identity("index", 1, index.Params("Flat", False, 1, 0), {})), pool)
    list(index.make([(indexed, unit) for unit in index.units(indexed)], index.Runtime()))
    indexed.artifact.seal(index.facts(indexed, index.Runtime()))
    member = retrieve.Member(pool, indexed.artifact, "")
    job = retrieve.Job(Artifact(work, "run", Identity("retrieve", 1, retrieve.Params(depth, "", 0), {})), queries,
                       len(EmbeddingStore.of(queries).files), (member,))
    list(retrieve.make([(job, unit) for unit in retrieve.units(job)], RUNTIME))
    job.artifact.seal(retrieve.facts(job, RUNTIME))
    (work / "ids.json").write_text(json.dumps(score.run_table(job.artifact)["candidate_id"].to_pylist()))


def uniir(root: Path, work: Path, depth: int) -> None:
    import torch  # noqa: F401  before faiss: one pool of threads
    import faiss
    pool_ND, queries_QD = (np.load(root / f"{name}.npy").astype(np.float32) for name in ("pool", "queries"))
    faiss.normalize_L2(pool_ND)
    faiss.normalize_L2(queries_QD)
    built = faiss.index_factory(pool_ND.shape[1], "IDMap,Flat", faiss.METRIC_INNER_PRODUCT)
    built.add_with_ids(pool_ND, np.arange(len(pool_ND)))
    faiss.write_index(built, str(work / "flat.index"))
    del built, pool_ND
    _, rows_QK = faiss.read_index(str(work / "flat.index")).search(queries_QD, depth)
    (work / "ids.json").write_text(json.dumps([f"pool:{row}" for row in rows_QK.reshape(-1)]))


def write_data(root: Path, rows: int, queries: int, dimension: int) -> None:
    """In a process of its own: a process passes its own peak of memory on to those that it starts."""
    generator = Generator(dimension)
    for name, count, cone in (("pool", rows, 0), ("queries", queries, 1)):
        write_store(root, name, count, cone, generator)
        blocks = EmbeddingStore.of(store(root, name)).blocks()
        np.save(root / f"{name}.npy", np.concatenate([block.vectors_ND for block in blocks]))


def measure(flow: str, root: Path, options: argparse.Namespace) -> tuple[float, float, list[str]]:
    """Seconds, peak memory in GB and ids found of one flow in a process of its own."""
    with tempfile.TemporaryDirectory(dir=root) as work:
        sizes = [f"--{name}={getattr(options, name)}" for name in SIZES]
        command = [sys.executable, "-m", "tests.speed.bench_retrieve", *sizes, "--flow", flow, "--root", str(root)]
        started = time.perf_counter()
        process = subprocess.Popen([*command, "--work", work], cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{flow} failed")
        found = Path(work) / "ids.json"
        ids = json.loads(found.read_text()) if found.exists() else []
        return time.perf_counter() - started, usage.ru_maxrss / 2**20, ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--directory", help="where the vectors are written: about 8 x rows x dimension bytes")
    for name in ("flow", "root", "work"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flow == "data":
        write_data(Path(options.root), options.rows, options.queries, options.dimension)
    elif options.flow:
        {"ours": ours, "uniir": uniir}[options.flow](Path(options.root), Path(options.work), options.depth)
    else:
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            compare(Path(folder), options)


def compare(root: Path, options: argparse.Namespace) -> None:
    measure("data", root, options)
    runs = [[measure(flow, root, options) for flow in ("ours", "uniir")] for _ in range(options.repetitions)]
    seconds, baseline = (median(run[flow][0] for run in runs) for flow in (0, 1))
    peak, baseline_peak = (max(run[flow][1] for run in runs) for flow in (0, 1))
    work = f"{options.queries} queries, {options.rows} x {options.dimension}, depth {options.depth}"
    print(json.dumps({
        "name": "retrieve", "work": work, "ours": round(seconds, 1), "baseline": round(baseline, 1), "unit": "s",
        "baseline_name": "UniIR's flow with faiss-cpu", "ratio": round(baseline / seconds, 2),
        "peak_gb": round(peak, 2), "baseline_peak_gb": round(baseline_peak, 2),
        "equal": round(float(np.mean(np.array(runs[0][0][2]) == np.array(runs[0][1][2]))), 5)}))


if __name__ == "__main__":
    main()
