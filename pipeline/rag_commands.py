"""The commands that make retrieval results ready for other programs. cli.py calls `add_parsers`."""

from __future__ import annotations

import time
from typing import Any

DONE = 0


def add_parsers(subcommands: Any) -> None:
    """`results` and `complements`."""
    _results_parser(subcommands)
    _complements_parser(subcommands)


def _results_parser(subcommands: Any) -> None:
    command = _parser(subcommands, "results", "retrieved candidates at any depth, as JSON Lines, parquet or UniIR's")
    command.add_argument("--format", choices=("jsonl", "parquet", "uniir"), default="jsonl",
                         help="uniir: the keys and file names of UniIR's *_retrieved.jsonl (default: jsonl)")
    command.add_argument("--compress", choices=("gzip", "zstd"), help="default: not (parquet: its own default)")
    command.set_defaults(run=results)


def _complements_parser(subcommands: Any) -> None:
    command = _parser(subcommands, "complements", "a partner of the other modality for every retrieved candidate")
    command.add_argument("--partners", default="union", metavar="POOL",
                         help="where they are sought: union (default), local, a name under `unions`, or same: where "
                         "the candidate was found")
    command.add_argument("--prompts", nargs="+", action="extend", default=[], metavar="TASK",
                         help="tasks whose prompts candidates ask with (default: MSCOCO's, or the first of a kind)")
    command.add_argument("--rule", choices=("plumbline", "unirag"), default="plumbline",
                         help="unirag: its published selection, among the first ten, with MSCOCO's prompts")
    command.add_argument("--reuse", choices=("measured", "always", "never"), default="measured",
                         help="vectors that are there: where a sample shows them to be equal (default), always, never")
    command.add_argument("--worker", metavar="I/N", help="make share I of N, then help with the rest")
    command.set_defaults(run=complements)


def _parser(subcommands: Any, name: str, text: str) -> Any:
    command = subcommands.add_parser(name, help=text, description=text)
    command.add_argument("experiment", metavar="EXPERIMENT", help="a name in configs/experiments, or a path")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="any option of the experiment")
    command.add_argument("--depth", type=int, metavar="K", help="candidates per query (default: export.depth)")
    for kind in ("encoder", "task", "pool"):
        command.add_argument(f"--{kind}", action="append", default=[], metavar="NAME",
                             help=f"only this {kind}; may be repeated")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def results(options: Any) -> int:
    from pipeline.config import load
    from pipeline.report.results import write_results
    experiment = load(options.experiment, options.overrides)
    started, queries = time.monotonic(), 0
    for written in write_results(experiment, _cells(options), options.depth, options.format, options.compress):
        queries += written.queries
        print(written.path)
    seconds = max(time.monotonic() - started, 1e-9)
    print(f"{queries:,} queries, {queries / seconds:,.0f}/s")
    return DONE


def complements(options: Any) -> int:
    from pipeline.complements.making import Wanted, make_complements
    from pipeline.config import load
    from pipeline.support.logs import configure
    from pipeline.workers import Share
    experiment = load(options.experiment, options.overrides)
    share = Share.parse(options.worker) if options.worker else Share()
    configure(experiment.directory / "logs" / f"complements.{share.number:03d}.log")
    wanted = Wanted(_cells(options), options.depth, options.partners, options.rule, options.reuse, options.prompts)
    make_complements(experiment, wanted, print, share)
    return DONE


def _cells(options: Any) -> Any:
    from pipeline.report.results import Cells
    return Cells(options.encoder, options.task, options.pool)
