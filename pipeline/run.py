"""run: all stages in order, then the table, the exports and whatever log the user asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.artifacts import atomic_path
from pipeline.config import Experiment
from pipeline.plan import Plan, make_plan
from pipeline.reasons import record
from pipeline.report.export import export
from pipeline.report.page import write_report
from pipeline.report.tables import markdown_table, score_rows, terminal_table
from pipeline.report.tracking import Tracker
from pipeline.stages import STAGES
from pipeline.status import warnings_of
from pipeline.support.errors import NotReady
from pipeline.workers import Outcome, num_workers, run_embed_processes, run_stage

Say = Callable[..., Any]


def run_experiment(experiment: Experiment, command: Sequence[str], say: Say) -> dict[str, Any]:
    """Make everything that is missing; returns what `run --json` prints."""
    experiment.write(experiment.directory / "config.yaml")
    experiment.check_encoders()
    outcomes: list[Outcome] = []
    with Tracker(experiment) as tracker:
        for stage in STAGES:
            outcome = _run_stage(experiment, stage, command)
            outcomes.append(outcome)
            say(describe(outcome))
            tracker.stage(outcome.stage, outcome.rate, outcome.seconds, outcome.made)
        plan = make_plan(experiment)
        record(plan)
        rows = score_rows(plan)
        report = experiment.directory / "report" / "tables.md"
        with atomic_path(report) as path:
            path.write_text(markdown_table(rows, experiment, warnings_of(plan)))
        tracker.scores(rows)
        if experiment.settings.log.wandb:
            tracker.report(write_report(plan, command).path)
    if not any(outcome.made for outcome in outcomes):
        say("nothing to do: everything was there already")
    say(terminal_table(rows, experiment, warnings_of(plan)))
    say(f"table      {report}")
    say(f"page       python -m pipeline report {command[0] if command else experiment.name}")
    if export(plan):
        say(f"results    {experiment.directory / 'retrieval_results'}")
    return {"stages": [vars(outcome) for outcome in outcomes], **scores(plan)}


def _run_stage(experiment: Experiment, stage: str, command: Sequence[str]) -> Outcome:
    workers = num_workers(experiment) if stage == "embed" else 1
    if workers > 1:
        return run_embed_processes(experiment, ["embed", *command], workers)
    return run_stage(experiment, stage)


def describe(outcome: Outcome) -> str:
    """One line on what a stage did."""
    if not outcome.made:
        return f"{outcome.stage:<9}  {outcome.found:>5} there already"
    there = f", {outcome.found} there already" if outcome.found else ""
    return (f"{outcome.stage:<9}  {outcome.made:>5} made{there}  {outcome.rows:>9,} rows  {outcome.rate:>7,.0f}/s  "
            f"{outcome.seconds:>5.1f} s")


def scores(plan: Plan) -> dict[str, Any]:
    """Every score of the experiment as plain values; NotReady if one is missing."""
    if not plan.is_done("score"):
        raise NotReady("not everything is scored yet")
    found = [{"encoder": scored.encoder, "task": scored.task.name, "pool": scored.pool,
              "artifact": scored.job.artifact.label, **scored.job.artifact.manifest()["scores"]}
             for scored in plan.scored]
    return {"experiment": plan.experiment.name, "scores": found, "warnings": warnings_of(plan)}
