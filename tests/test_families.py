"""Every family of encoders, in small: examined by `doctor`, run from end to end, compared, and on the page of all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline import examination
from pipeline.cli import main
from pipeline.config import load
from pipeline.encoders import REQUIRES
from pipeline.pieces import available, load_encoder_choice
from pipeline.plan import make_plan
from pipeline.run import run_experiment
from pipeline.support.plugins import plugin_names
from tests.encoders.tiny_families import ELSEWHERE, FAMILIES, choice, configuration

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "encoders"
MODULES = plugin_names("pipeline.encoders", REQUIRES)
# The others run from end to end in tests/encoders, or as the quick start.
RUN_HERE = ["open_clip", "uniir_clip_ff", "visualized_bge_m3", "dual_encoder_siglip", "sentence_transformers_clip",
            "sentence_transformers_llava", "mteb_random", "random_vectors"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_every_family_has_an_instance_or_a_reason() -> None:
    assert sorted({family.module for family in FAMILIES.values()} | set(ELSEWHERE)) == MODULES
    assert not {family.module for family in FAMILIES.values()} & set(ELSEWHERE)


@pytest.mark.parametrize("name", FAMILIES)
def test_doctor_finds_no_fault(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "_SECONDS", 0.0)  # its speeds are not looked at
    chosen = choice(name, tmp_path)
    found = {each.name: each for each in examination.examine(chosen.module, chosen.params, "cpu", "fp32")}
    assert [each for each in found.values() if each.state == "FAIL"] == []
    assert {"shape", "batch mates and order", "unusual texts", "unusual images", "speed of image,text"} <= set(found)


@pytest.mark.parametrize("name", RUN_HERE)
def test_mini_mbeir_runs_from_end_to_end(name: str, small_arguments: list[str], tmp_path: Path) -> None:
    """Text to image and image with text to image, with instructions."""
    path = configuration(name, tmp_path)
    experiment = load("quickstart", [f"work_dir={tmp_path / 'work'}", *small_arguments, f"encoders=[{path}]",
                                     "pools=[local]", "tasks=[scenes_task0,edits_task7]"])
    results = run_experiment(experiment, [], say=lambda *_: None)
    scored = make_plan(experiment).scored
    assert len(scored) == len(results["scores"]) == 2
    assert all(cell.job.artifact.is_complete() for cell in scored)
    for each in results["scores"]:
        assert each["queries"] > each["queries_without_hits"] == 0, each
        assert 0 < each["metrics"]["mrr"]["mean"] <= 1, each  # pools so small that every candidate is found


def test_the_benchmark_compares_batches_with_single_items(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "encoders", "--json", "families=[uniir_blip_ff,lavis]", "batch=5", "seconds=0"]) == 0
    *measured, skipped = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [row["work"] for row in measured] == [f"uniir_blip_ff: {kind}, batches of 5"
                                                 for kind in ("text", "image", "image,text")]
    assert all(row["equal"] is True and row["dimension"] == 32 and row["ours"] > 0 for row in measured)
    assert "attends" in measured[2]["joined"] and "joined" not in measured[0]
    assert skipped["work"] == "lavis" and "environment" in skipped["skipped"]


@pytest.mark.parametrize("mistake, message", (("families=[lavi]", "nearest: lavis"), ("batch=0", "at least 1"),
                                              ("seconds=-1", "must not be negative")))
def test_the_benchmark_names_mistakes(mistake: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "encoders", mistake]) == 2
    assert message in capsys.readouterr().err


# the page that compares all families

def table(first: str) -> list[list[str]]:
    """The rows of the page's table whose first column has this title."""
    lines = (PAGES / "README.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def named(cells: Any) -> set[str]:
    return {name for cell in cells for name in re.findall(r"`([a-z0-9_]+)`", cell)}


def test_the_page_has_every_module_and_every_configuration() -> None:
    rows = table("family")
    assert sorted(named(row[1] for row in rows)) == MODULES
    assert sorted(named(row[2] for row in rows)) == available("encoders")
    for row in rows:
        modules = {load_encoder_choice(name).module for name in named([row[2]])}
        assert modules <= named([row[1]]), row


def test_the_pages_links_lead_somewhere_and_every_page_is_linked() -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (PAGES / "README.md").read_text())
    assert {link for link in links if "/" not in link} == {path.name for path in PAGES.glob("*.md")} - {"README.md"}
    assert [link for link in links if not (PAGES / link).exists()] == []


def test_the_page_has_the_speed_of_every_instance() -> None:
    assert [row[0].strip("`") for row in table("instance")] == list(FAMILIES)
