"""The command that compares encoders. cli.py calls `add_parsers`."""

from __future__ import annotations

from typing import Any


def add_parsers(subcommands: Any) -> None:
    """Nothing yet."""
