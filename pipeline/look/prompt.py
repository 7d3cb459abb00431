"""search without a text: a line is a query, a line that begins with a colon changes what the next ones ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from pipeline.look.searching import NONE, TASK, Asked
from pipeline.support.errors import UserError, nearest

HELP = """a line is a query; and
:image FILE         search with an image, and with every text that follows; `:image none` ends that
:instruction TEXT   put this before queries; `none`, or `task` for the task's own
:query QUERY_ID     search with a query of the task
:top N              show so many
:quit"""


class Turn(NamedTuple):
    """What follows from a line: the standing wishes, what to search for now (or nothing), what to say, the end."""

    standing: Asked
    now: Asked | None = None
    said: str = ""
    is_last: bool = False


def turn(line: str, standing: Asked) -> Turn:
    """UserError if the line is not understood."""
    line = line.strip()
    if not line:
        return Turn(standing)
    if not line.startswith(":"):
        return Turn(standing, replace(standing, text=line))
    word, _, rest = line[1:].partition(" ")
    if word not in _COMMANDS:
        raise UserError(f"':{word}' is not known", None, nearest(word, _COMMANDS) or ":help tells what is")
    return _COMMANDS[word](rest.strip(), standing)


def _image(rest: str, standing: Asked) -> Turn:
    if rest in ("", NONE):
        return Turn(replace(standing, image=None), said="without an image")
    wished = replace(standing, image=rest)
    return Turn(wished, wished)


def _instruction(rest: str, standing: Asked) -> Turn:
    return Turn(replace(standing, instruction=rest or TASK), said=f"instruction: {rest or TASK}")


def _query(rest: str, standing: Asked) -> Turn:
    return Turn(standing, replace(standing, query_id=rest, image=None))


def _top(rest: str, standing: Asked) -> Turn:
    if not rest.isdecimal() or int(rest) < 1:
        raise UserError(f"'{rest}' is not a number from 1 on", None, ":top 10")
    return Turn(replace(standing, top=int(rest)))


def _quit(rest: str, standing: Asked) -> Turn:
    return Turn(standing, is_last=True)


def _help(rest: str, standing: Asked) -> Turn:
    return Turn(standing, said=HELP)


_COMMANDS: dict[str, Callable[[str, Asked], Turn]] = {
    "image": _image, "instruction": _instruction, "query": _query, "top": _top, "quit": _quit, "help": _help}
