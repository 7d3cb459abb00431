"""The commands that make retrieval results ready for other programs. cli.py calls `add_parsers`."""

from __future__ import annotations

from typing import Any


def add_parsers(subcommands: Any) -> None:
    """Nothing yet."""
