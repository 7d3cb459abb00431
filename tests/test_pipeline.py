"""The quick start from end to end, small: all task kinds, both pools, every output; a second run does nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.config import Experiment, load
from pipeline.plan import make_plan
from pipeline.run import run_experiment
from tests.test_resume import contents

ROOT = Path(__file__).resolve().parent.parent


def test_all_eight_kinds_are_scored_on_local_pools_and_on_the_union(quick_run: Experiment) -> None:
    scored = make_plan(quick_run).scored
    assert {int(cell.task.name.rsplit("task", 1)[1]) for cell in scored} == {0, 1, 2, 3, 4, 6, 7, 8}
    assert {cell.pool for cell in scored} == {"local", "union"}
    assert all(cell.job.artifact.is_complete() for cell in scored)


def test_every_output_is_written(quick_run: Experiment) -> None:
    results = quick_run.directory / "retrieval_results"
    assert len(list(results.glob("run_files/*.txt"))) == 24 == len(list(results.glob("retrieved_candidates/*.jsonl")))
    assert list(results.glob("final_tsv/*.tsv")) and (quick_run.directory / "report/tables.md").exists()
    line = (results / "run_files/quickstart_clip.scenes_task0.local.txt").read_text().splitlines()[0].split()
    assert len(line) == 6 and line[1] == "Q0" and line[3] == "1"
    retrieved = results / "retrieved_candidates/quickstart_clip.scenes_task0.local.jsonl"
    record = json.loads(retrieved.read_text().splitlines()[0])
    scores = [candidate["score"] for candidate in record["candidates"]]
    assert record["query"]["query_id"] and scores == sorted(scores, reverse=True)


def test_the_second_run_makes_nothing_and_says_so(quick_run: Experiment, small_arguments: list[str],
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    times = {path: path.stat().st_mtime_ns for path in quick_run.work_dir.rglob("*.parquet")}
    assert main(["run", "quickstart", f"work_dir={quick_run.work_dir}", *small_arguments]) == 0
    assert "nothing to do: everything was there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_run_without_work_needs_no_torch(quick_run: Experiment, small_arguments: list[str]) -> None:
    code = ("import sys; from pipeline.cli import main; code = main(sys.argv[1:]); "
            "assert 'torch' not in sys.modules and 'faiss' not in sys.modules; sys.exit(code)")
    arguments = [f"work_dir={quick_run.work_dir}", *small_arguments]
    done = subprocess.run([sys.executable, "-c", code, "run", "quickstart", *arguments],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(300)
def test_two_processes_make_the_bytes_of_one(quick_run: Experiment, small_arguments: list[str], tmp_path: Path) -> None:
    arguments = [f"work_dir={tmp_path}", *small_arguments, "local.workers=2"]
    done = subprocess.run([sys.executable, "-m", "pipeline", "run", "quickstart", *arguments],
                          cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert contents(load("quickstart", arguments)) == contents(quick_run)
    logs = {path.name for path in (tmp_path / "experiments/quickstart/logs").iterdir()}
    assert logs >= {"embed.000.log", "embed.001.log"}


def test_a_failing_worker_is_reported(small_arguments: list[str], tmp_path: Path) -> None:
    """Each worker prints its own message; the run ends with the user's exit code and keeps what was made."""
    arguments = [f"work_dir={tmp_path}", *small_arguments, "local.workers=2", "encoders=[tests.toy_encoder]",
                 "embed.device=nonsense"]
    done = subprocess.run([sys.executable, "-m", "pipeline", "run", "quickstart", *arguments],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'nonsense' is not a device" in done.stderr and "embed workers failed" in done.stderr


def test_images_in_a_tar_archive_give_the_bytes_of_images_in_files(mini_data: Path, small_arguments: list[str],
                                                                   tmp_path: Path) -> None:
    """Another place, another packing: everything after collect is the same artifacts with the same bytes."""
    packed = tmp_path / "packed"
    shutil.copytree(mini_data, packed, ignore=shutil.ignore_patterns("mbeir_images", "mini_mbeir.json"))
    with tarfile.open(packed / "mbeir_images.tar", "w") as archive:
        archive.add(mini_data / "mbeir_images", "mbeir_images")
    encoder = ["encoders=[tests.toy_encoder]", "embed.loaders=2"]
    files = load("quickstart", [f"work_dir={tmp_path}/files", *small_arguments, *encoder])
    tarred = load("quickstart", [f"work_dir={tmp_path}/tarred", *small_arguments, *encoder, f"benchmark.root={packed}",
                                 "benchmark.archives=[mbeir_images.tar]", "benchmark.adapter=mbeir"])
    for experiment in (files, tarred):
        run_experiment(experiment, [], say=lambda *_: None)
    expected, found = ({name: value for name, value in contents(experiment).items() if not name.startswith("collect/")}
                       for experiment in (files, tarred))
    assert found == expected and len(found) > 100


def test_other_splits_run(small_arguments: list[str], tmp_path: Path) -> None:
    """val shares the local pools but for those that are per split; train's pools are cut from its union."""
    for split in ("val", "train"):
        overrides = ["encoders=[tests.toy_encoder]", f"name={split}", f"benchmark.split={split}"]
        experiment = load("quickstart", [f"work_dir={tmp_path}", *small_arguments, *overrides])
        run_experiment(experiment, [], say=lambda *_: None)
        scored = make_plan(experiment).scored
        assert len(scored) == 24 and all(cell.job.artifact.is_complete() for cell in scored)
    table = (tmp_path / "experiments/train/report/tables.md").read_text()
    assert "split train" in table
