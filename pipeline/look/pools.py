"""A pool opened once for many searches: the indexes of its members, and its vectors where they fit into memory.

What a search finds is what the retrieve stage finds for the same vector. Vectors beyond `retrieve.memory_gb` are read
again for every search, from the page cache if the system keeps them there.

Shapes: Q queries, D dimensions, N rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from pipeline import indexes
from pipeline.devices import resolve_device
from pipeline.embeddings import EmbeddingStore, Union
from pipeline.settings import RetrieveSettings
from pipeline.stages import retrieve
from pipeline.support.errors import NotReady


class OpenPool:
    """NotReady unless all its members are embedded and indexed."""

    def __init__(self, job: retrieve.Job, settings: RetrieveSettings):
        self.job, self.settings = job, settings
        self.members = sorted(job.members, key=lambda member: member.embeddings.name)  # as a union has its rows
        for artifact in (artifact for member in self.members for artifact in (member.embeddings, member.index)):
            if not artifact.is_complete():
                raise NotReady(f"{artifact.label} is not made yet: run the experiment first, up to `index`")
        self.pool = Union.of([EmbeddingStore.of(member.embeddings) for member in self.members])
        self.statistics = indexes.Statistics.merged(
            [indexes.Statistics.load(member.index.path("statistics.npz")) for member in self.members])
        self.id_order_N = indexes.id_order(self.pool.ids())

    @cached_property
    def _faiss(self) -> list[Any]:
        return [indexes.read_index(member.index.path(member.faiss_file)) for member in self.members]

    @cached_property
    def _in_memory(self) -> list[tuple[int, np.ndarray]] | None:
        sizes = (entry["bytes"] for member in self.members for entry in member.embeddings.manifest()["files"])
        if sum(sizes) > self.settings.memory_gb * 2**30:
            return None
        return [(block.first_row, block.vectors_ND) for block in self.pool.blocks()]

    def hits(self, queries_QD: np.ndarray, count: int) -> indexes.Hits:
        """At least the first `count` of each query. As deep as the runs are: a graph finds others when asked for less.
        """
        depth = max(count, self.job.artifact.params.depth)
        if not self.job.is_exact:
            return self._approximate(queries_QD, depth)
        return indexes.exact_search(
            queries_QD, self._blocks(), self.id_order_N, depth, self.statistics,
            device=resolve_device(self.settings.device), coarse=self.settings.coarse, kernel=self.settings.kernel,
            memory_bytes=int(self.settings.memory_gb * 2**30))

    def _blocks(self) -> Iterable[tuple[int, np.ndarray]]:
        return self._in_memory or ((block.first_row, block.vectors_ND) for block in self.pool.blocks())

    def _approximate(self, queries_QD: np.ndarray, depth: int) -> indexes.Hits:
        found: list[tuple[indexes.Hits, int]] = []
        first_row, parameters = 0, self.job.artifact.params.faiss_parameters
        for index, member in zip(self._faiss, self.pool.members):
            order_N = self.id_order_N[first_row:first_row + member.rows]
            found.append((indexes.search_index(index, queries_QD, depth, order_N, parameters), first_row))
            first_row += member.rows
        return indexes.merge_hits(found, self.id_order_N, depth)
