"""The report: numbers of the manifests, nothing from outside, nothing unescaped, no larger than it may be."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline import cli
from pipeline.config import Experiment, load
from pipeline.plan import make_plan
from pipeline.report.charts import Line, areas, curves, stack, strip
from pipeline.report.page import Extent, write_report
from pipeline.report.rows import Value, average, score_rows
from pipeline.report.thumbnails import SIDE, Thumbnails
from pipeline.report.timings import timings
from pipeline.report.tracking import Tracker
from pipeline.run import run_experiment
from tests.small_mbeir import SmallMbeir

ENCODERS = ("quickstart_clip", "tiny_clip_random")
HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"alert(1)\">"
BROWSER = Path(__file__).parent / "browser"
MODULES = Path(os.environ.get("PLUMBLINE_NODE_MODULES",
                              BROWSER.parents[2] / "work" / "browser" / "node_modules"))


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str, name: str = "") -> list[dict[str, str | None]]:
        return [attributes for other, attributes in self.tags
                if other == tag and (not name or name in (attributes.get("class") or "").split())]


@pytest.fixture(scope="module")
def arguments(small_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["quickstart", f"encoders=[{','.join(ENCODERS)}]", f"work_dir={tmp_path_factory.mktemp('two')}",
            "tasks=[scenes_task0,facts_task1,edits_task7,quiz_task8]", *small_arguments]


@pytest.fixture(scope="module")
def experiment(arguments: list[str]) -> Experiment:
    """Two encoders, four tasks, two pools."""
    experiment = load(arguments[0], arguments[1:])
    run_experiment(experiment, [], say=lambda *_: None)
    return experiment


@pytest.fixture(scope="module")
def report(experiment: Experiment, arguments: list[str]) -> Path:
    return write_report(make_plan(experiment), arguments).path


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page(report)


def score_files(experiment: Experiment) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(scored.encoder, scored.task.name, scored.pool):
            json.loads(scored.job.artifact.path("scores.json").read_text()) for scored in make_plan(experiment).scored}


def check_scores(cells: list[dict[str, Any]], experiment: Experiment) -> None:
    """Every cell of the table says what the scores.json behind it says."""
    files = score_files(experiment)
    assert len(cells) == len(files) == 16
    for cell in cells:
        scores = files.pop((cell["encoder"], cell["task"], cell["pool"]))
        value = scores["metrics"][scores["headline"]]
        assert [float(cell[name]) for name in ("value", "low", "high")] == [value["mean"], value["low"], value["high"]]


def test_every_score_is_that_of_its_file(page: Page, experiment: Experiment) -> None:
    check_scores([{name.removeprefix("data-"): value for name, value in cell.items()}
                  for cell in page.of("td", "score")], experiment)
    rows = score_rows(make_plan(experiment))
    feet = [float(cell["data-value"] or "") for cell in page.of("td", "average")]
    assert feet == [average([row for row in rows if (row.encoder, row.pool) == (encoder, pool)])
                    for encoder in ENCODERS for pool in ("local", "union")]
    for row in rows:
        for value in row.metrics.values():
            assert f"{value.mean:.4f}" in page.text


def test_what_was_run_is_told(page: Page, experiment: Experiment) -> None:
    for row in score_rows(make_plan(experiment)):
        assert row.artifact in page.text
        for value in row.made.identity.values():
            assert str(value).removeprefix("sha256:") in page.text
        assert all(mark in page.text for mark in row.marks)
        if row.ceiling < 1:
            assert f"ceiling {row.ceiling:.4f}" in page.text
    assert "python -m pipeline run quickstart" in page.text and "random weights" in page.text
    for word in ("hashed", "fp32", "float16", "Flat (exact)", "torch", "wrong modality", "wrong domain", "wrong item"):
        assert word in page.text


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    images = page.of("img")
    assert images and all((image["src"] or "").startswith("data:image/webp;base64,") for image in images)
    assert all(image["alt"] for image in images)
    named = [value for _, attributes in page.tags for name, value in attributes.items()
             if name in ("src", "href", "action", "data", "srcset")]
    assert all((value or "").startswith(("data:", "#")) for value in named)
    assert "@import" not in page.source and "url(" not in page.source
    policy = next(tag["content"] for tag in page.of("meta") if tag.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'")


def test_each_task_has_its_curves_and_examples(page: Page, experiment: Experiment) -> None:
    labels = [chart["aria-label"] or "" for chart in page.of("svg", "chart")]
    for task in experiment.tasks:
        assert any(label.startswith(f"{task.name}: hit@k") for label in labels)
        assert sum(f", {task.name}, union: at rank 1" in label for label in labels) == 2
    topics = {card["data-topic"] for card in page.of("article", "card")}
    assert topics >= {"worst", "near", "win"}
    assert page.of("li", "hit") and "nothing relevant among the first" in page.text


def test_the_same_run_gives_the_same_page(report: Path, experiment: Experiment, arguments: list[str]) -> None:
    before = report.read_bytes()
    assert write_report(make_plan(experiment), arguments).path.read_bytes() == before


def test_a_page_keeps_to_its_size(experiment: Experiment, arguments: list[str]) -> None:
    plan = make_plan(experiment)
    bare, whole = write_report(plan, arguments, Extent(examples=0)), write_report(plan, arguments)
    middle = (whole.bytes + bare.bytes) / 2
    small = write_report(plan, arguments, Extent(megabytes=middle / 1e6))
    page = Page(small.path)
    assert write_report(plan, arguments) == whole, "and the whole page is there again for other tests"
    assert bare.examples == whole.left_out == 0 and bare.bytes < small.bytes <= middle
    assert small.examples + small.left_out == whole.examples and small.left_out > 0
    assert f"{small.left_out} more examples were left out" in page.text
    assert len(page.of("details", "task")) == 4, "what is left out is left out of every task alike"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that are markup, a picture that is gone and one that is broken since the run."""
    small = SmallMbeir(tmp_path_factory.mktemp("hostile"))
    for number, query in enumerate(small.queries):
        query["query_txt"] = f"{HOSTILE} {number}"
    small.candidates[3].update(txt=HOSTILE, modality="image,text")
    small.instructions[1] = small.instructions[1].replace("Find the picture.", HOSTILE)
    small.write()
    experiment = load(str(small.experiment))
    run_experiment(experiment, [], say=lambda *_: None)
    small.image("red").unlink()
    small.image("blue").write_bytes(b"not a picture")
    return write_report(make_plan(experiment), [HOSTILE], Extent(examples=4)).path


