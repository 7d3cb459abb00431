"""What many tests share: mini M-BEIR at a twentieth of its size, and one finished small experiment."""

from __future__ import annotations

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of ours or theirs is imported
os.environ.setdefault("WANDB_MODE", "offline")

from pathlib import Path

import pytest
from hypothesis import settings

from pipeline.benchmarks import mini_mbeir
from pipeline.config import Experiment, load
from pipeline.run import run_experiment

settings.register_profile("plumbline", deadline=None)  # never a timed test: these machines are shared
settings.load_profile("plumbline")

SMALL = ["benchmark.options.scale=0.05", "collect.rows_per_shard=25", "embed.loaders=0", "score.resamples=50",
         "retrieve.queries_per_pass=40"]


@pytest.fixture(scope="session")
def mini_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mini M-BEIR at scale 0.05; read only."""
    directory = tmp_path_factory.mktemp("data") / "mini_mbeir"
    mini_mbeir.generate(directory, 0.05)
    return directory


@pytest.fixture(scope="session")
def small_arguments(mini_data: Path) -> list[str]:
    """Overrides that make of any mini M-BEIR experiment a small one, over data that are there already."""
    return [f"benchmark.root={mini_data}", *SMALL]


@pytest.fixture(scope="session")
def quick_copy(quick_run: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the work directory of `quick_run`, for tests that add encoders or experiments to it."""
    return Path(shutil.copytree(quick_run.work_dir, tmp_path_factory.mktemp("quick") / "copy"))


@pytest.fixture(scope="session")
def quick_run(small_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The quick start, small, run to its end; read only."""
    experiment = load("quickstart", [f"work_dir={tmp_path_factory.mktemp('quick')}", *small_arguments])
    run_experiment(experiment, [], say=lambda *_: None)
    return experiment
