"""A pool opened once for many searches: the indexes of its members, and its vectors where they fit into memory.

What a search finds is what the retrieve stage finds for the same vector. Vectors beyond `retrieve.memory_gb` are read
again for every search, from the page cache if the system keeps them there.

Shapes: Q queries, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from pipeline import indexes
from pipeline.stages import retrieve
from pipeline.support.errors import NotReady


class OpenPool(retrieve.Search):
    """NotReady unless all its members are embedded and indexed."""

    def __init__(self, job: retrieve.Job, runtime: retrieve.Runtime):
        for artifact in (artifact for member in job.members for artifact in (member.embeddings, member.index)):
            if not artifact.is_complete():
                raise NotReady(f"{artifact.label} is not made yet: run the experiment first, up to `index`")
        super().__init__(job, runtime)

    def hits(self, queries_QD: np.ndarray, depth: int) -> indexes.Hits:
        """At least the first `depth` of each query. As deep as the runs are: a graph finds others when asked for less.
        """
        return super().hits(queries_QD, max(depth, self.params.depth))

    def blocks(self) -> Iterable[tuple[int, np.ndarray]]:
        return self._in_memory or super().blocks()

    def faiss_index(self, number: int) -> Any:
        return self._faiss[number]

    @cached_property
    def _faiss(self) -> list[Any]:
        return list(map(super().faiss_index, range(len(self.members))))

    @cached_property
    def _in_memory(self) -> list[tuple[int, np.ndarray]] | None:
        sizes = (entry["bytes"] for member in self.members for entry in member.embeddings.manifest()["files"])
        return list(super().blocks()) if sum(sizes) <= self.runtime.memory_gb * 2**30 else None
