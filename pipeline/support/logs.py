"""Logs: one event, one line. People see what matters on stderr; a file of the experiment holds everything."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

_LINE = logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S")


def configure(file: Path | None, quiet: bool = False) -> None:
    """Send our log lines to stderr (warnings only, on a terminal with a live line or when quiet) and to `file`."""
    logger = logging.getLogger("pipeline")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(logging.WARNING if quiet or sys.stderr.isatty() else logging.INFO)
    screen.setFormatter(_LINE)
    logger.addHandler(screen)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        written = logging.FileHandler(file, encoding="utf-8")
        written.setFormatter(_LINE)
        logger.addHandler(written)