def test_texts_are_shown_and_not_obeyed(hostile: Path) -> None:
    page = Page(hostile)
    assert HOSTILE in page.text and page.of("article")
    assert len(page.of("script")) == 1 and not any("onerror" in attributes for _, attributes in page.tags)
    assert HOSTILE not in page.source


def test_pictures_that_are_gone_or_broken_leave_their_place(hostile: Path) -> None:
    page = Page(hostile)
    assert "missing image" in page.text and "undecodable image" in page.text and page.of("img")


def test_thumbnails_are_small(experiment: Experiment, mini_data: Path) -> None:
    thumbnails = Thumbnails(experiment.images)
    some = sorted(path.relative_to(mini_data) for path in mini_data.rglob("*.png"))[:3]
    for picture in (thumbnails.of(str(path)) for path in some):
        assert 0 < max(picture.width, picture.height) <= SIDE and len(picture.address) < 20_000
    assert thumbnails.of("../../etc/passwd").flaw == "unreadable image"


def test_times_are_those_of_the_files(experiment: Experiment) -> None:
    found = {timing.stage: timing for timing in timings(make_plan(experiment))}
    queries = sum(row.queries for row in score_rows(make_plan(experiment)))
    assert found["score"].rows == found["retrieve"].rows == queries
    assert found["embed"].files >= found["embed"].artifacts > 0 and found["embed"].bytes > 0
    assert all(timing.seconds >= 0 and timing.hosts and timing.first <= timing.last for timing in found.values())


def test_charts_show_their_numbers() -> None:
    half = curves("a & b", [Line("one", "e0 solid", np.array([0.0, 0.5, 1.0]))], 2)
    points = re.findall(r'points="([^"]*)"', half)[0].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2]) and heights[0] > heights[2]
    assert "a &amp; b" in half and "@1 0.000" in half
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="12"/>', stack([.5, .25, .25, 0], "x"))]
    assert widths == [60, 30, 30, 0]
    assert strip(Value(.5, .4, .6), 1.0, "e0").count("<line") == 2 and "ceiling" in strip(Value(.5, .4, .6), .9, "e0")
    assert areas("x", np.full((1, 4), .25)).count("<polygon") == 4, "a run of depth 1 has an area too"


