"""show: one query of a task as its run has it. Reads the shard that the query is in, and nothing is computed.

A relevant candidate's rank is known as deep as the run goes; one that the pool does not hold can have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow.compute as pc

from pipeline.artifacts import shard_file
from pipeline.embeddings import read_table
from pipeline.images import ImageStore
from pipeline.loading import choose_prompts
from pipeline.look import Candidate, Picture, Query, View
from pipeline.look.cells import Cell
from pipeline.look.contents import Contents, contents_of
from pipeline.stages.score import PER_QUERY
from pipeline.support.errors import NotReady


def show(cell: Cell, query_id: str, top: int) -> View:
    """UserError with the nearest ids if the task has no such query; NotReady while it is not searched."""
    if not cell.scored.job.run.is_complete():
        raise NotReady(f"this search is not done: python -m pipeline retrieve {cell.experiment.name}")
    queries, pool = contents_of(cell)
    number = queries.row_number(query_id)
    row, hits = queries.row(number), _hits(cell, queries.shard_of(number), query_id)
    judged = judgements(cell, query_id)
    ranked = {hit["candidate_id"]: hit for hit in hits}
    relevant = [candidate_id for candidate_id, relevance in judged.items() if relevance > 0]
    shown = [hit["candidate_id"] for hit in hits[:top]]
    rows = pool.rows_by_id([*shown, *relevant])
    found = {name: _candidate(name, pool, rows, ranked.get(name, {}), judged) for name in [*shown, *relevant]}
    by_rank = sorted((found[name] for name in relevant), key=_place)
    return View(
        cell.scored.encoder, cell.scored.task.name, cell.scored.pool, len(pool),
        query_of(row, cell.queries.artifact.params.instruction, cell.experiment.images), tuple(by_rank),
        tuple(found[name] for name in shown), _metrics(cell, query_id), cell.search.artifact.params.depth)


def query_of(row: Mapping[str, Any], rule: str, images: ImageStore, is_typed: bool = False) -> Query:
    """A row of the task's queries, or one like it, with the prompts that the rule gives it."""
    chosen = choose_prompts(rule, row["query_id"], len(row["instructions"]))
    prompts = [prompt for prompt in chosen if prompt is not None]
    encoded = [row["instructed_texts"][prompt] for prompt in prompts] or [row["text"] or ""]
    return Query(None if is_typed else row["query_id"], row["modality"], row["text"], Picture.of(images, row["image"]),
                 tuple(row["instructions"][prompt] for prompt in prompts), tuple(encoded))


def judgements(cell: Cell, query_id: str) -> dict[str, int]:
    """Candidate id -> the highest relevance that it was judged to have for the query."""
    task = cell.queries.table
    qrels = read_table(task.path("qrels.parquet"), task.fingerprint)
    judged: dict[str, int] = {}
    for row in qrels.filter(pc.equal(qrels["query_id"], query_id)).to_pylist():
        judged[row["candidate_id"]] = max(row["relevance"], judged.get(row["candidate_id"], row["relevance"]))
    return judged


def _hits(cell: Cell, shard: int, query_id: str) -> list[dict[str, Any]]:
    artifact = cell.search.artifact
    run = read_table(artifact.path(shard_file("run", shard)), artifact.fingerprint)
    return list(run.filter(pc.equal(run["query_id"], query_id)).to_pylist())


def _candidate(name: str, pool: Contents, rows: Mapping[str, int], hit: Mapping[str, Any],
               judged: Mapping[str, int]) -> Candidate:
    if name not in rows:
        return Candidate(name, None, None, judged.get(name), in_pool=False)
    return candidate_at(pool, rows[name], hit.get("rank"), hit.get("score"), judged)


def candidate_at(pool: Contents, row: int, rank: int | None, score: float | None,
                 judged: Mapping[str, int]) -> Candidate:
    """The candidate in this row of the pool."""
    values = pool.row(row)
    name = values["candidate_id"]
    return Candidate(name, rank, score, judged.get(name), True, values["modality"], values["text"], values["image"])


def _place(candidate: Candidate) -> tuple[bool, int, str]:
    return not candidate.in_pool, candidate.rank or 2**31, candidate.candidate_id


def _metrics(cell: Cell, query_id: str) -> dict[str, float]:
    """Of this query; nothing while the task is not scored."""
    scores = cell.scored.job.artifact
    if not scores.is_complete():
        return {}
    table = read_table(scores.path(PER_QUERY), scores.fingerprint)
    rows: Iterable[dict[str, Any]] = table.filter(pc.equal(table["query_id"], query_id)).to_pylist()
    return {name: value for row in rows for name, value in row.items() if name != "query_id"}
