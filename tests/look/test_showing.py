"""`show` tells of a query what the files of its experiment hold, in text, JSON and a page."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.config import Experiment
from pipeline.look import Candidate, Picture, Query, View
from pipeline.look.text import TextView, plain
from tests.small_mbeir import TASK, SmallMbeir


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["show", *arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture
def small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> SmallMbeir:
    """Finished; the second query has a relevant candidate outside the pool and one that was judged not relevant."""
    small = SmallMbeir(tmp_path)
    small.qrels += ["7:2 0 7:99 2 0", "7:2 0 7:1 0 0"]
    assert main(["run", str(small.write().experiment)]) == 0
    capsys.readouterr()
    return small


def test_json_tells_what_the_run_and_the_tables_hold(quick_run: Experiment, small_arguments: list[str],
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    root = quick_run.work_dir / "artifacts"
    run_path, = (root / "retrieve").glob("*.quiz_task6.union.flat-*/run-00000.parquet")
    query_path, = (root / "collect").glob("*.quiz_task6-*/queries-00000.parquet")
    score_path, = (root / "score").glob("*.quiz_task6.union.flat-*/per_query.parquet")
    row = pq.read_table(query_path).to_pylist()[3]
    expected = [hit for hit in pq.read_table(run_path).to_pylist() if hit["query_id"] == row["query_id"]]
    arguments = [f"work_dir={quick_run.work_dir}", *small_arguments, "--pool", "union", "--top", "7", "--json"]
    view = json.loads(shown(capsys, "quickstart", "quiz_task6", row["query_id"], *arguments))
    assert [(hit["candidate_id"], hit["rank"], hit["score"]) for hit in view["hits"]] == [
        (hit["candidate_id"], hit["rank"], hit["score"]) for hit in expected[:7]]
    assert view["query"]["encoded"][0] in row["instructed_texts"]
    assert view["query"]["text"] == row["text"] and view["query"]["picture"]["reference"] == row["image"]
    opened = quick_run.images.open(row["image"])
    assert (view["query"]["picture"]["width"], view["query"]["picture"]["height"]) == opened.size
    ranks = {hit["candidate_id"]: hit["rank"] for hit in expected}
    assert view["relevant"] and {each["candidate_id"]: each["rank"] for each in view["relevant"]} == {
        each["candidate_id"]: ranks.get(each["candidate_id"]) for each in view["relevant"]}
    values = next(each for each in pq.read_table(score_path).to_pylist() if each["query_id"] == row["query_id"])
    assert view["metrics"] == {name: value for name, value in values.items() if name != "query_id"}
    pools = [pq.read_table(path) for path in (root / "collect").glob("*.pool.*/candidates-*.parquet")]
    content = {each["candidate_id"]: each for pool in pools for each in pool.to_pylist()}
    for hit in view["hits"]:
        assert {key: hit[key] for key in ("text", "image", "modality")}.items() <= content[hit["candidate_id"]].items()


def test_text_marks_hits_and_names_what_no_search_can_find(small: SmallMbeir,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, str(small.experiment), TASK, "7:2")
    assert re.search(r"^text +A green toy\.$", text, re.MULTILINE)
    assert re.search(r"^encoded +(Find the picture|Which picture is meant\?)\.? A green toy\.$", text, re.MULTILINE)
    relevant, hits = text.split("\nrelevant\n")[1].split("\nfirst 4\n")
    assert re.search(r"^ +- +\*2 +7:99  is not in this pool$", relevant, re.MULTILINE)
    assert re.search(r"^ +\d +0\.\d{5}  \*  +image +7:2  mbeir_images/green.png$", hits, re.MULTILINE)
    assert re.search(r"^ +\d +0\.\d{5}  no +image +7:1  mbeir_images/red.png$", hits, re.MULTILINE)


def test_mistakes_name_what_is_nearest(small: SmallMbeir, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = str(small.experiment)
    for arguments, said in [([experiment, TASK, "7:22"], "nearest: 7:2"), ([experiment, TASK, "zebra"], "first is 7:1"),
                            ([experiment, "toy_task0", "7:1"], f"nearest: {TASK}"),
                            ([experiment, TASK, "7:1", "--pool", "onion"], "nearest: union"),
                            ([experiment, TASK, "7:1", "--encoder", "toy_encoder"], "nearest: tests_toy_encoder")]:
        assert main(["show", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert main(["show", experiment, TASK, "7:1", "embed.precision=bf16"]) == 3
    assert main(["show", experiment, TASK, "7:1", f"work_dir={small.root / 'other'}"]) == 3


class Page(HTMLParser):
    """Tags and their attributes as a browser would read them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_holds_its_pictures_and_nothing_else_is_loaded(small: SmallMbeir, tmp_path: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "view" / "query.html"
    shown(capsys, str(small.experiment), TASK, "7:2", "--html", str(path))
    page = Page(path.read_text())
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 1 + 4  # one relevant candidate in the pool, four hits
    head, _, packed = sources[0].partition(",")
    green = Image.open(io.BytesIO(base64.b64decode(packed))).getpixel((8, 8))
    assert head == "data:image/webp;base64" and isinstance(green, tuple) and max(green) == green[1]
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags} and "url(" not in path.read_text()
    assert [attributes["class"] for tag, attributes in page.tags if tag == "li"].count("hit") == 3


def test_what_data_hold_is_neither_obeyed_nor_markup(small: SmallMbeir, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J<script>alert(1)</script>\u202e\nnew line"
    for rows, key in ((small.queries, "query_txt"), (small.candidates, "txt")):
        rows[0][key] = evil
    small.candidates[0]["modality"], small.candidates[0]["img_path"] = "text", None
    assert main(["run", str(small.write().experiment)]) == 0
    capsys.readouterr()
    path = tmp_path / "evil.html"
    text = shown(capsys, str(small.experiment), TASK, "7:1", "--html", str(path))
    assert "\x1b" not in text and "\u202e" not in text and "alert(1)</script>" in text
    assert "script" not in {tag for tag, _ in Page(path.read_text()).tags} and "alert(1)" in path.read_text()


def test_a_broken_picture_is_told_and_does_not_end_it(small: SmallMbeir, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    small.image("green").write_bytes(b"no picture")
    path = tmp_path / "query.html"
    shown(capsys, str(small.experiment), TASK, "7:2", "--html", str(path))
    assert "mbeir_images/green.png: undecodable image" in path.read_text()


def test_lines_of_candidates_end_at_the_width() -> None:
    query = Query("q", "image", None, Picture("a.png", flaw="missing_image: a.png"), (), ("",))
    view = View("e", "t", "local", 1, query, (), (Candidate("c", 1, 0.5, None, True, "text", "long " * 100),), {}, 10)
    lines = list(TextView(view, 60).lines())
    assert max(map(len, lines[-1:])) == 60 and lines[-1].endswith("...") and "missing_image: a.png" in "\n".join(lines)
    assert len(list(TextView(view).lines())[-1]) > 500 and plain(" a\t\nb\x9b ") == "a b?"


def test_pictures_in_the_terminal(small: SmallMbeir, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("textual_image", reason="textual-image is not installed")
    text = shown(capsys, str(small.experiment), TASK, "7:2", "--pictures", "--top", "2")
    assert re.search(r"^1 .*mbeir_images/\w+\.png\n\S", text, re.MULTILINE)
    monkeypatch.setitem(__import__("sys").modules, "textual_image.renderable", None)
    assert main(["show", str(small.experiment), TASK, "7:2", "--pictures"]) == 2
    assert "pip install textual-image" in capsys.readouterr().err
