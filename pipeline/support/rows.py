"""Other people's text files, line by line: what cannot be read is a UserError with its file and line.

Files stream, and are read as strict UTF-8 wherever the program runs. Strings that UTF-8 cannot carry (lone
surrogates, which JSON can spell) are refused here, because no table could hold them later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.support.errors import UserError


class Row(NamedTuple):
    """One JSON object and where it stands."""

    fields: dict[str, Any]
    path: Path
    line: int

    def error(self, what: str, do: str | None = None) -> UserError:
        return UserError(what, f"{self.path}:{self.line}", do)

    def string(self, key: str) -> str | None:
        """A string; None if it is null or the key is absent."""
        value = self.fields.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(f"{key} must be a string or null, not {value!r}")
        return value

    def identifier(self, key: str) -> str:
        """A string that is there and not empty."""
        value = self.string(key)
        if not value:
            raise self.error(f"{key} is missing")
        return value


def json_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSON Lines file."""
    for number, line in text_lines(path):
        try:
            fields = json.loads(line)
            if "\\ud" in line or "\\uD" in line:
                json.dumps(fields, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise UserError(f"not a line of JSON: {error}", f"{path}:{number}") from None
        if not isinstance(fields, dict):
            raise UserError(f"a JSON object is expected, not {line[:40]}", f"{path}:{number}")
        yield Row(fields, path, number)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) for all lines that are not blank."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, _decoded(line, path, number).rstrip("\r\n")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(path)) from None


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: {error.reason} at byte {error.start}", f"{path}:{number}") from None
