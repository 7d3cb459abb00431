"""One row per scored cell (encoder, task, pool), from manifests: what tables, files and trackers show.

Nothing is computed here but the average: a number in a report is a number in a manifest, a fraction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.artifacts import MADE, Artifact
from pipeline.pieces import EncoderChoice
from pipeline.plan import Plan, Scored, manifest_of
from pipeline.support.errors import NotReady


class Value(NamedTuple):
    """A mean over queries and its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Made:
    """How the vectors behind a row were made: what the encoder is (by content), and under which versions."""

    module: str
    identity: Mapping[str, Any]
    weights: str | None
    seed: int | None
    precision: str
    storage: str
    instruction: str
    versions: Mapping[str, str]

    @property
    def has_random_weights(self) -> bool:
        return self.weights is None and self.seed is not None


@dataclass(frozen=True)
class ScoreRow:
    """One cell.

    kind                  "text -> image": of the queries -> of what they seek; "mixed" where it is not one
    metrics               every metric, in the order it was configured in
    ceilings              the best mean of every metric that any search of this pool can reach
    wrong_modality_at_1   share of queries; None where the task seeks no modality in particular
    recall_against_exact  of an approximate index; empty for an exact search
    marks                 what a reader must know beside the number, in words
    """

    encoder: str
    task: str
    kind: str
    pool: str
    queries: int
    candidates: int
    headline: str
    metrics: Mapping[str, Value]
    ceilings: Mapping[str, float]
    wrong_modality_at_1: float | None
    is_exact: bool
    recall_against_exact: Mapping[str, float]
    marks: tuple[str, ...]
    artifact: str
    made: Made

    @property
    def value(self) -> Value:
        """The headline's."""
        return self.metrics[self.headline]

    @property
    def ceiling(self) -> float:
        """The headline's."""
        return self.ceilings[self.headline]


def score_rows(plan: Plan) -> list[ScoreRow]:
    """Every cell in the order of the plan: by encoder, task, pool. NotReady if one is not scored yet."""
    if not plan.is_done("score"):
        raise NotReady("not everything is scored yet")
    embedded = {job.artifact.name: job.artifact for job in plan.jobs["embed"]}
    choices = {choice.name: choice for choice in plan.experiment.encoders}
    return [_row(plan, scored, choices[scored.encoder], embedded) for scored in plan.scored]


def average(rows: Sequence[ScoreRow]) -> float:
    """Unweighted mean of the headlines, as M-BEIR's tables have it: every task counts the same."""
    return sum(row.value.mean for row in rows) / len(rows)


def _row(plan: Plan, scored: Scored, choice: EncoderChoice, embedded: Mapping[str, Artifact]) -> ScoreRow:
    scores = manifest_of(scored.job.artifact.directory)["scores"]
    audit = manifest_of(scored.job.audit.directory)
    run = manifest_of(scored.job.run.directory)
    queries = embedded[f"{scored.encoder}.{scored.task.name}"]
    members = plan.experiment.members(scored.pool, scored.task)
    pools = [embedded[f"{scored.encoder}.pool.{name}"] for name in members]
    made = _made(choice, queries)
    recall = {name: value for name, value in run["recall_against_exact"].items() if name != "queries"}
    # In the order of the job: manifests sort their keys, and hit@10 would stand before hit@5.
    metrics = {name: Value(**scores["metrics"][name]) for name in scored.job.artifact.params.metrics}
    return ScoreRow(
        encoder=scored.encoder, task=scored.task.name, kind=_kind(scored), pool=scored.pool,
        queries=scores["queries"], candidates=audit["candidates"],
        headline=scores["headline"], metrics=metrics,
        ceilings=audit["ceiling"], wrong_modality_at_1=scores["wrong_modality_at_1"],
        is_exact=run["exact"], recall_against_exact=recall,
        marks=tuple(_marks(scores, audit, run, [queries, *pools], made)),
        artifact=scored.job.artifact.label, made=made)


def _kind(scored: Scored) -> str:
    task = manifest_of(scored.job.task.directory)
    pools = {modality for pool in scored.job.pools for modality in manifest_of(pool.directory)["modalities"]}
    return f"{_only(task['modalities'])} -> {task['candidate_modality'] or _only(pools)}"


def _only(modalities: Mapping[str, int] | set[str]) -> str:
    return next(iter(modalities)) if len(modalities) == 1 else "mixed"


def _marks(scores: Mapping[str, Any], audit: Mapping[str, Any], run: Mapping[str, Any],
           embedded: Sequence[Artifact], made: Made) -> Iterator[str]:
    if made.has_random_weights:
        yield "random weights"
    if not run["exact"]:
        yield "approximate index"
    if scores["queries_without_hits"]:
        yield f"{scores['queries_without_hits']} queries without hits"
    if audit["unanswerable_queries"]["count"]:
        yield f"{audit['unanswerable_queries']['count']} queries without a relevant candidate in the pool"
    if audit["relevant_outside_pool"]:
        yield f"{audit['relevant_outside_pool']} of {audit['relevant']} relevant judgements outside the pool"
    if flawed := sum(manifest_of(artifact.directory)["flaws"]["count"] for artifact in embedded):
        yield f"{flawed} flawed items"


def _made(choice: EncoderChoice, queries: Artifact) -> Made:
    params = queries.identity.as_json()["params"]
    identity = dict(params["encoder"])
    return Made(
        module=identity.pop("module"), identity=identity, weights=getattr(choice.params, "weights", None),
        seed=getattr(choice.params, "seed", None), precision=params["precision"], storage=params["storage"],
        instruction=params["instruction"], versions=_versions(queries))


def _versions(artifact: Artifact) -> dict[str, str]:
    """What it was made with; empty if that file is gone, because no number depends on it."""
    try:
        made = json.loads(artifact.path(MADE).read_text())
    except (OSError, ValueError):
        return {}
    return {"plumbline": made["plumbline"], "python": made["python"], **made["versions"]}
