"""What happened at each step, one JSON line each, and its picture.

The file is appended to; a resumed training first drops the lines after the step it resumes from, so that the file
always is that of an uninterrupted training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.artifacts import atomic_path

_SMOOTHED = 100  # points of the drawn curve: each is the mean of the steps around it


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last one that was cut short by a kill is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    with path.open("a", encoding="ascii") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def rewind(path: Path, step: int) -> None:
    """Drop what was written after this step."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))


def draw(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """A PNG: loss, in-batch accuracy, and the validation scores where there are some."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "validation" in line]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(*_smoothed(steps, "loss"), color="tab:blue")
    left.set(xlabel="step", ylabel="loss", title=title, yscale="log")
    right.plot(*_smoothed(steps, "accuracy"), color="tab:grey", label="in-batch accuracy")
    for number, task in enumerate(validations[-1]["validation"] if validations else ()):
        values = [line["validation"].get(task) for line in validations]
        is_average = task == "average"
        right.plot([line["step"] for line in validations], values, marker=".", linewidth=2.5 if is_average else 0.8,
                   color="black" if is_average else colormaps["tab20"](number % 20), label=task)
    right.set(xlabel="step", ylim=(0, 1), title="accuracy, and validation")
    right.legend(fontsize=5.5, loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})


def _smoothed(lines: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    width = max(1, len(lines) // _SMOOTHED)
    groups = [lines[start:start + width] for start in range(0, len(lines), width)]
    means = [sum(line[key] for line in group) / len(group) for group in groups]
    return [group[-1]["step"] for group in groups], means
