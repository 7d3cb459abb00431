"""What stands under a table: how its numbers are defined and made, and what must be known beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.config import Experiment
from pipeline.metrics.ranking import Metric
from pipeline.report.rows import ScoreRow

_RULES = {
    "none": "no instruction is put before a query",
    "first": "a query is encoded with the first of its instructions",
    "hashed": "a query is encoded with one of its instructions, chosen by a stable hash of its id",
    "all": "a query is encoded with all its instructions, and their scores are averaged",
}


def notes(rows: Sequence[ScoreRow], experiment: Experiment) -> list[str]:
    """Sentences, the most important ones first."""
    return [*_about_encoders(rows), *_about_search(rows), *_about_metrics(rows),
            *_about_intervals(experiment), *_about_columns(rows), *_about_instructions(experiment)]


def _about_encoders(rows: Sequence[ScoreRow]) -> Iterator[str]:
    seeds = {row.encoder: row.made.seed for row in rows if row.made.has_random_weights}
    for encoder, seed in seeds.items():
        yield (f"encoder {encoder} has random weights (seed {seed}): "
               "its scores are those of an untrained model")


def _about_search(rows: Sequence[ScoreRow]) -> Iterator[str]:
    worst: dict[str, float] = {}
    for row in rows:
        for name, value in row.recall_against_exact.items():
            worst[name] = min(value, worst.get(name, 1.0))
    if worst:
        listed = ", ".join(f"{name} {value:.4f}" for name, value in worst.items())
        yield f"the index is approximate: of what the exact search finds it finds, at worst, {listed}"


def _about_metrics(rows: Sequence[ScoreRow]) -> Iterator[str]:
    if any(Metric.parse(row.headline).name == "hit" for row in rows):
        yield "hit@k: share of the queries with a relevant candidate among the first k"
        yield ("M-BEIR prints hit@k as 'Recall@k'; recall@k here is the share of the relevant candidates "
               "that was found")


def _about_intervals(experiment: Experiment) -> Iterator[str]:
    chosen = experiment.settings.score
    yield (f"[low, high]: {chosen.confidence * 100:g}% bootstrap interval of the mean over queries "
           f"({chosen.resamples:,} resamples, seed {chosen.seed})")


def _about_columns(rows: Sequence[ScoreRow]) -> Iterator[str]:
    if any(row.ceiling < 1 for row in rows):
        yield "ceiling: the best value that any search of this pool can reach"
    if any(row.wrong_modality_at_1 for row in rows):
        yield ("wrong modality: share of the queries whose first candidate is of another modality than the "
               "task seeks")


def _about_instructions(experiment: Experiment) -> Iterator[str]:
    rule = experiment.settings.embed.instruction
    yield f"instructions, rule '{rule}': {_RULES[rule]}"
