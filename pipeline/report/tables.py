"""The result as a table: plain text for a terminal, Markdown for a page.

Both show the same cells: fractions with four digits, the interval beside the mean, ceilings where one is
below 1. A narrow terminal loses columns rather than having its lines broken; the Markdown has everything.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

from pipeline.config import Experiment
from pipeline.report.notes import notes
from pipeline.report.rows import ScoreRow, Value, average, score_rows

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ScoreRow", "markdown_table", "score_rows", "terminal_table"]

_DETAILS = ("all", "without intervals", "scores only")
_NOTE_WIDTH = 110


@dataclass(frozen=True)
class _Line:
    """One line of the table: the rows of one encoder and task, one per pool."""

    rows: tuple[ScoreRow, ...]

    @property
    def first(self) -> ScoreRow:
        return self.rows[0]

    def row(self, pool: str) -> ScoreRow:
        return next(row for row in self.rows if row.pool == pool)


@dataclass(frozen=True)
class _Column:
    """`cell` fills the line of a task, `foot` the last line of an encoder: averages over its tasks."""

    title: str
    cell: Callable[[_Line], str]
    foot: Callable[[Sequence[ScoreRow]], str] = lambda rows: ""
    is_number: bool = False


def terminal_table(rows: Sequence[ScoreRow], experiment: Experiment, warnings: Sequence[str]) -> str:
    """The headlines and their notes; plain unless stdout is a terminal and NO_COLOR is unset."""
    from rich.console import Console
    terminal = Console()
    width = terminal.width if terminal.is_terminal else None
    is_coloured = terminal.is_terminal and not terminal.no_color
    for detail in _DETAILS:
        table, natural = _drawn(list(_columns(rows, detail)), rows, is_coloured)
        if width is None or natural <= width:
            break
    below = [*notes(rows, experiment), *(f"warning: {text}" for text in warnings)]
    if detail != "all":
        below.append("columns are left out to fit this terminal; the table in report/ has them all")
    return "\n".join(["", table, "", *(_wrapped(text, width) for text in below), ""])


def _wrapped(text: str, width: int | None) -> str:
    return textwrap.fill(text, min(width or _NOTE_WIDTH, _NOTE_WIDTH), initial_indent="  ",
                         subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _drawn(columns: Sequence[_Column], rows: Sequence[ScoreRow], is_coloured: bool) -> tuple[str, int]:
    """The table as text, and how many columns of a terminal it takes."""
    from rich.console import Console
    console = Console(file=StringIO(), width=1000, force_terminal=is_coloured, legacy_windows=False,
                      color_system="standard" if is_coloured else None)
    table = _table(columns, rows)
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().rstrip("\n").split("\n")
    return "\n".join(line.rstrip() for line in lines), console.measure(table).maximum


def _table(columns: Sequence[_Column], rows: Sequence[ScoreRow]) -> Table:
    from rich.table import Table
    from rich.text import Text
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for column in columns:
        table.add_column(Text(column.title), justify="right" if column.is_number else "left", no_wrap=True)
    for lines in _by_encoder(rows):
        for line in lines:
            table.add_row(*(Text(column.cell(line)) for column in columns))
        own = [row for line in lines for row in line.rows]
        table.add_row(*(Text(column.foot(own)) for column in columns), style="bold")
    return table


def _by_encoder(rows: Sequence[ScoreRow]) -> Iterator[list[_Line]]:
    for encoder in dict.fromkeys(row.encoder for row in rows):
        own = [row for row in rows if row.encoder == encoder]
        tasks = dict.fromkeys(row.task for row in own)
        yield [_Line(tuple(row for row in own if row.task == task)) for task in tasks]


def _columns(rows: Sequence[ScoreRow], detail: str = "all") -> Iterator[_Column]:
    if len({row.encoder for row in rows}) > 1:
        yield _Column("encoder", lambda line: line.first.encoder, lambda own: own[0].encoder)
    yield _Column("task", lambda line: line.first.task, _num_tasks)
    if detail == "all":
        yield _Column("kind", lambda line: line.first.kind)
    if detail != "scores only":
        yield _Column("queries", lambda line: f"{line.first.queries:,}", is_number=True)
    yield _Column("metric", lambda line: line.first.headline)
    for pool in dict.fromkeys(row.pool for row in rows):
        yield from _pool_columns([row for row in rows if row.pool == pool], pool, detail)


def _pool_columns(rows: Sequence[ScoreRow], pool: str, detail: str) -> Iterator[_Column]:
    """A score; then its ceiling and the share of wrong modalities, where they say anything."""
    interval = detail == "all"
    yield _Column(pool, lambda line: _score(line.row(pool).value, interval),
                  lambda own: _average(own, pool, interval), is_number=True)
    if detail == "scores only":
        return
    if any(row.ceiling < 1 for row in rows):
        yield _Column("ceiling", lambda line: f"{line.row(pool).ceiling:.4f}", is_number=True)
    if any(row.wrong_modality_at_1 for row in rows):
        yield _Column("wrong modality", lambda line: _share(line.row(pool).wrong_modality_at_1),
                      is_number=True)


def _score(value: Value, interval: bool = True) -> str:
    """`0.7812 [0.7610, 0.8003]`"""
    return f"{value.mean:.4f} [{value.low:.4f}, {value.high:.4f}]" if interval else f"{value.mean:.4f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _num_tasks(rows: Sequence[ScoreRow]) -> str:
    count = len({row.task for row in rows})
    return f"average of {count} task{'s' if count != 1 else ''}"


def _average(rows: Sequence[ScoreRow], pool: str, interval: bool) -> str:
    """Padded by the width of an interval, so that it stands below the means."""
    mean = average([row for row in rows if row.pool == pool])
    return f"{mean:.4f}" + " " * (len(" [0.0000, 0.0000]") if interval else 0)


def markdown_table(rows: Sequence[ScoreRow], experiment: Experiment, warnings: Sequence[str]) -> str:
    """A page: the same cells, warnings, all metrics, and what exactly was run."""
    parts = [f"# {experiment.name}", _joined(_scores(rows)), _bullets(notes(rows, experiment))]
    if warnings:
        parts += ["## Warnings", _bullets(warnings)]
    parts += ["## All metrics", _joined(_all_metrics(rows)), "`of`: the ceiling, which no search can pass."]
    parts += ["## What was run", _joined(_what_was_run(rows, experiment))]
    return "\n\n".join(parts) + "\n"


def _joined(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _bullets(texts: Iterable[str]) -> str:
    return _joined(f"- {text}" for text in texts)


def _scores(rows: Sequence[ScoreRow]) -> Iterator[str]:
    columns = list(_columns(rows))
    yield _cells(column.title for column in columns)
    yield _cells("---:" if column.is_number else "---" for column in columns)
    for lines in _by_encoder(rows):
        for line in lines:
            yield _cells(column.cell(line) for column in columns)
        own = [row for line in lines for row in line.rows]
        feet = (column.foot(own).strip() for column in columns)
        yield _cells(f"**{foot}**" if foot else "" for foot in feet)


def _all_metrics(rows: Sequence[ScoreRow]) -> Iterator[str]:
    """One line per metric, not one column: tasks differ in their cutoffs."""
    pools = list(dict.fromkeys(row.pool for row in rows))
    yield _cells(["encoder", "task", "metric", *pools, "remarks"])
    yield _cells(["---", "---", "---", *("---:" for _ in pools), "---"])
    for line in (line for lines in _by_encoder(rows) for line in lines):
        for name in line.first.metrics:
            values = (_capped(line.row(pool), name) for pool in pools)
            remarks = _remarks(line) if name == line.first.headline else ""
            yield _cells([line.first.encoder, line.first.task, name, *values, remarks])


def _capped(row: ScoreRow, name: str) -> str:
    ceiling = row.ceilings[name]
    return _score(row.metrics[name]) + (f" of {ceiling:.4f}" if ceiling < 1 else "")


def _remarks(line: _Line) -> str:
    """The marks of all pools; one that they share is said once."""
    shared = [mark for mark in line.first.marks if all(mark in row.marks for row in line.rows)]
    own = [f"{row.pool}: {mark}" for row in line.rows for mark in row.marks if mark not in shared]
    return "; ".join([*shared, *own])


def _what_was_run(rows: Sequence[ScoreRow], experiment: Experiment) -> Iterator[str]:
    settings, benchmark = experiment.settings, experiment.benchmark
    yield f"- benchmark: {benchmark.name}, split {benchmark.split}, data root `{benchmark.root}`"
    for row in {row.encoder: row for row in rows}.values():
        yield from _encoder(row)
    yield f"- instructions: {settings.embed.instruction}"
    kind = "exact" if all(row.is_exact for row in rows) else "approximate"
    yield f"- index: {settings.index.factory} ({kind})"
    yield f"- candidates kept per query: {settings.retrieve.depth}"
    for row in rows:
        yield f"- {row.encoder}, {row.task}, {row.pool} ({row.candidates:,} candidates): `{row.artifact}`"


def _encoder(row: ScoreRow) -> Iterator[str]:
    made = row.made
    weights = f"random weights (seed {made.seed})" if made.has_random_weights else f"weights `{made.weights}`"
    yield (f"- encoder {row.encoder}: module `{made.module}`, {weights}, computed in {made.precision}, "
           f"stored as {made.storage}")
    yield from (f"  - {key}: `{value}`" for key, value in made.identity.items())
    yield f"  - made with: {', '.join(f'{name} {version}' for name, version in made.versions.items())}"


def _cells(texts: Iterable[str]) -> str:
    """A line of a Markdown table; a bar would end a cell, a line end the table."""
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"
