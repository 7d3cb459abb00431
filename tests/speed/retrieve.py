"""From embeddings on disk to ranked ids on disk, beside UniIR's flow on the same vectors: time and peak memory.

Ours is the stages index and retrieve over parquet shards of float16. UniIR loads all vectors as float32, normalises
them, adds them to a flat FAISS index, writes and reads it, and searches. Every flow is a process of its own; its peak
is what the operating system saw. Where memory or disk do not suffice for UniIR's, ours runs alone: rows=5600000 is
M-BEIR's union, 8.6 GB that are streamed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Optional

import numpy as np

from pipeline import indexes
from pipeline.artifacts import Artifact, Identity, shard_file
from pipeline.embeddings import EmbeddingStore, write_shard
from pipeline.stages import embed, index, retrieve
from tests.runs import run_table
from tests.speed.comparison import (Process, Row, alone, at_least_one, disk_flaw, memory_flaw, one_of,
                                    peak_of, processes_by_turns, seconds_of)
from tests.speed.synthetic import Generator, alike

ROWS_PER_SHARD = 10_000
_ALONE = "import sys; from tests.speed.retrieve import {0}; {0}(*sys.argv[1:])"
_TITLE = "UniIR's flow with faiss-cpu (load npy, normalise, IndexFlatIP, write, read, search)"


@dataclass(frozen=True)
class Options:
    rows: int = 1_000_000
    queries: int = 1000
    k: int = 100
    dimension: int = 768
    repetitions: int = 5
    baseline: bool = True
    kernel: str = "auto"
    memory_gb: float = 2.0
    device: str = "cpu"
    directory: Optional[str] = None  # where the vectors are written: 2 x rows x dimension bytes, UniIR's 6 x more

    def __post_init__(self) -> None:
        at_least_one(self, "rows", "queries", "k", "dimension", "repetitions")
        one_of("kernel", self.kernel, indexes.KERNELS)

    def gigabytes(self, bytes_per_value: float) -> float:
        return bytes_per_value * self.rows * self.dimension / 2**30


def rows(options: Options) -> Iterator[Row]:
    work = f"{options.rows:,} x {options.dimension}, {options.queries:,} queries, k={options.k}, files to run"
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        root = Path(folder)
        if flaw := disk_flaw(root, options.gigabytes(2.1)):
            yield Row.skipped("retrieve", work, "queries/s", _TITLE, flaw)
            return
        reason = _why_alone(root, options)
        alone("-c", _ALONE.format("write_data"), root, str(options.rows), str(options.queries), str(options.dimension),
              "" if reason else "with .npy")
        flows = {name: partial(_flow, root, name, options) for name in (["ours"] if reason else ["ours", "uniir"])}
        yield _row(root, work, options, processes_by_turns(flows, options.repetitions), reason)


def _why_alone(root: Path, options: Options) -> str:
    """Why UniIR's flow cannot run here, or nothing: float32 vectors and their copy in an index; two more files."""
    if not options.baseline:
        return "baseline=false"
    return memory_flaw(options.gigabytes(8.5)) or disk_flaw(root, options.gigabytes(8.2))


def _flow(root: Path, name: str, options: Options) -> Process:
    with tempfile.TemporaryDirectory(dir=root) as work:
        done = alone("-c", _ALONE.format(name), root, work, str(options.k), str(options.memory_gb), options.device,
                     options.kernel)
        (Path(work) / "ids.json").rename(root / f"{name}.json")
        return done


def _row(root: Path, work: str, options: Options, turns: dict[str, list[Process]], reason: str) -> Row:
    ours = turns["ours"]
    facts: dict[str, Any] = {"seconds": round(median(seconds_of(ours)), 1), "peak_gb": peak_of(ours),
                             "vectors_gb": round(options.gigabytes(2), 2)}
    if reason:
        rate = options.queries / median(seconds_of(ours))
        return Row.skipped("retrieve", work, "queries/s", _TITLE, reason, rate, **facts)
    theirs = turns["uniir"]
    ours_QK, theirs_QK = (np.array(json.loads((root / f"{name}.json").read_text())).reshape(options.queries, -1)
                          for name in ("ours", "uniir"))
    equal, same_sets = alike(theirs_QK, ours_QK)
    facts |= {"baseline_seconds": round(median(seconds_of(theirs)), 1), "baseline_peak_gb": peak_of(theirs),
              "same_sets": same_sets}
    return Row.of("retrieve", work, options.queries, "queries/s", seconds_of(ours), seconds_of(theirs), _TITLE, equal,
                  **facts)


