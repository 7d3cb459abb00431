"""python -m pipeline COMMAND EXPERIMENT [key=value ...]: parse, call, print; no logic.

Exit codes: 0 done, 1 failed, 2 the user's mistake, 3 not finished yet.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.support.errors import NotReady, UserError
from pipeline.support.logs import configure

DONE, FAILED, MISTAKE, NOT_FINISHED = 0, 1, 2, 3
_STAGES = {
    "collect": "a benchmark's files -> queries, candidates, qrels, and an audit",
    "embed": "tables -> embedding shards",
    "index": "a pool's embeddings -> what its search needs",
    "retrieve": "queries and indexes -> runs",
    "score": "runs and qrels -> scores",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parse(arguments)
    configure(None)
    try:
        return int(options.run(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = MISTAKE
    except NotReady as reason:
        print(f"not yet: {reason}", file=sys.stderr)
        code = NOT_FINISHED
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        sys.stdout = open(os.devnull, "w")
        return DONE
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    except Exception as error:  # the last resort: one line for the user, the traceback on request
        print(f"failed: {type(error).__name__}: {error}\n       --debug shows where; what is on disk stays valid",
              file=sys.stderr)
        code = FAILED
    if options.debug:
        traceback.print_exc()
    return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """As argparse does, but `key=value` may also stand after an option."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    late = [argument for argument in rest if "=" in argument and not argument.startswith("-")]
    if unknown := [argument for argument in rest if argument not in late]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if late:
        options.overrides = [*options.overrides, *late]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"plumbline {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _experiment_command(commands, "run", _run, "all stages, skipping what is done, then tables and exports",
                        json_output=True)
    for stage, text in _STAGES.items():
        command = _experiment_command(commands, stage, _stage, text, json_output=stage == "score")
        command.set_defaults(stage=stage)
        command.add_argument("--worker", metavar="I/N",
                             help="make share I of N of the missing units, then help with the rest")
    _experiment_command(commands, "plan", _plan, "what would run, how much of it, and why", json_output=True)
    status = _experiment_command(commands, "status", _status, "what is done, running or stalled", json_output=True)
    status.add_argument("--deep", action="store_true", help="compare every file with its checksum")
    _experiment_command(commands, "config", _config, "the merged configuration and where each value comes from")
    _experiment_command(commands, "export", _export, "write retrieval_results/ again")
    collector = _experiment_command(commands, "gc", _gc, "artifacts that this experiment does not use", several=True)
    collector.add_argument("--delete", action="store_true", help="delete them (without this they are only listed)")
    _list_command(commands)
    _mini_mbeir_command(commands)
    _score_run_command(commands)
    return parser


def _experiment_command(commands: Any, name: str, run: Any, text: str, json_output: bool = False,
                        several: bool = False) -> Any:
    command = commands.add_parser(name, help=text, description=text)
    if several:
        command.add_argument("experiments", nargs="+", metavar="EXPERIMENT",
                             help="every experiment whose artifacts are to stay")
    else:
        command.add_argument("experiment", help="a name in configs/experiments, or a path to a .yaml file")
        command.add_argument("overrides", nargs="*", metavar="key=value",
                             help="any option: python -m pipeline config EXPERIMENT")
    if json_output:
        command.add_argument("--json", action="store_true", help="print one JSON document on stdout, nothing else")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


def _list_command(commands: Any) -> None:
    command = commands.add_parser("list", help="experiments, benchmarks, encoders, metrics")
    command.add_argument("kind", nargs="?", choices=("experiments", "benchmarks", "encoders", "metrics"))
    command.set_defaults(run=_list, debug=False)


def _mini_mbeir_command(commands: Any) -> None:
    command = commands.add_parser("make-mini-mbeir", help="write mini M-BEIR, a small benchmark in M-BEIR's own format")
    command.add_argument("directory", type=Path)
    command.add_argument("--scale", type=float, default=1.0, help="1: about 2,000 test queries and 6,000 candidates")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--debug", action="store_true")
    command.set_defaults(run=_make_mini_mbeir)


