"""The tables of the report, as plain values that a template only has to write down.

Numbers of the score table are those of manifests; what is counted here (errors, losses, means by kind) is counted from
surveys, and shares are of the queries unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from pipeline.report.cells import Cell, Cells
from pipeline.report.charts import Line, areas, bar, curves, stack, strip
from pipeline.report.rows import ScoreRow, Value, average
from pipeline.report.survey import KINDS, NOTHING, RELEVANT

_COLOURS = 6


class Column(NamedTuple):
    """A searched pool of an encoder; `style` colours it."""

    encoder: str
    pool: str
    style: str


class Score(NamedTuple):
    value: Value
    ceiling: float
    is_best: bool
    strip: Markup


class ScoreLine(NamedTuple):
    """A task; `remarks`: what the audit and the manifests say of it, in words."""

    task: str
    kind: str
    queries: int
    headline: str
    remarks: list[str]
    scores: list[Score]


class KindLine(NamedTuple):
    """A kind of task, such as text -> image: how many tasks, and their mean in each column with its bar."""

    kind: str
    tasks: int
    means: list[tuple[float, Markup]]


class ErrorLine(NamedTuple):
    """What one encoder finds for one task in a pool, beside what it finds in the task's own pool.

    shares     by kind, at rank 1
    of_errors  UniIR's numbers: each type of error as a share of the errors at rank 1; None where there are none
    lost       queries with a hit in the local pool and none here; None if the local pool was not searched
    instead    what stands at the first ranks of those queries, as shares of these ranks
    """

    task: str
    encoder: str
    style: str
    pool: str
    mean: float
    local: float | None
    lost: int | None
    gained: int | None
    shares: list[float]
    of_errors: list[float] | None
    instead: list[float] | None
    stack: Markup


def columns(cells: Cells) -> list[Column]:
    return [Column(encoder, pool, style_of(cells, encoder)) for encoder in cells.encoders for pool in cells.pools]


def style_of(cells: Cells, encoder: str) -> str:
    return f"e{cells.encoders.index(encoder) % _COLOURS}"


def score_lines(cells: Cells) -> list[ScoreLine]:
    return [_score_line(cells, task) for task in cells.tasks]


def _score_line(cells: Cells, task: str) -> ScoreLine:
    row = cells.of_task(task).row
    scores = []
    for column in columns(cells):
        own = cells.of(column.encoder, task, column.pool).row
        best = max(cells.of(encoder, task, column.pool).row.value.mean for encoder in cells.encoders)
        is_best = len(cells.encoders) > 1 and own.value.mean == best > 0
        scores.append(Score(own.value, own.ceiling, is_best, strip(own.value, own.ceiling, column.style)))
    return ScoreLine(task, row.kind, row.queries, row.headline, _remarks(cells, task), scores)


def _remarks(cells: Cells, task: str) -> list[str]:
    """Marks of the task's cells, each once, with where it holds; what holds for all of an encoder is `marks_of`."""
    places: dict[str, list[ScoreRow]] = {}
    for column in columns(cells):
        row = cells.of(column.encoder, task, column.pool).row
        for mark in row.marks:
            if mark not in marks_of(cells, column.encoder):
                places.setdefault(mark, []).append(row)
    return [f"{_where(cells, rows)}{mark}" for mark, rows in places.items()]


def _where(cells: Cells, rows: Sequence[ScoreRow]) -> str:
    """Before a mark: the encoders and pools it holds for, unless it holds for all of them."""
    encoders, pools = dict.fromkeys(row.encoder for row in rows), dict.fromkeys(row.pool for row in rows)
    named = list(encoders) if len(encoders) < len(cells.encoders) else []
    named += list(pools) if len(pools) < len(cells.pools) else []
    return f"{', '.join(named)}: " if named else ""


def marks_of(cells: Cells, encoder: str) -> list[str]:
    """Marks that stand beside every score of an encoder."""
    rows = [cell.row for cell in cells if cell.row.encoder == encoder]
    return [mark for mark in rows[0].marks if all(mark in row.marks for row in rows)]


