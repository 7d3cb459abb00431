"""index: a pool's embedding shards -> what its search needs.

`Flat` is this project's exact search, which reads the shards themselves: its index is a handful of statistics
(and a FAISS file only if one is asked for). Any other FAISS factory string is built in blocks, holds row numbers
only, and is approximate: `retrieve` measures its recall against the exact search and says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline import artifacts, indexes
from pipeline.artifacts import Artifact, atomic_path
from pipeline.embeddings import EmbeddingStore
from pipeline.support.progress import Landed

VERSION = 1
STATISTICS = "statistics.npz"
FAISS = "index.faiss"


@dataclass(frozen=True)
class Params(artifacts.Params):
    factory: str
    write_faiss: bool
    train_rows: int
    seed: int

    @property
    def is_exact(self) -> bool:
        return self.factory == "Flat"

    def needed(self) -> Params:
        """Without what has no bearing: a flat index is not trained."""
        return replace(self, train_rows=0, seed=0) if self.is_exact else self


@dataclass(frozen=True)
class Runtime(artifacts.Runtime):
    pass


@dataclass(frozen=True)
class Job:
    artifact: Artifact[Params]
    embeddings: Artifact


def units(job: Job) -> list[str]:
    needs_faiss = job.artifact.params.write_faiss or not job.artifact.params.is_exact
    return [STATISTICS, *([FAISS] if needs_faiss else [])]


def make(work: Sequence[tuple[Job, str]], runtime: Runtime) -> Iterator[Landed]:
    for job, unit in work:
        if job.artifact.path(unit).exists():
            continue
        store = EmbeddingStore.of(job.embeddings)
        if unit == STATISTICS:
            statistics = indexes.Statistics.of(store.blocks(), store.dimension)
            with atomic_path(job.artifact.path(unit)) as path:
                statistics.save(path)
        else:
            _build_faiss(job, store)
        yield Landed(job.artifact.name, unit, store.rows)


def _build_faiss(job: Job, store: EmbeddingStore) -> None:
    params = job.artifact.params
    index = indexes.build_index(params.factory, store.blocks, store.dimension, store.rows,
                                params.train_rows, params.seed)
    with atomic_path(job.artifact.path(FAISS)) as path:
        indexes.write_index(index, path)


def facts(job: Job, runtime: Runtime) -> dict[str, Any]:
    statistics = indexes.Statistics.load(job.artifact.path(STATISTICS))
    return {"rows": statistics.rows, "dimension": statistics.dimension, "zero_vectors": statistics.zero_vectors,
            "exact": job.artifact.params.is_exact}
