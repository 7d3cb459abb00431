"""The log and its picture: what a kill cuts short, what a resumed training drops, logs of every length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.training import curve


def step_lines(count: int, first: int = 1) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 5 / step, "accuracy": step / (count + first), "learning_rate": 1e-3}
            for step in range(first, first + count)]


def validation(step: int, **scores: float) -> dict[str, Any]:
    return {"step": step, "validation": {**scores, "average": sum(scores.values()) / len(scores)}}


def test_lines_come_back_as_they_were_written(tmp_path: Path) -> None:
    path, lines = tmp_path / "log.jsonl", [*step_lines(3), validation(3, digits_task0=1 / 3)]
    assert curve.read_lines(path) == []
    curve.append_lines(path, lines[:1])
    curve.append_lines(path, lines[1:])
    assert curve.read_lines(path) == lines
    assert path.read_bytes().count(b"\n") == 4


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_rewinding_drops_later_steps_and_a_cut_line(tmp_path: Path, cut: int) -> None:
    path, lines = tmp_path / "log.jsonl", step_lines(5)
    lines.insert(2, validation(2, digits_task0=0.5))
    curve.append_lines(path, lines)
    path.write_bytes(path.read_bytes()[:-cut])  # also where only the end of the line is missing
    assert curve.read_lines(path) == lines[:-1]
    curve.rewind(path, 3)
    assert curve.read_lines(path) == lines[:4]
    curve.append_lines(path, lines[4:])
    whole = tmp_path / "whole.jsonl"
    curve.append_lines(whole, lines)
    assert path.read_bytes() == whole.read_bytes(), "as if it had never been interrupted"


def test_rewinding_to_a_cut_lines_own_step_leaves_room_for_it(tmp_path: Path) -> None:
    """The next line must not be glued to the rest of one that was cut."""
    path, lines = tmp_path / "log.jsonl", step_lines(3)
    curve.append_lines(path, lines)
    path.write_bytes(path.read_bytes()[:-9])
    curve.rewind(path, 3)
    curve.append_lines(path, lines[2:])
    assert curve.read_lines(path) == lines


def test_rewinding_to_the_start_leaves_an_empty_log(tmp_path: Path) -> None:
    for name, lines in (("absent", []), ("full", step_lines(4))):
        path = tmp_path / name
        curve.append_lines(path, lines)
        curve.rewind(path, 0)
        assert path.read_bytes() == b""
    curve.rewind(tmp_path / "new" / "log.jsonl", 0)
    assert curve.read_lines(tmp_path / "new" / "log.jsonl") == []
    assert not [path for path in tmp_path.rglob(".*")]


@pytest.mark.parametrize("count", [0, 1, 2, 99, 100, 1000, 1234])
def test_a_drawn_curve_is_made_of_means(count: int) -> None:
    lines = step_lines(count)
    steps, means = curve._smoothed(lines, "loss")
    assert len(steps) == len(means) <= 200
    width = max(1, count // 100)
    for place, (step, mean) in enumerate(zip(steps, means)):
        own = [line["loss"] for line in lines[place * width:(place + 1) * width]]
        assert mean == pytest.approx(np.mean(own)) and step == min((place + 1) * width, count)
    assert not count or steps[-1] == count


@pytest.mark.parametrize("lines", [
    [], step_lines(1), step_lines(1500), [validation(1, digits_task0=0.2)],
    [*step_lines(20), validation(10, digits_task0=0.2, scenes_task3=0.1), validation(20, digits_task0=0.4)],
    [*step_lines(20), validation(10, digits_task0=0.2), validation(20, digits_task0=0.4, scenes_task3=0.3)],
    [{"step": 1, "loss": 0.0, "accuracy": 1.0, "learning_rate": 0.0}],
], ids=["nothing", "one step", "many", "only a validation", "a task fewer", "a task more", "no loss"])
def test_a_picture_of_any_log(tmp_path: Path, lines: list[dict[str, Any]], recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "curve.png"
    curve.draw(lines, path, "tiny")
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 600
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 2
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    assert all("log-scaled" in str(warning.message) for warning in recwarn)  # a loss of exactly 0


def test_validations_are_drawn(tmp_path: Path) -> None:
    """And the same log gives the same bytes."""
    lines, path = step_lines(20), tmp_path / "curve.png"
    pictures = []
    for more in ([], [], [validation(10, digits_task0=0.2), validation(20, digits_task0=0.9)]):
        curve.draw([*lines, *more], path, "tiny")
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