def averages(cells: Cells) -> list[float]:
    """One per column: the unweighted mean of the headlines."""
    return [average([cells.of(column.encoder, task, column.pool).row for task in cells.tasks])
            for column in columns(cells)]


def kind_lines(cells: Cells) -> list[KindLine]:
    kinds: dict[str, list[str]] = {}
    for task in cells.tasks:
        kinds.setdefault(cells.of_task(task).row.kind, []).append(task)
    return [KindLine(kind, len(tasks), [_mean(cells, tasks, column) for column in columns(cells)])
            for kind, tasks in kinds.items()]


def _mean(cells: Cells, tasks: Sequence[str], column: Column) -> tuple[float, Markup]:
    mean = average([cells.of(column.encoder, task, column.pool).row for task in tasks])
    return mean, bar(mean, column.style)


def curve_charts(cells: Cells) -> list[tuple[str, str, Markup]]:
    """(task, kind, chart) of each task: a line per encoder and pool, dashed where the pool is not the main one."""
    charts = []
    for task in cells.tasks:
        cell = cells.of_task(task)
        lines = [Line(f"{column.encoder}, {column.pool}", f"{column.style} {pool_style(cells, column.pool)}",
                      cells.of(column.encoder, task, column.pool).survey.hit_K) for column in columns(cells)]
        charts.append((task, cell.row.kind, curves(task, lines, cell.k)))
    return charts


def pool_style(cells: Cells, pool: str) -> str:
    return "solid" if pool == cells.main_pool else "dashed" if pool == "local" else "dotted"


def error_lines(cells: Cells, pool: str) -> list[ErrorLine]:
    return [_error_line(cells, task, encoder, pool) for task in cells.tasks for encoder in cells.encoders]


def _error_line(cells: Cells, task: str, encoder: str, pool: str) -> ErrorLine:
    cell = cells.of(encoder, task, pool)
    shares = cell.survey.share_KT[0].tolist()
    narrow = cells.of(encoder, task, "local") if pool in cells.wider_pools else None
    lost_Q = _hits_of_first_only(narrow, cell) if narrow else None
    return ErrorLine(
        task=task, encoder=encoder, style=style_of(cells, encoder), pool=pool, mean=cell.row.value.mean,
        local=narrow.row.value.mean if narrow else None, lost=None if lost_Q is None else int(lost_Q.sum()),
        gained=int(_hits_of_first_only(cell, narrow).sum()) if narrow else None, shares=shares,
        of_errors=_of_errors(shares), instead=None if lost_Q is None else _instead(cell, lost_Q),
        stack=stack(shares, f"{encoder}, {task}, {pool}, rank 1: " + ", ".join(
            f"{share:.1%} {name}" for name, share in zip(KINDS, shares))))


def _hits_of_first_only(first: Cell, second: Cell) -> np.ndarray:
    return np.asarray(first.survey.is_hit(first.k) & ~second.survey.is_hit(second.k))


def _of_errors(shares: Sequence[float]) -> list[float] | None:
    errors = [share for kind, share in enumerate(shares) if kind != RELEVANT]
    return [share / sum(errors) for share in errors] if sum(errors) else None


def _instead(cell: Cell, lost_Q: np.ndarray) -> list[float] | None:
    """Errors by type among the first k ranks (at most those that were looked at singly) of some queries."""
    kinds = cell.survey.kind_QR[lost_Q][:, :cell.k].ravel()
    count_T = np.bincount(kinds, minlength=NOTHING + 1)[:NOTHING]
    count_T[RELEVANT] = 0
    return (count_T[RELEVANT + 1:] / count_T.sum()).tolist() if count_T.sum() else None


def area_charts(cells: Cells, pool: str) -> list[tuple[str, str, Markup]]:
    """(task, encoder, chart) of what stands at every rank."""
    return [(task, encoder, areas(f"{encoder}, {task}, {pool}", cells.of(encoder, task, pool).survey.share_KT))
            for task in cells.tasks for encoder in cells.encoders]
