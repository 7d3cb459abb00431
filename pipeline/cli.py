"""python -m pipeline COMMAND EXPERIMENT [key=value ...]: parse, call, print; no logic.

Exit codes: 0 done, 1 failed, 2 the user's mistake, 3 not finished yet.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import __version__, cluster_commands, commands, compare_commands, generate_commands, look_commands
from pipeline import rag_commands, report_commands
from pipeline.commands import DONE, FAILED, MISTAKE, NOT_FINISHED
from pipeline.support.errors import NotReady, UserError
from pipeline.support.logs import configure

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
    options.out = sys.stdout
    try:
        # Libraries print when they are imported or load a model; where JSON is asked for it stands alone.
        with redirect_stdout(sys.stderr if options.json else sys.stdout):
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
    parser.set_defaults(json=False)
    parser.add_argument("--version", action="version", version=f"plumbline {__version__}")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    _evaluation_commands(subcommands)
    _training_commands(subcommands)
    _list_command(subcommands)
    _mini_mbeir_command(subcommands)
    _score_run_command(subcommands)
    _bench_command(subcommands)
    for module in (report_commands, compare_commands, look_commands, rag_commands, generate_commands):
        module.add_parsers(subcommands)
    return parser


def _evaluation_commands(subcommands: Any) -> None:
    add = partial(_experiment_command, subcommands)
    _on(add("run", commands.run, "all stages, skipping what is done, then tables and exports", json_output=True))
    for stage, text in _STAGES.items():
        command = add(stage, commands.stage, text, json_output=stage == "score")
        command.set_defaults(stage=stage)
        command.add_argument("--worker", metavar="I/N",
                             help="make share I of N of the missing units, then help with the rest")
    add("plan", commands.plan, "what would run, how much of it, and why", json_output=True)
    status = add("status", commands.status, "what is done, running or stalled", json_output=True)
    status.add_argument("--deep", action="store_true", help="compare every file with its checksum")
    logs = add("logs", cluster_commands.logs, "the ends of the logs: of what failed on a cluster, or the newest")
    logs.add_argument("--stage", choices=(*_STAGES, "run"), help="of this stage only")
    logs.add_argument("--lines", type=int, default=20, help="of each log (default: 20)")
    cancel = add("cancel", cluster_commands.cancel, "take what was submitted for this experiment out of Slurm's queue")
    for command in (logs, cancel):
        command.add_argument("--training", action="store_true", help="EXPERIMENT is a training")
    add("config", commands.config, "the merged configuration and where each value comes from")
    add("export", commands.export, "write retrieval_results/ again")
    verify = add("verify", commands.verify, "compare the scores with the golden ones of configs/golden")
    verify.add_argument("--write", action="store_true", help="make the scores that are there the golden ones")
    collector = add("gc", commands.gc, "artifacts that this experiment does not use", several=True)
    collector.add_argument("--delete", action="store_true", help="delete them (without this they are only listed)")


def _on(command: Any) -> None:
    command.add_argument("--on", choices=("local", "slurm"), default="local",
                         help="slurm: submit it to the cluster that cluster=NAME names, and return")
    command.add_argument("--dry-run", action="store_true", help="with --on slurm: print the sbatch lines only")


def _training_commands(subcommands: Any) -> None:
    train = _experiment_command(subcommands, "train", commands.train, "train an encoder; the same command resumes",
                                metavar="training")
    _on(train)
    train.add_argument("--accept-changes", action="store_true", help="resume although options have changed")
    mining = _experiment_command(subcommands, "mine-negatives", commands.mine_negatives,
                                 "search the train split and list what is wrongly found, for the next training")
    mining.add_argument("--count", type=int, default=10, help="hard negatives per query")
    mining.add_argument("--skip", type=int, default=0, help="leave out so many of the best wrong candidates")
    importer = subcommands.add_parser("import-checkpoint", help="UniIR's published checkpoint -> safetensors and YAML")
    importer.add_argument("source", type=Path, help="a .pth file; nothing that it contains is run")
    importer.add_argument("directory", type=Path, help="where weights.safetensors and <name>.yaml go")
    importer.add_argument("--name", help="of the encoder (default: the file's)")
    importer.add_argument("--architecture", help="of open_clip, base, large, or a JSON file: if shapes do not tell")
    importer.set_defaults(run=commands.import_checkpoint)
    exporter = subcommands.add_parser("export-checkpoint", help="a UniIR encoder -> UniIR's names")
    exporter.add_argument("encoder", help="a name in configs/encoders, or a path to a .yaml file")
    exporter.add_argument("destination", type=Path, help=".pth (as UniIR loads it) or .safetensors")
    exporter.set_defaults(run=commands.export_checkpoint)
    for command in (importer, exporter):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _experiment_command(subcommands: Any, name: str, run: Any, text: str, json_output: bool = False,
                        several: bool = False, metavar: str = "experiment") -> Any:
    command = subcommands.add_parser(name, help=text, description=text)
    if several:
        command.add_argument("experiments", nargs="+", metavar="EXPERIMENT",
                             help="every experiment whose artifacts are to stay")
    else:
        folder = "training" if metavar == "training" else "experiments"
        command.add_argument("experiment", metavar=metavar.upper(),
                             help=f"a name in configs/{folder}, or a path to a .yaml file")
        command.add_argument("overrides", nargs="*", metavar="key=value",
                             help="any option: python -m pipeline config EXPERIMENT")
    if json_output:
        command.add_argument("--json", action="store_true", help="print one JSON document on stdout, nothing else")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


def _list_command(subcommands: Any) -> None:
    command = subcommands.add_parser("list", help="experiments, benchmarks, encoders, training, metrics")
    command.add_argument("kind", nargs="?", choices=("experiments", "benchmarks", "encoders", "training", "metrics"))
    command.set_defaults(run=commands.names, debug=False)


def _mini_mbeir_command(subcommands: Any) -> None:
    command = subcommands.add_parser("make-mini-mbeir", help="write mini M-BEIR, a small benchmark")
    command.add_argument("directory", type=Path)
    command.add_argument("--scale", type=float, default=1.0, help="1: about 2,000 test queries and 6,000 candidates")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--debug", action="store_true")
    command.set_defaults(run=commands.make_mini_mbeir)


def _score_run_command(subcommands: Any) -> None:
    command = subcommands.add_parser("score-run", help="score any TREC run file against a qrels file")
    command.add_argument("run_file", type=Path, help="six columns: query_id Q0 candidate_id rank score tag")
    command.add_argument("qrels_file", type=Path, help="four columns (or M-BEIR's five)")
    command.add_argument("--metric", action="append", metavar="NAME", help="such as ndcg@10; may be repeated")
    command.add_argument("--ties", choices=("candidate_id ascending", "trec_eval"), default="candidate_id ascending",
                         help="order of equal scores; trec_eval puts the greater id first")
    command.add_argument("--per-query", action="store_true")
    command.add_argument("--debug", action="store_true")
    command.set_defaults(run=commands.score_run)


def _bench_command(subcommands: Any) -> None:
    text = "how fast this is beside what others do, measured here by turns (from a checkout)"
    command = subcommands.add_parser("bench", help=text, description=text)
    command.add_argument("name", nargs="?", metavar="NAME", help="a benchmark; without it all are listed")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="its options, such as rows=1000")
    command.add_argument("--json", action="store_true", help="print one JSON object per row on stdout, nothing else")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=commands.bench)
