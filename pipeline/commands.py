"""What each command does: load, call, print, and the exit code that says how it ended. cli.py parses.

Every function takes the parsed options. What is heavy is imported where it is needed, so that `status` stays instant.
"""

from __future__ import annotations

import json
import os
from typing import Any

from pipeline import cluster_commands
from pipeline.support.logs import configure

DONE, FAILED, MISTAKE, NOT_FINISHED = 0, 1, 2, 3


def _experiment(options: Any) -> Any:
    from pipeline.config import load
    return load(options.experiment, options.overrides)


def print_json(options: Any, value: Any, indent: int | None = 1) -> None:
    """One document on the command's own stdout; with --json whatever else is printed goes to stderr."""
    print(json.dumps(value, indent=indent), file=options.out, flush=True)


def run(options: Any) -> int:
    from pipeline.run import run_experiment
    experiment = _experiment(options)
    if options.on == "slurm":
        return cluster_commands.run(options)
    configure(experiment.directory / "logs" / "run.log", quiet=options.json)
    command = [options.experiment, *options.overrides]
    report = run_experiment(experiment, command, say=_silent if options.json else print)
    if options.json:
        print_json(options, report)
    return DONE


def _silent(*_: Any) -> None:
    """With --json nobody reads along."""


def stage(options: Any) -> int:
    from pipeline.reasons import record
    from pipeline.run import describe, scores
    from pipeline.workers import Share, make_plan, run_stage
    experiment, share = _experiment(options), Share.parse(options.worker) if options.worker else Share()
    configure(experiment.directory / "logs" / f"{options.stage}.{share.number:03d}.log", quiet=options.json)
    outcome = run_stage(experiment, options.stage, share)
    plan = make_plan(experiment)
    record(plan)
    if options.json:
        print_json(options, scores(plan))
    elif not options.worker:
        print(describe(outcome))
    return DONE


def plan(options: Any) -> int:
    from pipeline.plan import make_plan
    from pipeline.report.text import plan_json, plan_text
    plan = make_plan(_experiment(options))
    print_json(options, plan_json(plan)) if options.json else print(plan_text(plan))
    return DONE


def status(options: Any) -> int:
    from pipeline.plan import make_plan
    from pipeline.queue import states
    from pipeline.report.jobs import jobs_json, jobs_text
    from pipeline.report.text import status_text
    from pipeline.status import all_damages, as_json, status_of, warnings_of
    the_plan = make_plan(_experiment(options))
    found, warnings = status_of(the_plan), warnings_of(the_plan)
    damaged = all_damages(the_plan) if options.deep else []
    jobs = states(the_plan.experiment.directory)
    if options.json:
        print_json(options, {"stages": as_json(found), "warnings": warnings, "damaged": damaged,
                             "jobs": jobs_json(jobs)})
    else:
        print("\n".join(filter(None, [status_text(found, warnings, damaged), jobs_text(jobs)])))
    if damaged:
        return FAILED
    return DONE if all(stage.state == "done" for stage in found) else NOT_FINISHED


def config(options: Any) -> int:
    from pipeline.report.text import config_text
    print(config_text(_experiment(options)))
    return DONE


def export(options: Any) -> int:
    from pipeline.plan import make_plan
    from pipeline.report.export import export
    for path in export(make_plan(_experiment(options)), again=True):
        print(path)
    return DONE


def gc(options: Any) -> int:
    from pipeline.config import load
    from pipeline.garbage import collect_garbage
    for line in collect_garbage([load(name) for name in options.experiments], options.delete):
        print(line)
    return DONE


def verify(options: Any) -> int:
    from pipeline.plan import make_plan
    from pipeline.report.verify import golden_path, verify, write_golden
    the_plan = make_plan(_experiment(options))
    if options.write:
        write_golden(the_plan, golden_path(the_plan.experiment))
        print(golden_path(the_plan.experiment))
        return DONE
    verdict = verify(the_plan)
    print("\n".join(verdict.lines))
    return DONE if verdict.is_equal else FAILED


def train(options: Any) -> int:
    from pipeline.config import load
    from pipeline.train import train
    from pipeline.training_set import directory_of
    training = load(options.experiment, options.overrides, kind="training")
    if options.on == "slurm":
        return cluster_commands.train(options)
    rank = os.environ.get("RANK", "0")
    configure(directory_of(training) / "logs" / f"train.{rank}.log", quiet=rank != "0")
    train(training, options.accept_changes, say=print)
    return DONE


def mine_negatives(options: Any) -> int:
    from pipeline.mining import mine
    experiment = _experiment(options)
    configure(experiment.directory / "logs" / "mine-negatives.log")
    for path in mine(experiment, options.count, options.skip, say=print):
        print(path)
    return DONE


def import_checkpoint(options: Any) -> int:
    from pipeline.encoders.uniir_checkpoints import import_checkpoint
    name = options.name or options.source.stem
    found = import_checkpoint(options.source, options.directory, name, options.architecture)
    print(f"weights    {found.weights}  {found.tensors} tensors, {found.parameters:,} parameters, {found.fingerprint}")
    print(f"left out   {', '.join(found.dropped) or 'nothing'}")
    print(f"encoder    {found.yaml}")
    return DONE


def export_checkpoint(options: Any) -> int:
    from pipeline.pieces import load_encoder_choice
    from pipeline.encoders.uniir_checkpoints import export_checkpoint
    export_checkpoint(load_encoder_choice(options.encoder).params, options.destination)
    print(options.destination)
    return DONE


def names(options: Any) -> int:
    from pipeline.report.text import listing
    print(listing(options.kind))
    return DONE


def make_mini_mbeir(options: Any) -> int:
    from pipeline.benchmarks.mini_mbeir import generate
    print(generate(options.directory, options.scale, options.seed))
    return DONE


def score_run(options: Any) -> int:
    from pipeline.report.foreign import score_run
    print(score_run(options.run_file, options.qrels_file, options.metric, options.ties, options.per_query))
    return DONE


def bench(options: Any) -> int:
    from pipeline import bench
    if options.name is None:
        print(bench.listing())
        return DONE
    rows = bench.rows(options.name, options.overrides)
    print(bench.heading(), flush=True)
    for row in rows:
        print_json(options, row.as_json(), None) if options.json else print(bench.row_text(row), flush=True)
    return DONE
