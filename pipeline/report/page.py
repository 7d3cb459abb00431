"""report.html: the whole result of an experiment in one file that needs no server, no network and no script.

Templates, style and script lie in page/ and are put into the file; a policy in its head forbids it to load anything
else. Whatever comes from data is escaped by the template engine. The page keeps to a size: when there is no room for
more, examples are left out, and it says how many.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.artifacts import atomic_path
from pipeline.plan import Plan
from pipeline.report import comparison_text, views
from pipeline.report.cells import Cells, survey_cells
from pipeline.report.comparison import comparison
from pipeline.report.contents import read_contents
from pipeline.report.examples import NEAR, TOPICS, choose
from pipeline.report.gallery import Card, CardMaker, Gallery, draw, is_relevant
from pipeline.report.notes import notes
from pipeline.report.provenance import provenance
from pipeline.report.survey import KINDS
from pipeline.report.thumbnails import Thumbnails
from pipeline.report.timings import timings
from pipeline.status import warnings_of

_PARTS = Path(__file__).parent / "page"
_MEGABYTE = 1_000_000
_FRAME = 400  # bytes: more than what stands around the examples of a task, or is said of those that are left out


@dataclass(frozen=True)
class Extent:
    """examples: at most so many of each topic, task and encoder. top: candidates shown of a ranking, at most 10."""

    examples: int = 2
    top: int = 5
    megabytes: float = 20.0


class Written(NamedTuple):
    path: Path
    bytes: int
    examples: int
    left_out: int


def write_report(plan: Plan, arguments: Sequence[str], extent: Extent = Extent()) -> Written:
    """Write WORK/experiments/NAME/report/report.html; NotReady if something is not scored yet.

    Only examples are left out to keep the size: tables and charts stand there whole, whatever it is.
    `arguments` are those of the command line, experiment first: the page tells how to run the same again.
    """
    cells, environment = survey_cells(plan), _environment()
    values = _values(plan, cells, arguments)
    bare = _rendered(environment, values, Gallery([], 0)).encode()
    frames = sum(_FRAME + len(task.encode()) for task in ("", *cells.tasks))
    gallery = _gallery(plan, cells, environment, extent, int(extent.megabytes * _MEGABYTE) - len(bare) - frames)
    page = _rendered(environment, values, gallery).encode()
    path = plan.experiment.directory / "report" / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_bytes(page)
    return Written(path, len(page), len(gallery.cards), gallery.left_out)


def _environment() -> Environment:
    environment = Environment(loader=FileSystemLoader(_PARTS), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=lambda share: f"{share:.1%}", thousands=lambda number: f"{number:,}",
                               size=_size, probability=comparison_text.shown_p, score=lambda value: f"{value:.4f}")
    environment.tests["relevant"] = is_relevant
    return environment


def _gallery(plan: Plan, cells: Cells, environment: Environment, extent: Extent, budget: int) -> Gallery:
    examples = choose(cells, extent.examples)
    contents = read_contents(cells, examples, extent.top)
    maker = CardMaker(cells, contents, Thumbnails(plan.experiment.images), plan.experiment.settings.embed.instruction)
    template = environment.get_template("card.html")

    def render(card: Card) -> Markup:
        return Markup(template.render(card=card))
    return draw(examples, maker, render, budget)


def _values(plan: Plan, cells: Cells, arguments: Sequence[str]) -> dict[str, Any]:
    experiment, rows = plan.experiment, [cell.row for cell in cells]
    script, style = ((_PARTS / name).read_text() for name in ("script.js", "style.css"))
    return {
        "name": experiment.name, "benchmark": experiment.benchmark, "cells": cells, "views": views, "kinds": KINDS,
        "topics": TOPICS, "near": NEAR, "rows": rows, "notes": notes(rows, experiment), "warnings": warnings_of(plan),
        "columns": views.columns(cells), "averages": views.averages(cells), "timings": timings(plan),
        "provenance": provenance(rows, experiment, arguments), "script": Markup(script), "style": Markup(style),
        "script_hash": _hash(script), "style_hash": _hash(style),
        "compared": _compared(plan) if len(cells.encoders) > 1 else None,
        "made_at": max((timing.last for timing in timings(plan)), default=""),
    }


def _compared(plan: Plan) -> dict[str, Any]:
    """What `compare` says, without the queries that changed most: the gallery shows such."""
    found = comparison(plan, changes=0)
    return {"comparison": found, "sentences": comparison_text.sentences(found), "notes": comparison_text.notes(found)}


def _rendered(environment: Environment, values: dict[str, Any], gallery: Gallery) -> str:
    return environment.get_template("report.html").render(**values, gallery=gallery)


def _hash(text: str) -> str:
    """As a Content-Security-Policy names the one script, and the one style sheet, that it allows."""
    return "sha256-" + base64.b64encode(sha256(text.encode()).digest()).decode()


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
