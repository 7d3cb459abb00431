"""plan, status, config and list in words: right numbers, reasons, origins, and quick."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Experiment, load
from pipeline.plan import Plan, make_plan
from pipeline.report import forecast, text
from pipeline.report.text import config_text, listing, plan_json, plan_text, size_text, status_text
from pipeline.stages import STAGES
from pipeline.status import StageStatus
from pipeline.support.errors import UserError


@pytest.fixture
def finished(quick_run: Experiment, small_arguments: list[str]) -> Any:
    """Plans over the artifacts of the finished quick start, with more overrides."""
    given = [f"work_dir={quick_run.work_dir}", *small_arguments]
    return lambda *more: make_plan(load("quickstart", [*given, *more]))


@pytest.fixture
def collected(quick_run: Experiment, small_arguments: list[str], tmp_path: Path) -> list[str]:
    """A work_dir in which only `collect` has run."""
    shutil.copytree(quick_run.work_dir / "artifacts" / "collect", tmp_path / "artifacts" / "collect")
    return [f"work_dir={tmp_path}", *small_arguments]


def stages(plan: Plan) -> dict[str, dict[str, Any]]:
    found = json.loads(json.dumps(plan_json(plan)))
    assert [stage["stage"] for stage in found["stages"]] == list(STAGES)
    return {stage["stage"]: stage for stage in found["stages"]}


def true_rows(plan: Plan, kind: str) -> int:
    """Rows of the collected tables of tasks or of pools, from their manifests."""
    jobs = [job for job in plan.jobs["collect"] if type(job).__name__ == kind]
    assert jobs
    return sum(int(job.artifact.manifest()["rows"]) for job in jobs)


def test_a_finished_plan_has_nothing_to_do(finished: Any) -> None:
    plan = finished()
    assert all(stage["to_do"] == 0 and stage["rows"] == 0 for stage in stages(plan).values())
    assert plan_text(plan).count("nothing to do") == 5
    assert plan_json(plan)["fits"] is True and plan_json(plan)["needed_bytes"] == 0


def test_before_collect_rows_are_estimated(finished: Any, small_arguments: list[str], tmp_path: Path) -> None:
    """The estimate comes from file sizes; the truth from an experiment over the same data that has run."""
    plan = make_plan(load("quickstart", [f"work_dir={tmp_path}", *small_arguments]))
    found, done = stages(plan), finished()
    queries, candidates = true_rows(done, "TaskJob"), true_rows(done, "PoolJob")
    assert not found["embed"]["rows_are_exact"]
    assert math.isclose(found["collect"]["rows"], queries + candidates, rel_tol=0.02)
    assert math.isclose(found["embed"]["rows"], queries + candidates, rel_tol=0.02)
    assert math.isclose(found["index"]["rows"], candidates, rel_tol=0.02)
    assert math.isclose(found["retrieve"]["rows"], 2 * queries, rel_tol=0.02)
    assert found["embed"]["bytes"] is None and found["embed"]["waits_for"] == {"the tables": 24}
    assert "~" in plan_text(plan) and "enough for what is known" in plan_text(plan)


def test_before_the_data_are_there_nothing_is_guessed(tmp_path: Path) -> None:
    plan = make_plan(load("quickstart", [f"work_dir={tmp_path}"]))
    found = stages(plan)
    assert found["collect"]["rows"] is None and found["collect"]["waits_for"]["the benchmark's files"] == 24
    assert "waits for the benchmark's files  [24 jobs]" in plan_text(plan)


def test_after_collect_rows_are_exact(finished: Any, collected: list[str]) -> None:
    plan, done = make_plan(load("quickstart", collected)), finished()
    found = stages(plan)["embed"]
    assert found["rows"] == true_rows(done, "TaskJob") + true_rows(done, "PoolJob")
    assert found["rows_are_exact"]
    assert found["bytes"] is None, "no shard tells the dimension yet"
    assert found["reasons"] == {"new": 24}


def test_bytes_are_those_that_will_be_written(finished: Any) -> None:
    """The same vectors in another storage: the dimension is known from the shards that are there."""
    plan = finished("embed.storage=float32")
    rows = true_rows(plan, "TaskJob") + true_rows(plan, "PoolJob")
    dimension = finished().jobs["embed"][0].artifact.manifest()["dimension"]
    assert stages(plan)["embed"]["bytes"] == rows * dimension * 4
    faiss = stages(finished("index.write_faiss=true"))["index"]["bytes"]
    assert faiss == true_rows(plan, "PoolJob") * dimension * 4


def test_runs_take_no_more_than_forecast(finished: Any) -> None:
    plan = finished("retrieve.depth=101")
    files = [file for scored in finished().scored for file in scored.job.run.directory.glob("run-*.parquet")]
    footers = 4096 * len(files)  # what a file takes besides its rows says something only of tiny ones
    assert stages(plan)["retrieve"]["bytes"] >= sum(file.stat().st_size for file in files) - footers > 0


def test_missing_shards_are_counted(collected: list[str], quick_run: Experiment, tmp_path: Path) -> None:
    shutil.copytree(quick_run.work_dir / "artifacts" / "embed", tmp_path / "artifacts" / "embed")
    job = next(job for job in make_plan(load("quickstart", collected)).jobs["embed"] if len(job.shards) > 1)
    job.artifact.path("manifest.json").unlink()
    job.artifact.path("embeddings-00001.parquet").unlink()
    found = stages(make_plan(load("quickstart", collected)))["embed"]
    assert (found["to_do"], found["rows"]) == (1, job.shards[1]["rows"])
    assert found["reasons"] == {f"1 missing, {len(job.shards)} there": 1}


def test_reasons_are_grouped_and_name_the_change(finished: Any) -> None:
    found = stages(finished("embed.precision=bf16"))
    assert found["embed"]["reasons"] == {"precision: fp32 -> bf16 (command line)": 24}
    assert found["index"]["reasons"] == {"input changed: embeddings": 12}
    assert set(found["retrieve"]["reasons"]) <= {
        "input changed: pool; input changed: queries", "input changed: pool"}


def test_a_disk_that_is_too_small_is_said_aloud(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = finished("embed.storage=float32")
    monkeypatch.setattr(text, "free_bytes", lambda _: 10)
    assert plan_json(plan)["fits"] is False and "NOT ENOUGH" in plan_text(plan)


def test_free_space_of_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    assert forecast.free_bytes(tmp_path / "a" / "b") > 0


@given(st.integers(0, 10**15))
def test_sizes_read_back(count: int) -> None:
    number, unit = size_text(count).split()
    value = float(number) * 1000 ** ["B", "kB", "MB", "GB", "TB"].index(unit)
    assert math.isclose(value, count, rel_tol=0.051) and len(number) <= 4


def test_status_in_words() -> None:
    found = [StageStatus("collect", 17, 17, 0, "done", None, None, None),
             StageStatus("embed", 371, 592, 0, "running", 0.25, 960.0, 4.2),
             StageStatus("index", 0, 16, 3, "waits for embed", None, None, None)]
    shown = status_text(found, ["an image is missing"], ["a/b: has 3 bytes"])
    lines = shown.splitlines()
    assert lines[1].split() == ["collect", "17/17", "done"]
    assert lines[2].split("  ")[-1] == "running, last unit 4 s ago"
    assert "371/592" in lines[2] and "15.0 units/min" in lines[2] and "16 min" in lines[2]
    assert "0/16+?" in lines[3] and lines[3].endswith("waits for embed")
    assert "warning    an image is missing" in lines and "damaged    a/b: has 3 bytes" in lines


def test_config_is_yaml_with_origins(tmp_path: Path) -> None:
    experiment = load("quickstart", [f"work_dir={tmp_path}", "retrieve.depth=30"])
    shown = config_text(experiment)
    assert yaml.safe_load(shown) == experiment.resolved
    lines = [line.split("#") for line in shown.splitlines() if "#" in line]
    origins = {before.strip(): after.strip() for before, after in lines}
    assert origins["depth: 30"] == "command line" and origins["pool: null"] == "default"
    assert "configs/base.yaml:" in origins["storage: float16"]
    assert "encoder: uniir_clip" in origins.values()


def test_listing_of_everything() -> None:
    shown = listing()
    for name in ("quickstart", "mini_mbeir", "clip_sf_large", "ndcg"):
        assert f"  {name} " in shown
    assert all(f"{kind}\n  " in shown for kind in ("experiments", "benchmarks", "encoders", "metrics"))


def test_listing_of_one_kind() -> None:
    lines = {line.split()[0]: line for line in listing("benchmarks").splitlines()}
    assert "16 tasks" in lines["mbeir"] and "12 tasks" in lines["mini_mbeir"]
    assert "open_clip " in listing("encoders") and "16 tasks" not in listing("metrics")
    assert "1 if any of the first k candidates is relevant" in listing("metrics")
    with pytest.raises(UserError):
        listing("colours")


def test_planning_and_status_load_nothing_heavy() -> None:
    script = ("import sys; from pipeline import status; from pipeline.plan import make_plan\n"
              "from pipeline.config import load\n"
              "from pipeline.report import text, export, tables, foreign, tracking\n"
              "plan = make_plan(load('quickstart', ['work_dir=/nonexistent']))\n"
              "text.plan_text(plan); text.status_text(status.status_of(plan), [], []); text.listing()\n"
              "heavy = {'torch', 'faiss', 'rich', 'wandb', 'PIL', 'transformers', 'open_clip', 'sklearn'}\n"
              "assert not heavy & set(sys.modules), heavy & set(sys.modules)")
    subprocess.run([sys.executable, "-c", script], check=True)
