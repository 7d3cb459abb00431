"""Benchmarks: one file per family says how to read it. The file name is the registry.

An adapter is a module with

    prepare(benchmark)                     make sure the data are there; a generator may write them
    task_sources(benchmark, task)          the files a task is read from: when they change, it is collected again
    pool_sources(benchmark, pool)          the same for a pool
    queries(benchmark, task)               iterator of tables.Query
    candidates(benchmark, pool)            iterator of tables.Candidate
    qrels(benchmark, task)                 iterator of tables.Qrel
    candidate_modality(benchmark, task)    the modality of what is sought, or None if the task does not fix it

and, where typed texts are to be written as its own are,

    format_string(text) -> str             for `search`

and, for `train` and `mine-negatives` only, as far as its files know of such things,

    candidate_lists(benchmark, task)       iterator of (query id, ids of its positives, ids of its hard negatives)
    train_repeats(benchmark)               query id -> how often it stands in an epoch
    train_sources(benchmark)               the files that both are read from
    rewrite_negatives(benchmark, negatives, directory)    writes its train queries with other hard negatives
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from pipeline.support.plugins import load_plugin
from pipeline.tables import Candidate, Qrel, Query


@dataclass(frozen=True)
class Task:
    """Queries, the pool they search, the cutoffs to report and the one number that goes into the average."""

    name: str
    pool: str
    cutoffs: tuple[int, ...]
    headline: str


@dataclass(frozen=True)
class Benchmark:
    """A named list of tasks that come from one family of files under `root`."""

    name: str
    adapter: str
    root: str
    split: str
    tasks: tuple[Task, ...]
    archives: tuple[str, ...] = ()
    trusted_roots: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pools(self) -> tuple[str, ...]:
        """Names of all pools, each once, in task order: the members of the union."""
        return tuple(dict.fromkeys(task.pool for task in self.tasks))


class Adapter(Protocol):
    def prepare(self, benchmark: Benchmark) -> None: ...
    def task_sources(self, benchmark: Benchmark, task: Task) -> list[Path]: ...
    def pool_sources(self, benchmark: Benchmark, pool: str) -> list[Path]: ...
    def queries(self, benchmark: Benchmark, task: Task) -> Iterator[Query]: ...
    def candidates(self, benchmark: Benchmark, pool: str) -> Iterator[Candidate]: ...
    def qrels(self, benchmark: Benchmark, task: Task) -> Iterator[Qrel]: ...
    def candidate_modality(self, benchmark: Benchmark, task: Task) -> str | None: ...


REQUIRES = ("prepare", "task_sources", "pool_sources", "queries", "candidates", "qrels", "candidate_modality")


def load_adapter(name: str) -> Adapter:
    """The adapter `pipeline/benchmarks/<name>.py`, or a user's own module under a dotted path."""
    module: ModuleType = load_plugin("benchmark adapter", "pipeline.benchmarks", name, REQUIRES)
    return cast(Adapter, module)