def store(root: Path, name: str) -> Artifact:
    return Artifact(root, name, Identity("embed", 1, embed.Params({"name": name}, "fp32", "float16", "", "exact"), {}))


def write_data(folder: str, num_rows: str, num_queries: str, dimension: str, with_npy: str) -> None:
    """A pool and queries as embedding shards and, for UniIR, as .npy files of float16."""
    generator = Generator(int(dimension))
    for name, count, cone in (("pool", int(num_rows), 0), ("queries", int(num_queries), 1)):
        _write_store(Path(folder), name, count, cone, generator, bool(with_npy))


def _write_store(root: Path, name: str, count: int, cone: int, generator: Generator, with_npy: bool) -> None:
    artifact, shape = store(root, name), (count, generator.dimension)
    copy_ND = np.lib.format.open_memmap(root / f"{name}.npy", "w+", np.float16, shape) if with_npy else None
    for number, start in enumerate(range(0, count, ROWS_PER_SHARD)):
        vectors_ND = generator.vectors(min(ROWS_PER_SHARD, count - start), cone)
        ids = [f"{name}:{start + row}" for row in range(len(vectors_ND))]
        write_shard(artifact.path(shard_file("embeddings", number)), ids, vectors_ND, [None] * len(ids), "float16",
                    artifact.fingerprint)
        if copy_ND is not None:
            copy_ND[start : start + len(ids)] = vectors_ND
    artifact.seal({"rows": count, "dimension": generator.dimension})


def ours(root: str, work: str, depth: str, memory_gb: str, device: str, kernel: str) -> None:
    """The two stages, as a worker runs them."""
    pool, queries = store(Path(root), "pool"), store(Path(root), "queries")
    indexed = index.Job(Artifact(Path(work), "pool", Identity("index", 1, index.Params("Flat", False, 1, 0), {})), pool)
    list(index.make([(indexed, unit) for unit in index.units(indexed)], index.Runtime()))
    indexed.artifact.seal(index.facts(indexed, index.Runtime()))
    runtime = retrieve.Runtime(coarse="auto", kernel=kernel, device=device, queries_per_pass=20_000,
                               memory_gb=float(memory_gb))
    member = retrieve.Member(pool, indexed.artifact, "")
    identity = Identity("retrieve", 1, retrieve.Params(int(depth), "", 0), {})
    num_shards = len(EmbeddingStore.of(queries).files)
    job = retrieve.Job(Artifact(Path(work), "run", identity), queries, num_shards, (member,))
    list(retrieve.make([(job, unit) for unit in retrieve.units(job)], runtime))
    job.artifact.seal(retrieve.facts(job, runtime))
    (Path(work) / "ids.json").write_text(json.dumps(run_table(job.artifact)["candidate_id"].to_pylist()))


def uniir(root: str, work: str, depth: str, *_: str) -> None:
    import torch  # noqa: F401  before faiss: one pool of threads

    import faiss
    pool_ND, queries_QD = (np.load(Path(root) / f"{name}.npy").astype(np.float32) for name in ("pool", "queries"))
    faiss.normalize_L2(pool_ND)
    faiss.normalize_L2(queries_QD)
    built = faiss.index_factory(pool_ND.shape[1], "IDMap,Flat", faiss.METRIC_INNER_PRODUCT)
    built.add_with_ids(pool_ND, np.arange(len(pool_ND)))
    faiss.write_index(built, str(Path(work) / "flat.index"))
    del built, pool_ND
    _, rows_QK = faiss.read_index(str(Path(work) / "flat.index")).search(queries_QD, int(depth))
    (Path(work) / "ids.json").write_text(json.dumps([f"pool:{row}" for row in rows_QK.reshape(-1)]))