def test_the_command_prints_the_path(arguments: list[str], report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", *arguments, "--examples", "0"]) == 0
    assert capsys.readouterr().out.startswith(f"{report}  (")
    write_again = ["report", *arguments]
    assert cli.main(write_again) == 0
    capsys.readouterr()


def test_the_command_says_when_it_is_too_early(small_arguments: list[str], tmp_path: Path) -> None:
    assert cli.main(["report", "quickstart", f"work_dir={tmp_path}", *small_arguments]) == 3


@pytest.mark.parametrize("option", [["--top", "11"], ["--megabytes", "none"], ["--megabytes", "0"], ["--examples=-1"]])
def test_impossible_sizes_are_refused(option: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", "quickstart", *option])
    assert stopped.value.code == 2


def looked_at(report: Path) -> dict[str, Any]:
    """What a browser sees; skips where there is none."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    node = shutil.which("node")
    if not chromium or not node:
        pytest.skip(f"{'chromium' if not chromium else 'node'} is not installed")
    if not (MODULES / "axe-core").is_dir() or not (MODULES / "puppeteer-core").is_dir():
        pytest.skip(f"puppeteer-core and axe-core are not in {MODULES}: npm ci with tests/report/browser/package.json")
    done = subprocess.run([node, str(BROWSER / "look.cjs"), chromium, str(report)], capture_output=True, text=True,
                          env={**os.environ, "NODE_PATH": str(MODULES)}, timeout=500)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.timeout(600)
def test_a_browser_shows_it_and_finds_no_fault(report: Path, experiment: Experiment) -> None:
    seen = looked_at(report)
    for look in ("light", "dark"):
        assert seen[look]["axe"]["violations"] == [] and seen[look]["axe"]["passes"] > 15
        assert seen[look]["console"] == [] and set(seen[look]["requests"]) == {report.as_uri()}
        pictures = seen[look]["pictures"]
        assert pictures["broken"] == pictures["unnamed"] == 0 < pictures["count"]
    assert seen["bare"]["scores"] == seen["scores"] and seen["bare"]["controls"] == 0, "the same without scripts"
    assert seen["bare"]["pictures"] == seen["light"]["pictures"] and seen["narrow"] <= 0
    check_scores(seen["scores"], experiment)
    assert all(cell["shown"] == f"{float(cell['value']):.4f}" for cell in seen["scores"])
    check_keyboard(seen["keyboard"], seen["scores"])
    assert set(seen["filtering"]["near"]) == {"near"} and seen["filtering"]["none"] == 0


def check_keyboard(seen: dict[str, Any], scores: list[dict[str, Any]]) -> None:
    assert seen["stops"][0].startswith("a Skip") and any(stop.startswith("summary") for stop in seen["stops"])
    assert any(stop.startswith("select#filter-topic") for stop in seen["stops"]) and seen["folds"]
    values = {cell["task"]: float(cell["value"]) for cell in scores
              if (cell["encoder"], cell["pool"]) == (ENCODERS[0], "local")}
    assert seen["sorted"] == "descending" and sorted(seen["after"]) == sorted(seen["before"])
    sorted_values = [values[task] for task in seen["after"]]
    assert sorted_values == sorted(sorted_values, reverse=True) and seen["before"] == list(values)


@pytest.mark.timeout(600)
def test_a_browser_obeys_no_text(hostile: Path) -> None:
    seen = looked_at(hostile)
    assert seen["title"] == "experiment: report"
    for look in ("light", "dark"):
        assert seen[look]["console"] == [] and seen[look]["axe"]["violations"] == []
        assert seen[look]["pictures"]["broken"] == 0


def test_the_file_goes_to_the_tracker(experiment: Experiment, report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, str, str]] = []
    tracker = Tracker(experiment)
    tracker.report(report)  # without a project nothing is sent
    monkeypatch.setattr(tracker, "_run", SimpleNamespace(
        log_artifact=lambda path, name, type: sent.append((path, name, type))))
    tracker.report(report)
    assert sent == [(str(report), "quickstart-report", "report")]
