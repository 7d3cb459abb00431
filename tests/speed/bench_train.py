"""Queries per second of `train` beside the pure forward and backward of the same model on ready tensors, in one run.

    python -m tests.speed.bench_train                                    the quick start's encoder on mini M-BEIR
    python -m tests.speed.bench_train my_training.yaml training.device=cuda training.batch_size=512

Both learn from the same steps with the same learner; the baseline's steps lie prepared in memory, ours come from the
files through the loader processes. They take turns; a turn of ours starts its loaders anew and is timed after the
first steps. One JSON line. Beside the ratio: the peak of memory on a CUDA device, if there is one.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from itertools import islice
from statistics import median
from typing import Any

from pipeline.config import Experiment, load, part
from pipeline.train import fed_learner
from pipeline.training.draws import Course
from pipeline.training.feeding import Feeder, PreparedStep
from pipeline.training.processes import Processes
from pipeline.training.settings import Params, Runtime
from pipeline.training_set import make_examples

WARM_UP, TIMED, TURNS = 2, 8, 3


def learn(feeder: Feeder, learner: Any, steps: list[PreparedStep] | None) -> float:
    """Seconds per step."""
    arriving = feeder.steps(0) if steps is None else iter(steps * (WARM_UP + TIMED))
    for number, prepared in enumerate(islice(arriving, WARM_UP + TIMED)):
        if number == WARM_UP:
            started = _now(learner)
        learner.step(prepared, prepared.layout.draw)
    return (_now(learner) - started) / TIMED


def _now(learner: Any) -> float:
    if learner.device.type == "cuda":
        import torch
        torch.cuda.synchronize(learner.device)
    return time.perf_counter()


def compare(training: Experiment) -> dict[str, Any]:
    params, runtime = part(training.settings.training, Params), part(training.settings.training, Runtime)
    examples = make_examples(training, params)
    course = Course(examples, params)
    feeder, learner = fed_learner(training, params, runtime, course, Processes())
    ready = list(islice(feeder.steps(0), WARM_UP + TIMED))
    seconds = [(learn(feeder, learner, None), learn(feeder, learner, ready)) for _ in range(TURNS)]
    ours, baseline = (params.batch_size / median(turn[flow] for turn in seconds) for flow in (0, 1))
    found = {"name": "train", "work": f"{training.name}, {params.batch_size} queries a step, {params.precision}",
             "ours": round(ours, 1), "baseline": round(baseline, 1), "unit": "queries/s",
             "ratio": round(ours / baseline, 3), "baseline_name": "forward and backward on ready tensors",
             "turns": seconds}
    if learner.device.type == "cuda":
        import torch
        found["peak_gb"] = round(torch.cuda.max_memory_allocated(learner.device) / 2**30, 2)
    return found


def main() -> None:
    name, *overrides = sys.argv[1:] or ["tiny_clip_sf"]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(load(name, [f"work_dir={folder}", *overrides], kind="training"))))


if __name__ == "__main__":
    main()
