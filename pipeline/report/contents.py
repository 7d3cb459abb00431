"""What the examples of a report show, read from the tables: queries, rankings, relevant candidates, their contents.

Everything is read once for all examples together, shard by shard, and of each shard only the rows that are shown are
kept: memory grows with the number of examples, not with pools or runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import Artifact, shard_file
from pipeline.embeddings import read_table
from pipeline.report.cells import Cell, Cells, Key
from pipeline.report.collected import Collected, located
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
    parts = Collected(located(task), "query_id").parts(np.array(numbers))
    return dict(zip(numbers, (row for part in parts for row in part.to_pylist())))


def _hits(cell: Cell, numbers: Sequence[int], top: int) -> dict[int, list[Hit]]:
    artifact, queries = cell.scored.job.run, Collected(located(cell.scored.job.task), "query_id")
    found: dict[int, list[Hit]] = {}
    for shard, place_C in queries.places(np.array(numbers)):
        names = queries.ids_of(shard).take(pa.array(place_C))
        run = read_table(artifact.path(shard_file("run", shard)), artifact.fingerprint)
        run = run.filter(pc.is_in(run["query_id"], value_set=names))
        for name, number in zip(names, (place_C + queries.first_rows[shard]).tolist()):
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
        candidates = Collected(located(pool), "candidate_id")
        row_C = np.array(sorted(candidates.rows_by_id(ids).values()))
        found.update(((label, row["candidate_id"]), row) for part in candidates.parts(row_C, _CONTENT)
                     for row in part.to_pylist())
    return found