def _score_run_command(commands: Any) -> None:
    command = commands.add_parser("score-run", help="score any TREC run file against a qrels file")
    command.add_argument("run_file", type=Path, help="six columns: query_id Q0 candidate_id rank score tag")
    command.add_argument("qrels_file", type=Path, help="four columns (or M-BEIR's five)")
    command.add_argument("--metric", action="append", metavar="NAME", help="such as ndcg@10; may be repeated")
    command.add_argument("--ties", choices=("candidate_id ascending", "trec_eval"), default="candidate_id ascending",
                         help="order of equal scores; trec_eval puts the greater id first")
    command.add_argument("--per-query", action="store_true")
    command.add_argument("--debug", action="store_true")
    command.set_defaults(run=_score_run)


def _experiment(options: Any) -> Any:
    from pipeline.config import load
    return load(options.experiment, options.overrides)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _run(options: Any) -> int:
    from pipeline.run import run_experiment
    experiment = _experiment(options)
    configure(experiment.directory / "logs" / "run.log", quiet=options.json)
    command = [options.experiment, *options.overrides]
    report = run_experiment(experiment, command, say=_silent if options.json else print)
    if options.json:
        _print_json(report)
    return DONE


def _silent(*_: Any) -> None:
    """Nothing but JSON may stand on stdout."""


def _stage(options: Any) -> int:
    from pipeline.reasons import record
    from pipeline.run import describe, scores
    from pipeline.workers import Share, make_plan, run_stage
    experiment, share = _experiment(options), Share.parse(options.worker) if options.worker else Share()
    as_json = getattr(options, "json", False)
    configure(experiment.directory / "logs" / f"{options.stage}.{share.number:03d}.log", quiet=as_json)
    outcome = run_stage(experiment, options.stage, share)
    plan = make_plan(experiment)
    record(plan)
    if as_json:
        _print_json(scores(plan))
    elif not options.worker:
        print(describe(outcome))
    return DONE


def _plan(options: Any) -> int:
    from pipeline.plan import make_plan
    from pipeline.report.text import plan_json, plan_text
    plan = make_plan(_experiment(options))
    _print_json(plan_json(plan)) if options.json else print(plan_text(plan))
    return DONE


def _status(options: Any) -> int:
    from pipeline import status
    from pipeline.plan import make_plan
    from pipeline.report.text import status_text
    plan = make_plan(_experiment(options))
    found, warnings = status.status_of(plan), status.warnings_of(plan)
    damaged = status.all_damages(plan) if options.deep else []
    if options.json:
        _print_json({"stages": status.as_json(found), "warnings": warnings, "damaged": damaged})
    else:
        print(status_text(found, warnings, damaged))
    if damaged:
        return FAILED
    return DONE if all(stage.state == "done" for stage in found) else NOT_FINISHED


def _config(options: Any) -> int:
    from pipeline.report.text import config_text
    print(config_text(_experiment(options)))
    return DONE


def _export(options: Any) -> int:
    from pipeline.plan import make_plan
    from pipeline.report.export import export
    for path in export(make_plan(_experiment(options)), again=True):
        print(path)
    return DONE


def _gc(options: Any) -> int:
    from pipeline.config import load
    from pipeline.garbage import collect_garbage
    for line in collect_garbage([load(name) for name in options.experiments], options.delete):
        print(line)
    return DONE


def _list(options: Any) -> int:
    from pipeline.report.text import listing
    print(listing(options.kind))
    return DONE


def _make_mini_mbeir(options: Any) -> int:
    from pipeline.benchmarks.mini_mbeir import generate
    print(generate(options.directory, options.scale, options.seed))
    return DONE


def _score_run(options: Any) -> int:
    from pipeline.report.foreign import score_run
    print(score_run(options.run_file, options.qrels_file, options.metric, options.ties, options.per_query))
    return DONE
