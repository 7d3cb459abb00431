"""The command that compares encoders. cli.py calls `add_parsers`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.commands import DONE, print_json

if TYPE_CHECKING:
    from pipeline.report.comparison import Comparison

_TEXT = "which encoder is better, task by task, and whether the difference could be chance"


def add_parsers(subcommands: Any) -> None:
    command = subcommands.add_parser("compare", help=_TEXT, description=_TEXT)
    command.add_argument("experiment", metavar="EXPERIMENT", help="a name in configs/experiments, or a path")
    command.add_argument("overrides", nargs="*", metavar="EXPERIMENT_B | key=value",
                         help="another experiment on the same data; options of both")
    command.add_argument("--encoders", nargs="+", default=[], metavar="NAME",
                         help="only these; of two experiments, one of the first and one of the second")
    command.add_argument("--against", nargs="+", default=[], metavar="key=value",
                         help="options of the second experiment alone (without EXPERIMENT_B: of the first again)")
    command.add_argument("--metric", metavar="NAME", help="any that was measured (default: each task's headline)")
    command.add_argument("--format", choices=("text", "markdown", "latex"), default="text")
    command.add_argument("--queries", type=int, default=10, metavar="N",
                         help="show so many that changed most, in each direction (default: 10)")
    command.add_argument("--json", action="store_true", help="print one JSON document on stdout, nothing else")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=compare)


def compare(options: Any) -> int:
    from pipeline.report import comparison_text
    from pipeline.report.latex import latex_comparison
    found = _comparison(options)
    if options.json:
        print_json(options, comparison_text.as_json(found))
    elif options.format == "latex":
        print(latex_comparison(found), end="")
    elif options.format == "markdown":
        print(comparison_text.markdown(found, options.queries), end="")
    else:
        print(comparison_text.text(found, options.queries))
    return DONE


def _comparison(options: Any) -> Comparison:
    from pipeline.config import load
    from pipeline.plan import make_plan
    from pipeline.report.comparison import comparison, comparison_of_two
    from pipeline.report.sides import pairs_of_two
    from pipeline.support.errors import UserError
    others = [word for word in options.overrides if "=" not in word]
    shared = [word for word in [*options.overrides, *options.encoders] if "=" in word]  # also behind --encoders A B
    encoders = [word for word in options.encoders if "=" not in word]
    if len(others) > 1:
        raise UserError(f"two experiments can be compared, not {len(others) + 1}", do="compare them two by two")
    if options.queries < 0:
        raise UserError(f"--queries is {options.queries}; it must be at least 0")
    first = make_plan(load(options.experiment, shared))
    if not others and not options.against:
        return comparison(first, encoders, options.metric, options.queries)
    second = make_plan(load((others or [options.experiment])[0], [*shared, *options.against]))
    names = first.experiment.name, second.experiment.name
    if names[0] == names[1]:
        names = names[0], " ".join([names[1], *options.against])
    pairs = pairs_of_two(first, second, encoders, names)
    return comparison_of_two(first, second, pairs, options.metric, options.queries)
