"""Answers against references: which texts they are, means with intervals, and one row per answer to look at.

Promise: no answer is left out of a mean because it is bad: a query without an answer counts as an empty one. What
cannot be scored (a query without references) is counted. The trade: whatever a task's qrels call relevant is taken for
a reference, which is right for captions and wrong for passages that merely contain an answer.
"""

# Shapes: Q answers, M metrics.

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline.artifacts import Artifact, atomic_path, write_json
from pipeline.embeddings import read_table
from pipeline.generation import answers
from pipeline.generation.questions import table_rows
from pipeline.generation.text_scores import PER_ANSWER, bleu_of_all, versions
from pipeline.significance import bootstrap_interval
from pipeline.stages.score import Job
from pipeline.support.errors import UserError
from pipeline.support.rows import json_rows

References = Mapping[str, Sequence[str]]  # query id -> texts


@dataclass(frozen=True)
class Interval:
    """Of means over queries: as `score.confidence`, `score.resamples` and `score.seed`."""

    confidence: float
    resamples: int
    seed: int


def relevant_texts(job: Job) -> dict[str, list[str]]:
    """Texts of each query's relevant candidates in the pool that was searched; those without text are no reference."""
    qrels = read_table(job.task.path("qrels.parquet"), job.task.fingerprint)
    relevant = qrels.filter(pc.greater(qrels["relevance"], 0))
    wanted = set(relevant["candidate_id"].to_pylist())
    texts = {row["candidate_id"]: row["text"] for pool in job.pools for row in table_rows(pool)
             if row["candidate_id"] in wanted and row["text"] and row["text"].strip()}
    found: dict[str, list[str]] = {}
    for query_id, candidate_id in zip(relevant["query_id"].to_pylist(), relevant["candidate_id"].to_pylist()):
        if candidate_id in texts:
            found.setdefault(query_id, []).append(texts[candidate_id])
    return found


def read_references(path: Path) -> dict[str, list[str]]:
    """From lines {"query_id", "references": [texts]}; UserError for anything else."""
    found: dict[str, list[str]] = {}
    for row in json_rows(path):
        given = row.fields.get("references")
        if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
            raise row.error("`references` must be a list of texts")
        if (query_id := row.identifier("query_id")) in found:
            raise row.error(f"query '{query_id}' stands twice")
        found[query_id] = given
    return found


def score(artifact: Artifact[answers.Params], references: References, metrics: Sequence[str],
          interval: Interval) -> dict[str, Any]:
    """Score a complete set of answers; writes two files beside it and returns what stands in the first.

    `<set>.scores.json`: per metric its mean and interval (BLEU: the value), and how many answers are behind them;
    `<set>.scored.jsonl`: the answer of each query with its references and scores.
    """
    rows = [row for row in answers.rows(artifact) if row["query_id"] in references]
    if not rows:
        raise UserError("no query has a reference: nothing can be scored", artifact.name,
                        'give texts: --references FILE, lines of {"query_id": ..., "references": [...]}')
    texts = [row["answer"] or "" for row in rows]
    own = [references[row["query_id"]] for row in rows]
    values = {name: PER_ANSWER[name](texts, own) for name in metrics if name in PER_ANSWER}
    found = _summary(artifact, rows, _means(values, interval), versions(metrics))
    if "bleu" in metrics:
        value, signature = bleu_of_all(texts, own)
        found["scores"]["bleu"] = {"value": value, "signature": signature}
    path = artifact.directory.with_name(f"{artifact.directory.name}.scores.json")
    write_json(path, found)
    with atomic_path(path.with_name(f"{artifact.directory.name}.scored.jsonl")) as temporary:
        lines = [{"query_id": row["query_id"], "answer": row["answer"], "references": list(texts),
                  **{name: float(values_Q[number]) for name, values_Q in values.items()}}
                 for number, (row, texts) in enumerate(zip(rows, own))]
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return found


def _means(values: Mapping[str, np.ndarray], interval: Interval) -> dict[str, Any]:
    if not values:
        return {}
    values_QM = np.stack(list(values.values()), axis=1)
    low_M, high_M = bootstrap_interval(values_QM, interval.confidence, interval.resamples, interval.seed)
    return {name: {"mean": float(values_QM[:, place].mean()), "low": float(low_M[place]), "high": float(high_M[place])}
            for place, name in enumerate(values)}


def _summary(artifact: Artifact[answers.Params], rows: Sequence[Mapping[str, Any]], scores: dict[str, Any],
             libraries: Mapping[str, str]) -> dict[str, Any]:
    queries = artifact.manifest()["queries"]
    return {"answers": artifact.label, "queries": queries, "scored": len(rows),
            "without_references": queries - len(rows), "without_answer": sum(row["answer"] is None for row in rows),
            "scores": scores, "libraries": dict(libraries)}
