"""The commands that look at one query, search by hand, and examine what is here. cli.py calls `add_parsers`."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands import print_json
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    from pipeline.images import ImageStore
    from pipeline.look import View
    from pipeline.look.searching import Searcher

_OPTION = re.compile(r"[a-z_]+(\.\w+)*=.*", re.DOTALL)


def add_parsers(subcommands: Any) -> None:
    _show_parser(_command(subcommands, "show", show, "one query: what it was, what it should find, what it found"))
    _search_parser(_command(subcommands, "search", search, "search a pool by hand; without a text: again and again"))
    _doctor_parser(_command(subcommands, "doctor", doctor, "is everything here that this experiment needs, and fit?"))


def _command(subcommands: Any, name: str, run: Callable[[Any], int], text: str) -> Any:
    command = subcommands.add_parser(name, help=text, description=text)
    command.add_argument("experiment", metavar="EXPERIMENT",
                         help="a name in configs/experiments, or a path to a .yaml file")
    command.add_argument("--json", action="store_true", help="print one JSON document on stdout, nothing else")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


def _show_parser(command: Any) -> None:
    command.add_argument("task", metavar="TASK")
    command.add_argument("query_id", metavar="QUERY_ID")
    _overrides(command)
    _cell_options(command)


def _search_parser(command: Any) -> None:
    command.add_argument("task", metavar="TASK", help="whose instruction and pool are used")
    command.add_argument("overrides", nargs="*", metavar="TEXT",
                         help="what to search for; and key=value for options of the experiment")
    command.parse_known_args = partial(_with_late_words, command.parse_known_args)
    command.add_argument("--image", metavar="FILE", help="a file, or an image as the benchmark names it")
    command.add_argument("--query", metavar="QUERY_ID", help="search with a query of the task")
    command.add_argument("--instruction", metavar="TEXT", default="task",
                         help="put before the text; none: nothing; default: the task's own")
    _cell_options(command)


def _with_late_words(parse: Callable[..., Any], *arguments: Any) -> tuple[Any, list[str]]:
    """As argparse does, but words of the text may also stand after an option."""
    options, rest = parse(*arguments)
    words = [word for word in rest if not word.startswith("-")]
    options.overrides = [*options.overrides, *words]
    return options, [word for word in rest if word.startswith("-")]


def _overrides(command: Any) -> None:
    command.add_argument("overrides", nargs="*", metavar="key=value",
                         help="any option: python -m pipeline config EXPERIMENT")


def _cell_options(command: Any) -> None:
    command.add_argument("--pool", metavar="NAME", help="local, union, or a name under `unions` (default: the first)")
    command.add_argument("--encoder", metavar="NAME", help="one of the experiment's (default: the first)")
    command.add_argument("--top", type=_count, default=10, metavar="K", help="candidates to show (default: 10)")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures as well")
    command.add_argument("--pictures", action="store_true", help="draw pictures in the terminal (needs textual-image)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(text)
    return int(text)


def _doctor_parser(command: Any) -> None:
    _overrides(command)
    command.add_argument("--encoder", action="append", metavar="NAME",
                         help="examine this one (a name in configs/encoders, or a path) instead of the experiment's")
    command.add_argument("--offline", action="store_true", help="do it all without network, and name what asks for one")
    command.add_argument("--quick", action="store_true", help="do not open encoders, decode a tenth of the images")


def show(options: Any) -> int:
    from pipeline.look.cells import choose
    from pipeline.look.showing import show
    cell = choose(options.experiment, options.overrides, options.task, options.pool, options.encoder)
    _present(show(cell, options.query_id, options.top), options, cell.experiment.images)
    return 0


def search(options: Any) -> int:
    from pipeline.look.cells import choose
    from pipeline.look.searching import Asked, Searcher
    overrides = [word for word in options.overrides if _OPTION.fullmatch(word)]
    text = " ".join(word for word in options.overrides if word not in overrides)
    cell = choose(options.experiment, overrides, options.task, options.pool, options.encoder)
    asked = Asked(text or None, options.image, options.query, options.instruction, options.top)
    searcher = Searcher(cell)
    if text or options.image or options.query:
        _answer(searcher, asked, options)
    else:
        _converse(searcher, asked, options)
    return 0


def _answer(searcher: Searcher, asked: Any, options: Any) -> None:
    _present(searcher.search(asked), options, searcher.cell.experiment.images, searcher.images_of(asked))


def _converse(searcher: Searcher, standing: Any, options: Any) -> None:
    """Until the end of the input; a mistake in a line is told, and the next line is read."""
    from pipeline.look.prompt import turn
    if is_person := sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  input() edits and remembers lines with it
        print(f"{len(searcher.contents):,} candidates of {searcher.cell.scored.pool}; :help tells what can be said"
              + ("; the encoder is started anew for every query" if searcher.encoder.is_elsewhere else ""))
    while True:
        try:
            step = turn(input(f"{standing.image or ''}> " if is_person else ""), standing)
            standing = step.standing
            if step.said:
                print(step.said)
            if step.now:
                _answer(searcher, step.now, options)
                if not options.json:
                    print()
            if step.is_last:
                return
        except EOFError:
            return
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def _present(view: View, options: Any, images: ImageStore, query_images: ImageStore | None = None) -> None:
    if options.json:
        print_json(options, view.as_json(), None)
    else:
        from pipeline.look.text import TextView
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(TextView(view, width).lines()), flush=True)
    if options.pictures and not options.json:
        _draw(view, images, query_images or images)
    if options.html:
        from pipeline.look.page import write_page
        write_page(view, images, options.html, query_images)
        if not options.json:
            print(f"\npage        {options.html}")


def _draw(view: View, images: ImageStore, query_images: ImageStore) -> None:
    from rich.console import Console

    from pipeline.look.pictures import pictures
    console = Console()
    for caption, picture in pictures(view, images, query_images):
        console.print(caption, markup=False, highlight=False)
        console.print(picture)


def doctor(options: Any) -> int:
    from pipeline.config import load
    from pipeline.doctor import Checkup, line_of
    chosen = [f"encoders=[{','.join(options.encoder)}]"] if options.encoder else []
    command = " ".join([options.experiment, *options.overrides])
    checkup = Checkup(load(options.experiment, [*options.overrides, *chosen]), command, options.offline, options.quick)
    found: dict[str, list[dict[str, Any]]] = {}
    for section, finding in checkup.findings():
        if section not in found and not options.json:
            print(section)
        found.setdefault(section, []).append(finding._asdict())
        if not options.json:
            print(line_of(finding), flush=True)
    if options.json:
        print_json(options, found)
    return int(any(finding["state"] == "FAIL" for each in found.values() for finding in each))
