"""Training beside the pure forward and backward of the same model on ready tensors: queries per second.

Both learn from the same steps with the same learner; the baseline's steps lie prepared in memory, ours come from the
files through the loader processes. A turn of ours starts its loaders anew; the first steps of a turn are not timed.
There is nothing to compare in results: every step changes the weights that the next one begins with.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, List, Optional

from pipeline.config import Experiment, load, part
from pipeline.train import fed_learner
from pipeline.training.draws import Course
from pipeline.training.feeding import PreparedStep
from pipeline.training.processes import Processes
from pipeline.training.settings import Params, Runtime
from pipeline.training_set import make_examples
from tests.speed.comparison import Row, at_least_one


@dataclass(frozen=True)
class Options:
    training: str = "tiny_clip_sf"  # a name in configs/training, or a path to a .yaml file
    overrides: List[str] = field(default_factory=list)  # its own options, such as [training.device=cuda]
    warm_up: int = 2  # steps of a turn that are not timed
    steps: int = 8  # steps of a turn that are
    repetitions: int = 5
    directory: Optional[str] = None

    def __post_init__(self) -> None:
        at_least_one(self, "warm_up", "steps", "repetitions")


def rows(options: Options) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        training = load(options.training, [f"work_dir={Path(folder)}", *options.overrides], kind="training")
        yield _row(training, options)


def _row(training: Experiment, options: Options) -> Row:
    params, runtime = part(training.settings.training, Params), part(training.settings.training, Runtime)
    course = Course(make_examples(training, params), params)
    feeder, learner = fed_learner(training, params, runtime, course, Processes())
    ready = list(islice(feeder.steps(0), options.warm_up + options.steps))
    ours, baseline = [], []
    for _ in range(options.repetitions):
        ours.append(_seconds(feeder.steps(0), learner, options))
        baseline.append(_seconds(iter(ready), learner, options))
    work = f"{training.name}, {params.batch_size} queries a step, {params.precision}, {learner.device}"
    facts: dict[str, Any] = {}
    if learner.device.type == "cuda":
        import torch
        facts["device_peak_gb"] = round(torch.cuda.max_memory_allocated(learner.device) / 2**30, 2)
    return Row.of("train", work, params.batch_size * options.steps, "queries/s", ours, baseline,
                  "forward and backward on ready tensors", None, **facts)


def _seconds(arriving: Iterator[PreparedStep], learner: Any, options: Options) -> float:
    started = 0.0
    for number, prepared in enumerate(islice(arriving, options.warm_up + options.steps)):
        if number == options.warm_up:
            started = _now(learner)
        learner.step(prepared, prepared.layout.draw)
    assert started, "fewer steps than asked for"
    return _now(learner) - started


def _now(learner: Any) -> float:
    if learner.device.type == "cuda":
        import torch
        torch.cuda.synchronize(learner.device)
    return time.perf_counter()
