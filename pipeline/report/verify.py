"""verify: do the scores on disk equal those that stand in configs/golden/<experiment>.yaml?

A golden file holds the headline mean of every cell in six decimals, and the tolerance that another machine, device
or library is allowed. What is missing, what is added and what is measured by another metric differ as well: a
comparison that left them out would agree too easily.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline import pieces
from pipeline.artifacts import atomic_path
from pipeline.config import Experiment
from pipeline.plan import Plan
from pipeline.report.rows import ScoreRow, score_rows
from pipeline.support.errors import UserError

DECIMALS = 6
TOLERANCE = 0.002  # near ties may fall otherwise with other devices and library versions
_TITLES = ("encoder", "task", "pool", "expected", "found", "difference", "")

Key = tuple[str, str, str]  # encoder, task, pool


class Cell(NamedTuple):
    """A headline: which metric, and its mean over the queries, a fraction rounded to six decimals."""

    metric: str
    mean: float


@dataclass(frozen=True)
class Golden:
    tolerance: float
    cells: Mapping[Key, Cell]


@dataclass(frozen=True)
class Verdict:
    """`lines` to print, and whether all cells agree within the tolerance."""

    lines: tuple[str, ...]
    is_equal: bool


def golden_path(experiment: Experiment) -> Path:
    """Where its expected scores stand."""
    return pieces.CONFIGS / "golden" / f"{experiment.name}.yaml"


def verify(plan: Plan) -> Verdict:
    """Compare every score with the golden file; UserError if there is none, NotReady if a score is missing."""
    path = golden_path(plan.experiment)
    if not path.is_file():
        known = ", ".join(pieces.available("golden")) or "none yet"
        raise UserError(f"there are no expected scores for experiment '{plan.experiment.name}'", str(path),
                        f"there are: {known}")
    return compare(read_golden(path), _cells(score_rows(plan)))


def compare(golden: Golden, found: Mapping[Key, Cell]) -> Verdict:
    """Cell by cell, in the order of the golden file; added cells stand last."""
    keys = list(dict.fromkeys([*golden.cells, *found]))
    remarks = {key: _remark(golden.cells.get(key), found.get(key), golden.tolerance) for key in keys}
    lines = [_line(key, golden.cells.get(key), found.get(key), remarks[key]) for key in keys]
    agreeing = sum(remark == "ok" for remark in remarks.values())
    are_same = golden.cells == dict(found)
    last = (f"{agreeing} of {len(keys)} agree within {golden.tolerance:.{DECIMALS}f}; "
            f"{'all are' if are_same else 'not all are'} equal to {DECIMALS} decimals")
    return Verdict((*_aligned(lines), "", last), 0 < agreeing == len(keys))


def read_golden(path: Path) -> Golden:
    """A golden file; UserError if it is damaged."""
    try:
        loaded = yaml.safe_load(path.read_text())
        metrics = {str(task): str(metric) for task, metric in loaded["metrics"].items()}
        cells = {(str(encoder), str(task), str(pool)): Cell(metrics[str(task)], float(mean))
                 for encoder, tasks in loaded["scores"].items()
                 for task, pools in tasks.items() for pool, mean in pools.items()}
        return Golden(_checked(loaded["tolerance"]), cells)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"this is not a file of expected scores: {error}", str(path),
                        "it has `tolerance`, `metrics: {task: name}` and `scores: {encoder: {task: {pool: mean}}}`"
                        ) from None


def write_golden(plan: Plan, path: Path, tolerance: float = TOLERANCE) -> None:
    """Write the scores on disk as those to be expected; NotReady if one is missing."""
    try:
        _checked(tolerance)
    except ValueError as error:
        raise UserError(str(error)) from None
    rows = score_rows(plan)
    scores: dict[str, Any] = {}
    for (encoder, task, pool), cell in _cells(rows).items():
        scores.setdefault(encoder, {}).setdefault(task, {})[pool] = cell.mean
    values = {"tolerance": float(tolerance), "metrics": {row.task: row.headline for row in rows}, "scores": scores}
    comments = "".join(f"# {line}\n" for line in _origin(plan, rows))
    with atomic_path(path) as temporary:
        temporary.write_text(comments + yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None,
                                                  width=100))


def _checked(tolerance: Any) -> float:
    if not 0 <= float(tolerance) < 1:
        raise ValueError(f"tolerance is {tolerance}; it must be a fraction, such as {TOLERANCE}")
    return float(tolerance)


class _Dumper(yaml.SafeDumper):
    """Plain YAML, numbers with six decimals."""


_Dumper.add_representer(float, lambda dumper, value: dumper.represent_scalar(
    "tag:yaml.org,2002:float", f"{value:.{DECIMALS}f}"))


def _origin(plan: Plan, rows: Sequence[ScoreRow]) -> Iterator[str]:
    """What was run, with which weights, under which versions: as ASCII, one line each."""
    settings, benchmark = plan.experiment.settings, plan.experiment.benchmark
    options = ", ".join(f"{name}={value}" for name, value in benchmark.options.items())
    lines = [f"Expected scores of the experiment '{plan.experiment.name}': means of each task's headline metric.",
             f"Made from a finished run on {benchmark.name}, split {benchmark.split}{f' ({options})' * bool(options)};",
             f"index {settings.index.factory}, {settings.retrieve.depth} candidates kept per query."]
    for row in {row.encoder: row for row in rows}.values():
        made = row.made
        versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
        identity = ", ".join(f"{name} {value}" for name, value in made.identity.items())  # by content, never by path
        lines += [f"Encoder {row.encoder}: module {made.module}, {identity};",
                  f"computed in {made.precision}, stored as {made.storage}, instructions: {made.instruction};",
                  f"made with {versions or 'unknown versions'}."]
    for line in lines:
        yield from textwrap.wrap(line.encode("ascii", "backslashreplace").decode(), 110)


def _cells(rows: Sequence[ScoreRow]) -> dict[Key, Cell]:
    return {(row.encoder, row.task, row.pool): Cell(row.headline, round(row.value.mean, DECIMALS)) for row in rows}


def _remark(expected: Cell | None, found: Cell | None, tolerance: float) -> str:
    if expected is None:
        return "DIFFERS: not expected"
    if found is None:
        return "DIFFERS: not there"
    if expected.metric != found.metric:
        return f"DIFFERS: {found.metric}, not {expected.metric}"
    return "ok" if abs(_difference(expected, found)) <= tolerance else "DIFFERS"


def _difference(expected: Cell, found: Cell) -> float:
    """Rounded again: 0.612 - 0.61 is a little more than 0.002 in binary."""
    return round(found.mean - expected.mean, DECIMALS)


def _line(key: Key, expected: Cell | None, found: Cell | None, remark: str) -> tuple[str, ...]:
    means = [f"{cell.mean:.{DECIMALS}f}" if cell else "-" for cell in (expected, found)]
    is_comparable = expected and found and expected.metric == found.metric
    difference = f"{_difference(expected, found):+.{DECIMALS}f}" if expected and found and is_comparable else "-"
    return (*key, *means, difference, remark)


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """A table of plain text; encoders are named where there are several."""
    first = 0 if len({line[0] for line in lines}) > 1 else 1
    table = [line[first:] for line in (_TITLES, *lines)]
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join(cell.rjust(width) if 3 <= place + first <= 5 else cell.ljust(width)
                      for place, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in table]
