"""Validation during a training: a checkpoint goes through all stages on the val split, as it will when it is measured.

Processes that train together share the embedding; the first one does the rest while the others wait. Only tables and
scores stay: vectors and runs of a checkpoint are deleted when its scores are read.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pipeline.config import Experiment, for_split
from pipeline.encoders import load_encoder
from pipeline.pieces import EncoderChoice
from pipeline.plan import Plan, make_plan
from pipeline.report.rows import average, score_rows
from pipeline.stages import STAGES
from pipeline.support.errors import UserError, nearest
from pipeline.training.processes import Processes
from pipeline.training.saving import Checkpoint
from pipeline.training.settings import Runtime
from pipeline.workers import Share, run_stage

log = logging.getLogger("pipeline")


class Validator:
    """Scores of checkpoints of `choice`: headline metrics by task on one kind of pool, and their average.

    UserError if a validation task is not a task of the training.
    """

    def __init__(self, experiment: Experiment, choice: EncoderChoice, runtime: Runtime, processes: Processes):
        self.choice, self.runtime, self.processes = choice, runtime, processes
        base = for_split(experiment, "val")
        known = [task.name for task in base.tasks]
        for name in runtime.validation_tasks:
            if name not in known:
                raise UserError(f"training.validation_tasks: '{name}' is not a task of this training",
                                do=nearest(name, known) or f"all: {', '.join(known)}")
        chosen = runtime.validation_tasks or known
        self.base = replace(base, settings=replace(base.settings, pools=[runtime.validation_pool]),
                            tasks=tuple(task for task in base.tasks if task.name in chosen))

    def prepare(self) -> None:
        """Collect the val split: what is wrong with it is better known before the first step than after thousands."""
        if self.runtime.validate_every and self.processes.is_first:
            run_stage(self.base, "collect")

    def __call__(self, checkpoint: Checkpoint) -> Mapping[str, float]:
        """Called by all processes; the scores are given to the first one, to the others nothing."""
        module: Any = load_encoder(self.choice.module)
        name = f"{self.base.name}-{checkpoint.directory.name}"
        encoder = replace(self.choice, name=name,
                          params=module.with_weights(self.choice.params, str(checkpoint.weights)))
        trial, processes = replace(self.base, encoders=(encoder,)), self.processes
        log.info("validate  %s: %d tasks, pools: %s", checkpoint.directory.name, len(trial.tasks),
                 self.runtime.validation_pool)
        with _quiet_screen():
            self._by_the_first(trial, "collect")
            run_stage(trial, "embed", Share(processes.rank, processes.world))
            self._by_the_first(trial, "index", "retrieve", "score")
        return _scores_and_forget(make_plan(trial)) if processes.is_first else {}

    def _by_the_first(self, trial: Experiment, *stages: str) -> None:
        for stage in stages if self.processes.is_first else ():
            run_stage(trial, stage)
        self.processes.wait()


def _scores_and_forget(plan: Plan) -> dict[str, float]:
    rows = score_rows(plan)
    for stage in STAGES[1:]:
        for job in plan.jobs[stage]:
            shutil.rmtree(job.artifact.directory)
    return {**{row.task: row.value.mean for row in rows}, "average": average(rows)}


@contextmanager
def _quiet_screen() -> Iterator[None]:
    """The lines of the stages go to the log file only."""
    screens = [handler for handler in log.handlers if not isinstance(handler, logging.FileHandler)]
    before = [handler.level for handler in screens]
    for handler in screens:
        handler.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for handler, level in zip(screens, before):
            handler.setLevel(level)
