"""Generating mini M-BEIR: the same bytes everywhere, all or nothing, and no one else's directory."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmarks import Benchmark, mini_mbeir
from pipeline.benchmarks.mini_mbeir_world import drawing, spaces, writing
from pipeline.benchmarks.mini_mbeir_world.tasks import TASKS
from pipeline.support.errors import UserError

SCALE = 0.05
# The tree at this scale and seed 0, on any machine. Who changes it on purpose raises mini_mbeir.VERSION.
DIGEST = "f5f6043f54f6935b9996a113462ee673e279687f79dca3c53fcdcb7f965eb4ca"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mini") / "mini_mbeir"
    mini_mbeir.generate(directory, SCALE)
    return directory


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digest(directory: Path) -> str:
    tree = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        tree.update(f"{path.relative_to(directory).as_posix()}\0".encode())
        tree.update(hashlib.sha256(path.read_bytes()).digest())
    return tree.hexdigest()


def test_the_same_seed_and_scale_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    mini_mbeir.generate(tmp_path / "again", SCALE)
    assert digest(tmp_path / "again") == digest(root) == DIGEST


def test_pictures_are_pngs_that_others_read_alike() -> None:
    pixels = np.random.default_rng(0).integers(0, 16, (64, 64))
    palette = tuple((step, 2 * step, 255 - step) for step in range(16))
    with Image.open(BytesIO(drawing.png(pixels.astype(np.int32), palette))) as image:
        image.load()
        assert image.format == "PNG" and image.size == (64, 64)
        assert (np.asarray(image.convert("RGB")) == np.array(palette)[pixels]).all()


def test_the_summary_counts_what_is_there(root: Path) -> None:
    summary = mini_mbeir.generate(root, SCALE)
    assert summary.images == len(list((root / "mbeir_images").rglob("*.png")))
    assert summary.train_queries == sum(len(rows(path)) for path in root.glob("query/train/*.jsonl"))
    for task, counts in zip(TASKS, summary.tasks):
        suffix = "_test" if task.has_split_pools else ""
        asked = rows(root / "query" / "test" / f"mbeir_{task.name}_test.jsonl")
        pool = rows(root / "cand_pool" / "local" / f"mbeir_{task.name}{suffix}_cand_pool.jsonl")
        assert (counts.name, counts.queries, counts.candidates) == (task.name, len(asked), len(pool))
        assert counts.kind == f"{asked[0]['query_modality']} -> {pool[0]['modality']}"
        positives = [len(row["pos_cand_list"]) for row in asked]
        assert counts.positives_per_query == pytest.approx(np.mean(positives))


def test_chance_is_the_share_of_choices_that_hold_a_positive() -> None:
    choices = list(itertools.combinations(range(9), writing.CUTOFF))
    for positives in range(1, 5):
        hits = sum(min(choice) < positives for choice in choices)
        assert writing._chance(9, positives) == pytest.approx(hits / len(choices))


def test_a_complete_directory_is_left_alone(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    mini_mbeir.generate(root, SCALE, 0)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_directory_of_another_scale_or_seed_is_refused(root: Path) -> None:
    for scale, seed in ((0.06, 0), (SCALE, 1)):
        with pytest.raises(UserError, match="scale 0.05, seed 0"):
            mini_mbeir.generate(root, scale, seed)


@pytest.fixture
def small_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the whole tree, one file."""
    def write(root: Path, scale: float, world: Any) -> tuple[tuple[()], int, int]:
        (root / "query").write_text(f"{scale}")
        return (), 0, 0

    monkeypatch.setattr(mini_mbeir, "write_tree", write)


@pytest.mark.usefixtures("small_tree")
def test_a_directory_of_something_else_is_refused_and_an_empty_one_is_used(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not mini M-BEIR"):
        mini_mbeir.generate(tmp_path / "mine", SCALE)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not mini M-BEIR"):
        mini_mbeir.generate(tmp_path / "file", SCALE)
    (tmp_path / "empty").mkdir()
    mini_mbeir.generate(tmp_path / "empty", SCALE)
    assert (tmp_path / "empty" / mini_mbeir.MARKER).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "mine"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: Path, *arguments: Any) -> None:
        (root / "query").mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(mini_mbeir, "write_tree", fail)
    with pytest.raises(OSError, match="disk full"):
        mini_mbeir.generate(tmp_path / "mini", SCALE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_tree")
def test_the_slower_of_two_generators_adopts_the_work_of_the_quicker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    quicker = mini_mbeir.generate(tmp_path / "quicker", SCALE)

    def overtaken(path: Path, summary: mini_mbeir.Summary) -> None:
        shutil.move(tmp_path / "quicker", tmp_path / "mini")

    monkeypatch.setattr(mini_mbeir, "_write_marker", overtaken)
    adopted = mini_mbeir.generate(tmp_path / "mini", SCALE)
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]
    assert adopted == replace(quicker, directory=tmp_path / "mini")


@pytest.mark.parametrize("scale", [0, -1, 101, float("nan"), "1", True, None])
def test_a_scale_that_is_no_scale_is_refused(tmp_path: Path, scale: Any) -> None:
    with pytest.raises(UserError, match="scale is"):
        mini_mbeir.prepare(Benchmark(
            "mini_mbeir", "mini_mbeir", str(tmp_path / "mini"), "test", (), options={"scale": scale}))
    assert not (tmp_path / "mini").exists()


@pytest.mark.parametrize("seed", [-1, 0.5, "0", True, 2**32])
def test_a_seed_that_is_no_seed_is_refused(tmp_path: Path, seed: Any) -> None:
    with pytest.raises(UserError, match="seed is"):
        mini_mbeir.generate(tmp_path / "mini", 1.0, seed)


def test_a_row_is_in_one_split_only() -> None:
    for number in range(0, 614_400, 9973):
        row = spaces.SCENES.at(number)
        homes = [spaces.SCENES.holds(row, split) + spaces.EDITS.holds(row, split) for split in spaces.SPLITS]
        assert sum(homes) == spaces.SCENES.is_sound(row)
