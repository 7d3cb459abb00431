"""The derived queries: distinct candidates of one modality among the first of every query, asking for the other.

They form a table of queries like any task's, in the order of the pools' rows, so that equal runs give equal tables,
in whatever order and by how many queries a candidate was found. A derived query keeps its candidate's id.

Shapes: R distinct rows of the pools.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import artifacts
from pipeline.artifacts import Artifact, Identity, shard_file
from pipeline.benchmarks.mbeir import format_string
from pipeline.embeddings import read_table, write_table
from pipeline.plan import Scored, manifest_of
from pipeline.report.candidate_pools import CandidatePools
from pipeline.stages.score import run_tables
from pipeline.tables import CANDIDATES, QUERIES, Query, digest, table_of

VERSION = 1


class Direction(NamedTuple):
    asks: str
    seeks: str

    def __str__(self) -> str:
        return f"{self.asks}_to_{self.seeks}"


DIRECTIONS = (Direction("text", "image"), Direction("image", "text"))


@dataclass(frozen=True)
class Params(artifacts.Params):
    """Candidates at ranks up to `depth`; `prompts` are those of the direction, none where it has none."""

    asks: str
    seeks: str
    depth: int
    prompts: tuple[str, ...]
    rows_per_shard: int


def asking(cell: Scored, direction: Direction, depth: int, prompts: tuple[str, ...], rows_per_shard: int) -> Artifact:
    """The artifact of the derived queries of a search; what is in it is known by the run and the pools' content."""
    job = cell.job
    digests = {f"pool {pool.name}": manifest_of(pool.directory)["digest"] for pool in job.pools}
    params = Params(direction.asks, direction.seeks, depth, prompts, rows_per_shard)
    identity = Identity("collect", VERSION, params, {"run": job.run.fingerprint, **digests})
    return Artifact(job.run.root, f"{job.run.name}.{direction}", identity)


def collect(artifact: Artifact[Params], cell: Scored) -> int:
    """Write the table, unless it is there; returns its rows."""
    if not artifact.is_complete():
        pools, params = CandidatePools.of(cell.job.pools), artifact.params
        row_R = _asking_rows(cell, pools, params)
        shards = []
        for number, first in enumerate(range(0, len(row_R), params.rows_per_shard)):
            table = query_table(pools, row_R[first:first + params.rows_per_shard], params.prompts)
            shards.append(write_queries(artifact, number, table))
        artifact.seal(table_facts(shards, {params.asks: len(row_R)}, params.seeks, cell))
    return int(artifact.manifest()["rows"])


def _asking_rows(cell: Scored, pools: CandidatePools, params: Params) -> np.ndarray:
    found = [np.zeros(0, np.int64)]
    for run in run_tables(cell.job.run, ["query_id", "rank", "candidate_id"]):
        within = run.filter(pc.less_equal(run["rank"], params.depth))
        found.append(np.unique(pools.rows_of(within["candidate_id"])))
    row_R = np.unique(np.concatenate(found))
    modalities = pools.table(row_R, ["modality"])["modality"]
    return row_R[pc.equal(modalities, params.asks).to_numpy()]


def query_table(pools: CandidatePools, row_R: np.ndarray, prompts: tuple[str, ...]) -> pa.Table:
    """Candidates as queries; texts are composed with prompts as M-BEIR's queries are (UniIR, mbeir_dataset.py)."""
    candidates = pools.table(row_R, CANDIDATES.names).to_pylist()
    return table_of([Query(row["candidate_id"], row["text"], row["image"], row["modality"], list(prompts),
                           [instructed(prompt, row["text"]) for prompt in prompts]) for row in candidates], QUERIES)


def instructed(prompt: str, text: str | None) -> str:
    return format_string(f"{prompt} {text or ''}")


def write_queries(artifact: Artifact, number: int, table: pa.Table) -> dict[str, Any]:
    """One shard, and what the manifest says of it."""
    file = shard_file("queries", number)
    write_table(artifact.path(file), table, artifact.fingerprint, compression="zstd")
    return {"file": file, "rows": len(table), "digest": digest(table)}


def table_facts(shards: list[dict[str, Any]], modalities: dict[str, int], seeks: str, cell: Scored) -> dict[str, Any]:
    """As `collect` states them of any task; its images were looked at when the pools were collected."""
    content = " ".join(f"{shard['rows']}:{shard['digest']}" for shard in shards)
    images = " ".join(str(manifest_of(pool.directory)["image_sizes"]) for pool in cell.job.pools)
    return {"rows": sum(shard["rows"] for shard in shards), "modalities": modalities, "shards": shards,
            "digest": sha256(content.encode()).hexdigest(), "image_sizes": sha256(images.encode()).hexdigest(),
            "candidate_modality": seeks}


def asking_tables(artifact: Artifact) -> Iterator[pa.Table]:
    """The shards of a derived table, in order."""
    for shard in manifest_of(artifact.directory)["shards"]:
        yield read_table(artifact.path(shard["file"]), artifact.fingerprint)
