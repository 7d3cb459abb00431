"""The command that writes the report. cli.py calls `add_parsers`."""

from __future__ import annotations

import argparse
from typing import Any

from pipeline.commands import DONE

_TEXT = "one self-contained HTML file: scores, curves, errors, examples with pictures, what was run"


def add_parsers(subcommands: Any) -> None:
    command = subcommands.add_parser("report", help=_TEXT, description=_TEXT)
    command.add_argument("experiment", metavar="EXPERIMENT", help="a name in configs/experiments, or a path")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="the options that it was run with")
    command.add_argument("--examples", type=_count, default=2, metavar="N",
                         help="at most so many of each topic, task and encoder (default: 2; 0: none)")
    command.add_argument("--top", type=int, choices=range(1, 11), default=5, metavar="K",
                         help="candidates shown of each ranking, 1 to 10 (default: 5)")
    command.add_argument("--megabytes", type=_megabytes, default=20.0, metavar="MB",
                         help="size of the file; examples that do not fit are left out and counted (default: 20)")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=report)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of examples")
    return int(text)


def _megabytes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None
    if not 0 < number < 10_000:
        raise argparse.ArgumentTypeError(f"{text} megabytes is no size for a page")
    return number


def report(options: Any) -> int:
    from pipeline.config import load
    from pipeline.plan import make_plan
    from pipeline.report.page import Extent, write_report
    experiment = load(options.experiment, options.overrides)
    written = write_report(make_plan(experiment), [options.experiment, *options.overrides],
                           Extent(options.examples, options.top, options.megabytes))
    left_out = f"; {written.left_out:,} more did not fit into {options.megabytes:g} MB" if written.left_out else ""
    print(f"{written.path}  ({written.bytes / 1e6:.1f} MB, {written.examples:,} examples{left_out})")
    return DONE
