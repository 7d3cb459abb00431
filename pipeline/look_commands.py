"""The commands that look at one query, search by hand, and examine what is here. cli.py calls `add_parsers`."""

from __future__ import annotations

from typing import Any


def add_parsers(subcommands: Any) -> None:
    """Nothing yet."""
