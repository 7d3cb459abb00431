"""What has landed, how fast, and by whom: one live line on a terminal, one plain line per unit elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

log = logging.getLogger("pipeline")


class Landed(NamedTuple):
    """A unit that is on disk now, and how many rows of work it was."""

    name: str
    unit: str
    rows: int
    note: str = ""


def follow(stage: str, landed: Iterable[Landed], total: int) -> Iterator[Landed]:
    """Pass units through and tell about each; `total` is the number of units of this call."""
    bar, started, done = _bar(stage, total), time.monotonic(), 0
    for number, unit in enumerate(landed, 1):
        done += unit.rows
        rate = done / max(time.monotonic() - started, 1e-9)
        log.info("%-9s %s %s  %d/%d  %s rows  %s/s%s", stage, unit.name, unit.unit, number, total,
                 f"{unit.rows:,}", f"{rate:,.0f}", f"  {unit.note}" if unit.note else "")
        if bar is not None:
            bar.update(1)
            bar.set_postfix_str(f"{rate:,.0f} rows/s")
        yield unit
    if bar is not None:
        bar.close()


def _bar(stage: str, total: int) -> Any:
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm
    return tqdm(total=total, desc=f"{stage:<9}", unit="unit", leave=False, colour=None)
