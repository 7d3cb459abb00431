"""A search by hand finds what the pipeline finds for the same query, and answers mistakes in words."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.cli import main
from pipeline.config import Experiment
from pipeline.look.cells import choose
from pipeline.look.prompt import turn
from pipeline.look.searching import Asked, Searcher
from pipeline.support.errors import UserError
from tests.small_mbeir import TASK, SmallMbeir

ROUNDING = 2e-5  # of scores of float16 vectors, when an item is encoded in other company


def rows_of(experiment: Experiment, pattern: str) -> list[dict[str, Any]]:
    paths = sorted((experiment.work_dir / "artifacts").glob(pattern))
    assert paths, pattern
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("task, pool", [("scenes_task0", "local"), ("digits_task4", "union"), ("edits_task7", "local"),
                                        ("facts_task1", "union"), ("museum_task8", "union")])
def test_a_stored_query_gets_the_ranking_of_its_run(quick_run: Experiment, small_arguments: list[str], task: str,
                                                    pool: str) -> None:
    """By its name, and typed: its text, its image, and the instruction that the rule gives it."""
    searcher = Searcher(choose("quickstart", [f"work_dir={quick_run.work_dir}", *small_arguments], task, pool, None))
    run = rows_of(quick_run, f"retrieve/*.{task}.{pool}.flat-*/run-*.parquet")
    for row in rows_of(quick_run, f"collect/*.{task}-*/queries-*.parquet")[:3]:
        expected = [hit for hit in run if hit["query_id"] == row["query_id"]][:20]
        by_name = searcher.search(Asked(query_id=row["query_id"], top=20))
        typed = searcher.search(Asked(row["text"], row["image"], None, by_name.query.instructions[0], 20))
        for view in (by_name, typed):
            assert [hit.candidate_id for hit in view.hits] == [hit["candidate_id"] for hit in expected]
            assert [hit.score for hit in view.hits] == pytest.approx([hit["score"] for hit in expected], abs=ROUNDING)
        assert typed.query.encoded == by_name.query.encoded and typed.query.query_id is None
        assert any(hit.relevance is not None for hit in by_name.hits + typed.hits) is bool(
            {hit.candidate_id for hit in by_name.hits if hit.is_hit})


@pytest.fixture
def small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> SmallMbeir:
    small = SmallMbeir(tmp_path).write()
    assert main(["run", str(small.experiment), "--json"]) == 0
    capsys.readouterr()
    return small


def search(capsys: pytest.CaptureFixture[str], small: SmallMbeir, *arguments: str) -> dict[str, Any]:
    assert main(["search", str(small.experiment), TASK, *arguments, "--json"]) == 0
    view: dict[str, Any] = json.loads(capsys.readouterr().out)
    return view


def hits(view: dict[str, Any]) -> list[tuple[str, float]]:
    return [(hit["candidate_id"], hit["score"]) for hit in view["hits"]]


@pytest.mark.parametrize("overrides", [
    ["index.factory=HNSW4", "retrieve.faiss_parameters=efSearch=8"], ["embed.instruction=all"],
    ["embed.instruction=none"], ["embed.storage=float32"], ["retrieve.memory_gb=0.00000001"]])
def test_options_of_the_experiment_hold(small: SmallMbeir, capsys: pytest.CaptureFixture[str],
                                        overrides: list[str]) -> None:
    assert main(["run", str(small.experiment), *overrides, "--json"]) == 0
    capsys.readouterr()
    for query_id in ("7:1", "7:3"):
        assert main(["show", str(small.experiment), TASK, query_id, *overrides, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        found = search(capsys, small, *overrides, "--query", query_id)
        assert hits(found) == hits(shown) and len(found["hits"]) == 4
        assert found["query"]["encoded"] == shown["query"]["encoded"]


def test_typed_texts_are_written_as_the_benchmark_writes_its_own(
        small: SmallMbeir, capsys: pytest.CaptureFixture[str]) -> None:
    view = search(capsys, small, "a", "red toy")
    assert view["query"]["text"] == "A red toy." and view["query"]["encoded"] == ["Find the picture. A red toy."]
    view = search(capsys, small, "--top", "2", "a red", "embed.batch_size=8", "toy", "--instruction", "show it")
    assert view["query"]["text"] == "A red toy." and len(view["hits"]) == 2
    assert view["query"]["encoded"] == ["Show it. A red toy."] and view["query"]["instructions"] == ["Show it."]
    view = search(capsys, small, "a red toy", "--instruction", "none")
    assert view["query"]["encoded"] == ["A red toy."] and view["query"]["instructions"] == []


def test_an_image_may_be_anywhere(small: SmallMbeir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = tmp_path / "elsewhere.png"
    shutil.copy(small.image("blue"), copied)
    none = ["--instruction", "none", "--top", "1"]
    for image in (str(copied), "mbeir_images/blue.png"):
        assert hits(search(capsys, small, "--image", image, *none))[0][0] == "7:3"
    both = search(capsys, small, "a toy", "--image", str(copied), "--html", str(tmp_path / "page.html"))
    assert both["query"]["modality"] == "image,text" and "elsewhere.png" in (tmp_path / "page.html").read_text()


def test_an_encoder_of_another_interpreter(small: SmallMbeir, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = tmp_path / "tests_toy_encoder.yaml"  # of the same name as the one that embedded the pool
    elsewhere.write_text(f"encoder: tests.toy_encoder\npython: {sys.executable}\n")
    here = search(capsys, small, "a red toy")
    assert hits(search(capsys, small, "a red toy", f"encoders=[{elsewhere}]")) == hits(here)


def test_mistakes_are_told(small: SmallMbeir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for arguments, said in [(["--image", "/nowhere.png"], "there is no such image"),
                            (["--image", "../escape.png"], "climbs with '..'"),
                            (["--image", str(broken)], "undecodable_image"),
                            (["--query", "7:33"], "nearest: 7:3"), (["--query", "7:3", "--image", "x"], "leave out"),
                            (["red", "embed.presicion=bf16"], "nearest: precision")]:
        assert main(["search", str(small.experiment), TASK, *arguments]) == 2
        assert said in capsys.readouterr().err
    assert main(["search", str(small.experiment), TASK, "red", "embed.storage=float32"]) == 3
    with pytest.raises(SystemExit):
        main(["search", str(small.experiment), TASK, "red", "--topp", "3"])
    assert "unrecognized arguments: --topp" in capsys.readouterr().err


def test_a_conversation(small: SmallMbeir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["a blue toy", ":top 1", "a blue toy", ":image /nowhere.png", ":query 7:1", ":image mbeir_images/red.png",
             ":image", ":quit", "never asked"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["search", str(small.experiment), TASK, "--json"]) == 0
    said = capsys.readouterr()
    views = [json.loads(line) for line in said.out.splitlines() if line.startswith("{")]
    assert [len(view["hits"]) for view in views] == [4, 1, 1, 1]
    assert [view["query"]["query_id"] for view in views] == [None, None, "7:1", None]
    assert "there is no such image" in said.err


def test_turns_of_a_conversation() -> None:
    standing = Asked(top=3)
    assert turn("  a dog ", standing).now == Asked("a dog", top=3)
    assert turn("", standing) == (standing, None, "", False)
    pictured = turn(":image dog.png", standing)
    assert pictured.now == pictured.standing == Asked(image="dog.png", top=3)
    assert turn("brown", pictured.standing).now == Asked("brown", "dog.png", top=3)
    assert turn(":image none", pictured.standing).standing == standing
    assert turn(":instruction", turn(":instruction find it", standing).standing).standing == standing
    assert turn(":instruction none", standing).standing.instruction == "none"
    assert turn(":query 7:1", pictured.standing).now == Asked(query_id="7:1", top=3)
    assert turn(":quit", standing).is_last and ":image" in turn(":help", standing).said
    for line in (":top many", ":top 0", ":qiut"):
        with pytest.raises(UserError):
            turn(line, standing)
