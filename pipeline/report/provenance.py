"""What exactly was run, as names and values: enough to run it again and to know whether it is the same."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

from pipeline.config import Experiment
from pipeline.report.rows import Made, ScoreRow


@dataclass(frozen=True)
class Provenance:
    """`facts`: of the whole experiment; `encoders`: of each; `artifacts`: every scored cell and where it lies."""

    command: str
    facts: list[tuple[str, str]]
    encoders: dict[str, list[tuple[str, str]]]
    artifacts: list[tuple[str, str, str, str]]
    configuration: str


def provenance(rows: Sequence[ScoreRow], experiment: Experiment, arguments: Sequence[str]) -> Provenance:
    """`arguments`: the experiment as it was named on the command line, and its overrides."""
    return Provenance(
        command=shlex.join(["python", "-m", "pipeline", "run", *arguments]), facts=list(_facts(rows, experiment)),
        encoders={row.encoder: list(_encoder(row.made)) for row in rows},
        artifacts=[(row.encoder, row.task, row.pool, row.artifact) for row in rows],
        configuration=yaml.safe_dump(dict(experiment.resolved), sort_keys=False, allow_unicode=True))


def _facts(rows: Sequence[ScoreRow], experiment: Experiment) -> Iterator[tuple[str, str]]:
    settings, benchmark = experiment.settings, experiment.benchmark
    yield "benchmark", f"{benchmark.name}, split {benchmark.split}"
    if benchmark.options:
        yield "its options", ", ".join(f"{name}={value}" for name, value in benchmark.options.items())
    yield "data root", str(benchmark.root)
    yield "instructions", settings.embed.instruction
    yield "precision", f"computed in {settings.embed.precision}, stored as {settings.embed.storage}"
    yield "images", f"decoding: {settings.embed.decoding}"
    kind = "exact" if all(row.is_exact for row in rows) else "approximate"
    yield "index", f"{settings.index.factory} ({kind})"
    yield "candidates kept per query", str(settings.retrieve.depth)
    score = settings.score
    yield "intervals", f"{score.confidence * 100:g}% bootstrap, {score.resamples:,} resamples, seed {score.seed}"


def _encoder(made: Made) -> Iterator[tuple[str, str]]:
    yield "module", made.module
    yield "weights", f"random (seed {made.seed})" if made.has_random_weights else str(made.weights)
    for name, value in made.identity.items():  # by content: hashes and revisions
        yield ("sha256 of weights" if name == "weights" else name), str(value).removeprefix("sha256:")
    yield "precision", f"computed in {made.precision}, stored as {made.storage}"
    yield "instructions", made.instruction
    yield "made with", ", ".join(f"{name} {version}" for name, version in made.versions.items()) or "unknown versions"
