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


def measure(flow: str, root: Path, depth: int) -> tuple[float, float, list[str]]:
    with tempfile.TemporaryDirectory(dir=root) as work:
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "tests.speed.bench_retrieve", "--flow", flow,
                                    "--root", str(root), "--work", work, "--depth", str(depth)], cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{flow} failed")
        return time.perf_counter() - started, usage.ru_maxrss / 2**20, json.loads((Path(work) / "ids.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("rows", 1_000_000), ("queries", 1000), ("dimension", 768), ("depth", 100), ("repetitions", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--directory",
                        help="where the vectors are written; they take 3 x rows x dimension x 2 bytes and more")
    for name in ("flow", "root", "work"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flow:
        {"ours": ours, "uniir": uniir}[options.flow](Path(options.root), Path(options.work), options.depth)
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        root, generator = Path(folder), Generator(options.dimension)
        for name, rows, cone in (("pool", options.rows, 0), ("queries", options.queries, 1)):
            write_store(root, name, rows, cone, generator)
            blocks = EmbeddingStore.of(store(root, name)).blocks()
            np.save(root / f"{name}.npy", np.concatenate([block.vectors_ND for block in blocks]))
        runs = [(measure("ours", root, options.depth), measure("uniir", root, options.depth))
                for _ in range(options.repetitions)]
    seconds, baseline = median(ours[0] for ours, _ in runs), median(theirs[0] for _, theirs in runs)
    same = np.mean([a == b for a, b in zip(runs[0][0][2], runs[0][1][2])])
    print(json.dumps({
        "name": "retrieve",
        "work": f"{options.queries} queries, {options.rows} x {options.dimension}, depth {options.depth}",
        "ours": round(seconds, 1), "baseline": round(baseline, 1), "baseline_name": "UniIR's flow with faiss-cpu",
        "unit": "s", "ratio": round(baseline / seconds, 2), "peak_gb": round(max(ours[1] for ours, _ in runs), 2),
        "baseline_peak_gb": round(max(theirs[1] for _, theirs in runs), 2), "equal": round(float(same), 5)}))


if __name__ == "__main__":
    main()
