"""What the examples of a report show, read from the tables: queries, rankings, relevant candidates, their contents.

Everything is read once for all examples together, shard by shard, and of each shard only the rows that are shown are
kept: memory grows with the number of examples, not with pools or runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import Artifact, shard_file
from pipeline.embeddings import read_table
from pipeline.plan import manifest_of
from pipeline.report.cells import Cell, Cells, Key
from pipeline.report.examples import Example
from pipeline.report.survey import KINDS, NOTHING, RELEVANT

SHOWN_RELEVANT = 3
_CONTENT = ("candidate_id", "text", "image", "modality")


class Hit(NamedTuple):
    """A candidate at a rank; `kind` is one of survey.KINDS, or empty beyond the ranks that were looked at singly."""

    candidate_id: str
    rank: int
    score: float
    kind: str


@dataclass(frozen=True)
class Contents:
    """Rows of tables as dictionaries.

    queries     (task, position) -> a row of the queries table
    hits        (cell, position) -> the first hits, and the first relevant one where it comes later
    relevant    (task, position) -> ids of relevant candidates, the most relevant first, all of them
    candidates  (pool label, id) -> a row of a candidates table
    """

    queries: Mapping[tuple[str, int], dict[str, Any]]
    hits: Mapping[tuple[Key, int], list[Hit]]
    relevant: Mapping[tuple[str, int], list[str]]
    candidates: Mapping[tuple[str, str], dict[str, Any]]

    def candidate(self, cell: Cell, candidate_id: str) -> dict[str, Any] | None:
        """None if it is in none of the pools that the cell searched."""
        found = (self.candidates.get((pool.label, candidate_id)) for pool in cell.scored.job.pools)
        return next((row for row in found if row is not None), None)


def read_contents(cells: Cells, examples: Sequence[Example], top: int) -> Contents:
    """Everything that the examples show, with the first `top` hits of every ranking."""
    of_task: dict[str, set[int]] = {}
    of_cell: dict[Key, set[int]] = {}
    for example in examples:
        of_task.setdefault(example.task, set()).add(example.query)
        for key in example.shown:
            of_cell.setdefault(key, set()).add(example.query)
    queries = {(task, number): row for task, numbers in of_task.items()
               for number, row in _queries(cells.of_task(task).scored.job.task, sorted(numbers)).items()}
    hits = {(key, number): found for key, numbers in of_cell.items()
            for number, found in _hits(cells.by_key[key], sorted(numbers), top).items()}
    relevant = {(task, number): ids for task, numbers in of_task.items()
                for number, ids in _relevant(cells.of_task(task).scored.job.task, queries, task, numbers).items()}
    return Contents(queries, hits, relevant, _candidates(_wanted(cells, hits, relevant)))


def _queries(task: Artifact, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for stretch in _stretches(task, numbers):
        rows = read_table(task.path(stretch.file), task.fingerprint).take(stretch.rows())
        found.update(zip(stretch.numbers, rows.to_pylist()))
    return found


class _Stretch(NamedTuple):
    """A shard of a task with some of the positions asked for: its number, its file, its first row, those positions."""

    shard: int
    file: str
    first: int
    numbers: list[int]

    def rows(self) -> pa.Array:
        return pa.array([number - self.first for number in self.numbers])


def _stretches(task: Artifact, numbers: Sequence[int]) -> Iterator[_Stretch]:
    first = 0
    for shard, entry in enumerate(manifest_of(task.directory)["shards"]):
        some = [number for number in numbers if first <= number < first + entry["rows"]]
        if some:
            yield _Stretch(shard, entry["file"], first, some)
        first += entry["rows"]


def _hits(cell: Cell, numbers: Sequence[int], top: int) -> dict[int, list[Hit]]:
    job = cell.scored.job
    found: dict[int, list[Hit]] = {}
    for stretch in _stretches(job.task, numbers):
        queries = read_table(job.task.path(stretch.file), job.task.fingerprint, ["query_id"])
        names = queries["query_id"].take(stretch.rows())
        run = read_table(job.run.path(shard_file("run", stretch.shard)), job.run.fingerprint)
        run = run.filter(pc.is_in(run["query_id"], value_set=names))
        for name, number in zip(names, stretch.numbers):
            found[number] = _shown(run.filter(pc.equal(run["query_id"], name)), cell, number, top)
    return found


def _shown(run: pa.Table, cell: Cell, number: int, top: int) -> list[Hit]:
    """The first hits of one query, and the first relevant one."""
    relevant = int(cell.survey.first_Q[number])
    rows = run.filter(pc.or_(pc.less_equal(run["rank"], top), pc.equal(run["rank"], relevant))).to_pylist()
    return [Hit(row["candidate_id"], row["rank"], row["score"], _kind(cell, number, row["rank"])) for row in rows]


def _kind(cell: Cell, number: int, rank: int) -> str:
    if rank == cell.survey.first_Q[number]:
        return KINDS[RELEVANT]
    kinds = cell.survey.kind_QR[number]
    kind = int(kinds[rank - 1]) if rank <= len(kinds) else NOTHING
    return KINDS[kind] if kind != NOTHING else ""


def _relevant(task: Artifact, queries: Mapping[tuple[str, int], Mapping[str, Any]], name: str,
              numbers: Iterable[int]) -> dict[int, list[str]]:
    qrels = read_table(task.path("qrels.parquet"), task.fingerprint)
    numbers_of = {queries[name, number]["query_id"]: number for number in numbers}
    is_wanted = pc.and_(pc.is_in(qrels["query_id"], value_set=pa.array(list(numbers_of))),
                        pc.greater(qrels["relevance"], 0))
    found: dict[int, list[str]] = {number: [] for number in numbers}
    for row in sorted(qrels.filter(is_wanted).to_pylist(), key=lambda row: -row["relevance"]):
        ids = found[numbers_of[row["query_id"]]]
        if row["candidate_id"] not in ids:
            ids.append(row["candidate_id"])
    return found


def _wanted(cells: Cells, hits: Mapping[tuple[Key, int], list[Hit]],
            relevant: Mapping[tuple[str, int], list[str]]) -> dict[str, tuple[Artifact, set[str]]]:
    """Pool label -> the pool, and the ids to be looked for in it."""
    found: dict[str, tuple[Artifact, set[str]]] = {}
    for (key, number), some in hits.items():
        ids = {hit.candidate_id for hit in some} | set(relevant[key[1], number][:SHOWN_RELEVANT])
        for pool in cells.by_key[key].scored.job.pools:
            found.setdefault(pool.label, (pool, set()))[1].update(ids)
    return found


def _candidates(wanted: Mapping[str, tuple[Artifact, set[str]]]) -> dict[tuple[str, str], dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for label, (pool, ids) in wanted.items():
        value_set = pa.array(sorted(ids), pa.string())
        for shard in manifest_of(pool.directory)["shards"]:
            path = pool.path(shard["file"])
            names = read_table(path, pool.fingerprint, ["candidate_id"])["candidate_id"]
            place = np.flatnonzero(pc.is_in(names, value_set=value_set).to_numpy(zero_copy_only=False))
            if len(place):
                rows = read_table(path, pool.fingerprint, _CONTENT).take(pa.array(place)).to_pylist()
                found.update(((label, row["candidate_id"]), row) for row in rows)
    return found
