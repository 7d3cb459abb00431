"""verify: do the scores on disk equal those that stand in configs/golden/<experiment>.yaml?

A golden file holds a metric's mean for every cell, and the tolerance that another machine, device or library is
allowed: OK is within it, near within three times it, FAIL beyond; only OK is agreement. Its numbers may be those of a
finished run (`--write`) or published ones, whose `source` it names. Who runs some of the tasks wants to know about
those: cells that were not run, and cells of which nothing is expected, are named and counted, and fail nothing; but
where nothing at all can be compared, nothing agrees.
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
NEAR = 3  # times the tolerance: more than noise, but rather another instruction or library than another model
_TITLES = ("encoder", "task", "pool", "expected", "found", "difference", "")

_COMPARED = ("OK", "near", "FAIL")

Key = tuple[str, str, str]  # encoder, task, pool
Means = Mapping[str, float]  # of every metric of a cell, rounded to six decimals


class Cell(NamedTuple):
    """What is expected: which metric, and its mean over the queries, a fraction."""

    metric: str
    mean: float


@dataclass(frozen=True)
class Golden:
    """`source`: where the numbers come from, and `split`: of which split they are, where the file says so."""

    tolerance: float
    cells: Mapping[Key, Cell]
    source: str = ""
    split: str = ""


@dataclass(frozen=True)
class Verdict:
    """`lines` to print, and whether something was compared and all of it agrees within the tolerance."""

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
    golden, split = read_golden(path), plan.experiment.benchmark.split
    if golden.split not in ("", split):
        raise UserError(f"the expected scores are of split {golden.split}, this experiment is on split {split}",
                        str(path), f"set benchmark.split={golden.split}")
    return compare(golden, _means(score_rows(plan)))


def compare(golden: Golden, found: Mapping[Key, Means]) -> Verdict:
    """Cell by cell, in the order of the golden file, then averages of what was compared; added cells stand last."""
    states = {key: _state(cell, found.get(key), golden.tolerance) for key, cell in golden.cells.items()}
    added = [key for key in found if key not in golden.cells]
    lines = [_line(key, cell, found.get(key), states[key]) for key, cell in golden.cells.items()]
    lines += [(*key, "-", "-", "-", "nothing is expected") for key in added]
    lines += _averages(golden, found, [key for key, state in states.items() if state in _COMPARED])
    return Verdict((*_aligned(lines), "", *_summary(golden, found, list(states.values()), len(added))),
                   "OK" in states.values() and not {"near", "FAIL"} & set(states.values()))


def _summary(golden: Golden, found: Mapping[Key, Means], states: Sequence[str], added: int) -> Iterator[str]:
    counts = {state: states.count(state) for state in (*_COMPARED, "not run", "not measured")}
    compared = sum(counts[state] for state in _COMPARED)
    are_same = compared and all(found[key].get(cell.metric) == round(cell.mean, DECIMALS)
                                for key, cell in golden.cells.items() if key in found)
    yield (f"{counts['OK']} of {compared} agree within {golden.tolerance:.{DECIMALS}f}; "
           f"{'all are' if are_same else 'not all are'} equal to {DECIMALS} decimals")
    others = [f"{counts['near']} near: within {NEAR} times that" * bool(counts["near"]),
              f"{counts['FAIL']} FAIL" * bool(counts["FAIL"]),
              f"{counts['not run']} not run: this experiment, with these options, does not have them"
              * bool(counts["not run"]),
              f"{counts['not measured']} by a metric that was not measured" * bool(counts["not measured"]),
              f"of {added} nothing is expected" * bool(added)]
    yield from filter(None, others)
    if golden.source:
        yield f"expected: {golden.source}"


def read_golden(path: Path) -> Golden:
    """A golden file; UserError if it is damaged."""
    try:
        loaded = yaml.safe_load(path.read_text())
        metrics = {str(task): str(metric) for task, metric in loaded["metrics"].items()}
        cells = {(str(encoder), str(task), str(pool)): Cell(metrics[str(task)], float(mean))
                 for encoder, tasks in loaded["scores"].items()
                 for task, pools in tasks.items() for pool, mean in pools.items()}
        return Golden(_checked(loaded["tolerance"]), cells, str(loaded.get("source", "")), str(loaded.get("split", "")))
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
    for row in rows:
        scores.setdefault(row.encoder, {}).setdefault(row.task, {})[row.pool] = round(row.value.mean, DECIMALS)
    values = {"tolerance": float(tolerance), "split": plan.experiment.benchmark.split,
              "metrics": {row.task: row.headline for row in rows}, "scores": scores}
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


def _means(rows: Sequence[ScoreRow]) -> dict[Key, Means]:
    return {(row.encoder, row.task, row.pool):
            {name: round(value.mean, DECIMALS) for name, value in row.metrics.items()} for row in rows}


def _state(expected: Cell, found: Means | None, tolerance: float) -> str:
    if found is None:
        return "not run"
    if expected.metric not in found:
        return "not measured"
    away = abs(_difference(expected.mean, found[expected.metric]))
    if away <= tolerance:
        return "OK"
    return "near" if away <= round(NEAR * tolerance, DECIMALS) else "FAIL"


def _difference(expected: float, found: float) -> float:
    """Rounded again: 0.612 - 0.61 is a little more than 0.002 in binary."""
    return round(found - expected, DECIMALS)


def _line(key: Key, expected: Cell, found: Means | None, state: str) -> tuple[str, ...]:
    mean = None if found is None else found.get(expected.metric)
    if mean is None:
        return (*key, f"{expected.mean:.{DECIMALS}f}", "-", "-",
                state if found is None else f"{state}: {expected.metric}")
    return (*key, *_numbers(expected.mean, mean), state)


def _numbers(expected: float, found: float) -> tuple[str, str, str]:
    return (f"{expected:.{DECIMALS}f}", f"{found:.{DECIMALS}f}", f"{_difference(expected, found):+.{DECIMALS}f}")


def _averages(golden: Golden, found: Mapping[Key, Means], compared: Sequence[Key]) -> Iterator[tuple[str, ...]]:
    """Of the tasks that were compared, per encoder and pool; it has no verdict of its own."""
    for encoder, pool in dict.fromkeys((encoder, pool) for encoder, _, pool in compared):
        own = [key for key in compared if (key[0], key[2]) == (encoder, pool)]
        if len(own) > 1:
            expected = sum(golden.cells[key].mean for key in own) / len(own)
            mean = sum(found[key][golden.cells[key].metric] for key in own) / len(own)
            yield (encoder, f"average of {len(own)} tasks", pool, *_numbers(expected, mean), "")


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """A table of plain text; encoders are named where there are several."""
    first = 0 if len({line[0] for line in lines}) > 1 else 1
    table = [line[first:] for line in (_TITLES, *lines)]
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join(cell.rjust(width) if 3 <= place + first <= 5 else cell.ljust(width)
                      for place, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in table]
