"""Vectors that are there already, for derived queries: a candidate's own, and with a prompt that of an image plus the
prompt's.

The first holds for encoders that encode what is asked as they encode what is found, the second for those that add
the vectors of text and image (score fusion). Neither is taken on trust: a few derived queries are encoded like any
query, and only if the vectors made from what is there are the same are they used for all. A text that is given a
prompt is another text, so it is always encoded.

Shapes: R derived queries, P prompts, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipeline.artifacts import Artifact, Identity, shard_file
from pipeline.complements.asking import (
    Direction, asking_tables, collect, query_table, table_facts, write_queries,
)
from pipeline.embeddings import read_table, vectors_of, write_shard
from pipeline.encoding import unit_vectors
from pipeline.loading import choose_prompts
from pipeline.plan import Scored, manifest_of
from pipeline.report.candidate_pools import CandidatePools
from pipeline.stages import embed
from pipeline.tables import QUERIES, Query, table_of

REUSE = ("measured", "always", "never")
SAMPLE = 8
# Relative to a vector's length: 16-bit storage rounds by 0.0005 of it, 16-bit arithmetic by some ten times as much.
TOLERANCES = {"fp32": 0.002, "bf16": 0.02, "fp16": 0.02}


@dataclass(frozen=True)
class Stored:
    """The vectors of the candidates of a search, by row of its pools."""

    collected: tuple[Artifact, ...]
    shards: tuple[tuple[Artifact, str], ...]

    @classmethod
    def of(cls, cell: Scored, embedded: Sequence[Artifact]) -> Stored:
        """`embedded`: the embeddings of the pools of `cell`, in their order."""
        shards = [(artifact, shard_file("embeddings", number)) for artifact, pool in zip(embedded, cell.job.pools)
                  for number in range(len(manifest_of(pool.directory)["shards"]))]
        return cls(cell.job.pools, tuple(shards))

    @property
    def pools(self) -> CandidatePools:
        return CandidatePools.of(self.collected)

    def vectors(self, row_R: np.ndarray) -> tuple[np.ndarray, list[str | None]]:
        """float32 [R, D] and the flaws of ascending rows."""
        parts: list[np.ndarray] = []
        flaws: list[str | None] = []
        for shard, places in self.pools.places(row_R):
            artifact, file = self.shards[shard]
            table = read_table(artifact.path(file), artifact.fingerprint)
            parts.append(vectors_of(table)[places].astype(np.float32))
            flaws.extend(table["flaw"].take(places).to_pylist())
        return np.concatenate(parts), flaws


@dataclass(frozen=True)
class Derived:
    """One direction of a search: its table of derived queries, and how they are encoded."""

    cell: Scored
    direction: Direction
    table: Artifact
    job: embed.Job
    stored: Stored

    @property
    def prompts(self) -> tuple[str, ...]:
        prompts: tuple[str, ...] = self.table.params.prompts
        return prompts

    @property
    def may_reuse(self) -> bool:
        return self.direction.asks == "image" or not self.prompts

    def collect(self) -> int:
        return collect(self.table, self.cell)

    def sample(self) -> embed.Job:
        """A few of the queries, and each prompt alone, to be encoded; the table is written here if it is missing."""
        params = replace(self.table.params, depth=0)  # tells it from the whole table, of which it is a sample
        inputs = {"table": manifest_of(self.table.directory)["digest"]}
        table = Artifact(self.table.root, f"{self.table.name}.sample", Identity("collect", 1, params, inputs))
        if not table.is_complete():
            row_R = np.concatenate([self._rows(part["query_id"].to_pylist()) for part in asking_tables(self.table)])
            chosen = row_R[np.unique(np.linspace(0, len(row_R) - 1, SAMPLE).astype(int))]
            asked = query_table(self.stored.pools, chosen, self.prompts).to_pylist()
            alone = [Query(f"prompt {number}", prompt, None, "text", [], [])
                     for number, prompt in enumerate(self.prompts)]
            rows = [*(Query(**row) for row in asked), *alone]
            modalities = {name: count for name, count in ((self.direction.asks, len(asked)), ("text", len(alone)))
                          if count}
            shard = write_queries(table, 0, table_of(rows, QUERIES))
            table.seal(table_facts([shard], modalities, self.direction.seeks, self.cell))
        return embed_job(self.job, table, f"{self.job.artifact.name}.sample", storage="float32")

    def agrees(self, sample: embed.Job) -> bool:
        """Whether the encoded sample is what would be made from stored vectors."""
        table = read_table(sample.artifact.path(shard_file("embeddings", 0)), sample.artifact.fingerprint)
        encoded_RD, count = vectors_of(table), len(table) - len(self.prompts)
        ids = table["id"].to_pylist()[:count]
        made_RD, _ = self.made(ids, encoded_RD[count:])
        off_R = np.linalg.norm(made_RD - encoded_RD[:count], axis=1)
        return bool((off_R <= TOLERANCES[self.job.artifact.params.precision]
                     * np.linalg.norm(encoded_RD[:count], axis=1)).all())

    def made(self, ids: list[str], prompts_PD: np.ndarray) -> tuple[np.ndarray, list[str | None]]:
        """float32 [R, D] from what is stored, as the stage would have made them under the same rule; and flaws."""
        stored_RD, flaws = self.stored.vectors(self._rows(ids))
        rule = self.job.artifact.params.instruction
        made_RD = np.zeros_like(stored_RD)
        for row, query_id in enumerate(ids):
            for prompt in choose_prompts(rule, query_id, len(prompts_PD)):
                vector_1D = stored_RD[row:row + 1] + (0 if prompt is None else prompts_PD[prompt])
                made_RD[row] += unit_vectors(vector_1D)[0] if rule == "all" else vector_1D[0]
        return made_RD, flaws

    def reused(self, sample: embed.Job | None) -> embed.Job:
        """The job whose shards are made from stored vectors, and says so by another identity; its shards are written.

        Without a sample there are no prompts: the vectors are the candidates' own.
        """
        used = {f"vectors {artifact.name}": artifact.fingerprint for artifact, _ in self.stored.shards}
        job = embed_job(self.job, self.table, self.job.artifact.name, inputs=used)
        prompts_PD = np.zeros((0, 0), np.float32)
        if sample is not None and self.prompts:
            table = read_table(sample.artifact.path(shard_file("embeddings", 0)), sample.artifact.fingerprint)
            prompts_PD = vectors_of(table)[-len(self.prompts):]
        for unit, queries in zip(embed.units(job), asking_tables(self.table)):
            if not job.artifact.path(unit).exists():
                ids = queries["query_id"].to_pylist()
                made_RD, flaws = self.made(ids, prompts_PD)
                write_shard(job.artifact.path(unit), ids, made_RD, flaws, job.artifact.params.storage,
                            job.artifact.fingerprint)
        return job

    def _rows(self, ids: Sequence[str]) -> np.ndarray:
        return self.stored.pools.rows_of(pa.array(ids, pa.string()))


def embed_job(like: embed.Job, table: Artifact, name: str, storage: str | None = None,
              inputs: dict[str, str] | None = None) -> embed.Job:
    """The job that encodes a derived table with the encoder of another job, as the plan makes those of tasks."""
    manifest, before = manifest_of(table.directory), like.artifact
    params = replace(before.params, storage=storage or before.params.storage)
    known = {"table": manifest["digest"], "images": manifest["image_sizes"], **(inputs or {})}
    identity = Identity("embed", embed.VERSION, params, known)
    return replace(like, artifact=Artifact(before.root, name, identity), table=table)
