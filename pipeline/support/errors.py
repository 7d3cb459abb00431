"""A user's mistake: what is wrong, where, what to do. Printed in two or three lines, never as a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: `what` is wrong, `where` it stands (file:line, item id), what to `do`."""

    def __init__(self, what: str, where: str | None = None, do: str | None = None):
        super().__init__(what, where, do)  # all three, so that the error survives pickling between processes
        self.what, self.where, self.do = what, where, do

    def __str__(self) -> str:
        place = f"    [{self.where}]" if self.where else ""
        advice = "".join(f"\n       {line}" for line in (self.do or "").splitlines())
        return f"{self.what}{place}{advice}"


class NotReady(Exception):
    """A stage was asked to run before its inputs exist: not a mistake and not a failure (exit code 3)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`nearest: a, b` for the known names most like `name`; an empty string if none is."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"nearest: {', '.join(close)}" if close else ""
