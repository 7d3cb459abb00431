"""Garbage collection removes what no named experiment uses, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.config import Experiment, load
from pipeline.garbage import collect_garbage
from pipeline.plan import make_plan
from pipeline.run import run_experiment
from pipeline.stages import STAGES
from pipeline.support.errors import UserError

Arguments = list[str]


@pytest.fixture
def arguments(quick_run: Experiment, tmp_path: Path, small_arguments: Arguments) -> Arguments:
    """Overrides for a finished experiment in a work_dir of its own."""
    shutil.copytree(quick_run.work_dir / "artifacts", tmp_path / "artifacts")
    return [f"work_dir={tmp_path}", *small_arguments]


def listed(root: Path) -> set[Path]:
    return set(root.rglob("*"))


def test_nothing_is_garbage_of_a_finished_experiment(arguments: Arguments, tmp_path: Path) -> None:
    before = listed(tmp_path)
    assert collect_garbage([load("quickstart", arguments)], delete=True) == ["0 B freed"]
    assert listed(tmp_path) == before


def test_only_what_no_plan_names_is_deleted(arguments: Arguments, tmp_path: Path) -> None:
    """Fewer tasks: what only the other tasks needed goes; pools stay, because the union is whole."""
    fewer = load("quickstart", [*arguments, "tasks=[quiz_task6]"])
    kept = {artifact.directory for artifact in make_plan(fewer).artifacts()}
    everything = {path for path in (tmp_path / "artifacts").glob("*/*")}
    lines = collect_garbage([fewer], delete=False)
    assert {Path(line.split()[-1]) for line in lines[:-1]} == everything - kept
    assert {path for path in (tmp_path / "artifacts").glob("*/*")} == everything
    assert "--delete" in lines[-1]
    collect_garbage([fewer], delete=True)
    assert {path for path in (tmp_path / "artifacts").glob("*/*")} == kept
    assert collect_garbage([fewer], delete=True) == ["0 B freed"]
    assert all(make_plan(fewer).is_done(stage) for stage in STAGES)


def test_every_named_experiment_keeps_its_own(arguments: Arguments) -> None:
    chosen = [load("quickstart", [*arguments, f"tasks=[{task}]"]) for task in ("quiz_task6", "digits_task3")]
    both = {line for line in collect_garbage(chosen, delete=False)[:-1]}
    assert both == set.intersection(*(set(collect_garbage([one], delete=False)[:-1]) for one in chosen))


def test_the_size_is_what_is_freed(arguments: Arguments, tmp_path: Path) -> None:
    stale = tmp_path / "artifacts" / "embed" / "old.task-0123456789ab"
    stale.mkdir()
    (stale / "embeddings-00000.parquet").write_bytes(b"x" * 2_500_000)
    (stale / "manifest.json").write_bytes(b"{}")
    lines = collect_garbage([load("quickstart", arguments)], delete=True)
    assert lines[0].split() == ["deleted", "2.5", "MB", str(stale)] and lines[-1] == "2.5 MB freed"
    assert not stale.exists()


def test_what_does_not_look_like_ours_is_left_alone(arguments: Arguments, tmp_path: Path) -> None:
    root = tmp_path / "artifacts" / "embed"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.parquet").write_bytes(b"x")
    (root / "link-0123456789ab").symlink_to(outside, target_is_directory=True)
    for name, file in (("notes", "a.txt"), ("odd-0123456789ab", "a.tex"), ("odd-0123456789abc", "a.json")):
        (root / name).mkdir()
        (root / name / file).write_bytes(b"x")
    holder = root / "holder-0123456789ab"
    holder.mkdir()
    (holder / "data-00000.parquet").symlink_to(outside / "precious.parquet")
    (tmp_path / "artifacts" / "other").mkdir()
    before = listed(tmp_path)
    lines = collect_garbage([load("quickstart", arguments)], delete=True)
    assert listed(tmp_path) == before
    assert lines[-1] == "0 B freed" and sum("left alone" in line for line in lines) == 2


def test_a_stage_directory_that_is_a_link_is_not_entered(arguments: Arguments, tmp_path: Path) -> None:
    stale = tmp_path / "elsewhere" / "old-0123456789ab"
    stale.mkdir(parents=True)
    shutil.rmtree(tmp_path / "artifacts" / "index")
    (tmp_path / "artifacts" / "index").symlink_to(stale.parent, target_is_directory=True)
    collect_garbage([load("quickstart", arguments)], delete=True)
    assert stale.exists()


def test_an_unfinished_plan_is_refused(small_arguments: Arguments, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not known yet"):
        collect_garbage([load("quickstart", [f"work_dir={tmp_path}", *small_arguments])], delete=True)


def test_one_work_dir_only(arguments: Arguments, quick_run: Experiment) -> None:
    with pytest.raises(UserError, match="share one work_dir"):
        collect_garbage([load("quickstart", arguments), quick_run], delete=True)
    with pytest.raises(UserError):
        collect_garbage([], delete=True)


def test_what_was_deleted_can_be_made_again(arguments: Arguments) -> None:
    fewer, all_tasks = load("quickstart", [*arguments, "tasks=[quiz_task6]"]), load("quickstart", arguments)
    before = {scored.job.artifact.label for scored in make_plan(all_tasks).scored}
    collect_garbage([fewer], delete=True)
    two = load("quickstart", [*arguments, "tasks=[quiz_task6,digits_task3]"])
    run_experiment(two, [], say=lambda *_: None)
    assert {scored.job.artifact.label for scored in make_plan(two).scored} <= before
