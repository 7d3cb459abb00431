"""Killed anywhere, continued with another number of workers: the bytes are those of an uninterrupted run."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from pipeline.config import Experiment, load
from pipeline.plan import MODULES, make_plan
from pipeline.stages import STAGES
from tests.forks import Forks, alive, fork_server, kill

SEED = 7
KILLS = {"collect": 25, "embed": 30, "index": 8, "retrieve": 25, "score": 25}


def contents(experiment: Experiment) -> dict[str, bytes]:
    """Every artifact file by relative path; without temporaries, and without made.json, which tells time and host."""
    root = experiment.work_dir / "artifacts"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and not path.name.startswith(".") and path.name != "made.json"}


def num_files(experiment: Experiment, stage: str) -> int:
    return sum(len(files) for _, _, files in os.walk(experiment.work_dir / "artifacts" / stage))


def work_and_be_killed(forks: Forks, experiment: Experiment, arguments: list[str], stage: str,
                       chance: random.Random) -> bool:
    """Start one to three workers, kill all soon after some files (temporaries count) appeared; were they alive?"""
    count, target = chance.randint(1, 3), num_files(experiment, stage) + chance.randint(1, 3)
    command = [stage, "quickstart", *arguments]
    groups = [forks.start([*command, "--worker", f"{number}/{count}"]) for number in range(count)]
    while num_files(experiment, stage) < target and any(alive(group) for group in groups):
        time.sleep(0.002)
    time.sleep(chance.random() * 0.03)
    interrupted = any(alive(group) for group in groups)
    for group in groups:
        kill(group)
    return interrupted


@pytest.mark.timeout(900)
def test_killed_at_random_moments_in_every_stage(quick_run: Experiment, small_arguments: list[str], tmp_path: Path,
                                                 record_property: object, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"work_dir={tmp_path}", *small_arguments]
    experiment, chance, kills = load("quickstart", arguments), random.Random(SEED), Counter[str]()
    with fork_server() as forks:
        for stage in STAGES:
            while kills[stage] < KILLS[stage] and not _is_done(experiment, stage):
                kills[stage] += work_and_be_killed(forks, experiment, arguments, stage, chance)
            forks.finish([stage, "quickstart", *arguments])
            assert _is_done(experiment, stage), f"{stage} did not finish after {kills[stage]} kills"
    assert all(kills[stage] for stage in STAGES), kills
    expected, found = contents(quick_run), contents(experiment)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    with capsys.disabled():
        print(f"\n{sum(kills.values())} kills: {dict(kills)}; {len(found)} files equal byte for byte", end="")


def _is_done(experiment: Experiment, stage: str) -> bool:
    return make_plan(experiment).is_done(stage)


def test_one_deleted_shard_is_made_again_and_nothing_else(
        quick_run: Experiment, small_arguments: list[str], tmp_path: Path) -> None:
    """On a copy of a finished run: the shard comes back with its old bytes, no other file is written."""
    subprocess.run(["cp", "-r", f"{quick_run.work_dir}/.", str(tmp_path)], check=True)
    experiment = load("quickstart", [f"work_dir={tmp_path}", *small_arguments])
    before = contents(experiment)
    plan = make_plan(experiment)
    job = max(plan.jobs["embed"], key=lambda job: len(MODULES["embed"].units(job)))
    shard = job.artifact.path(MODULES["embed"].units(job)[1])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet") if path != shard}
    shard.unlink()
    job.artifact.path("manifest.json").unlink()
    from pipeline.workers import run_stage
    outcomes = [run_stage(experiment, stage) for stage in STAGES]
    assert [outcome.made for outcome in outcomes] == [0, 1, 0, 0, 0]
    assert contents(experiment) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
