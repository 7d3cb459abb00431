"""The loop: resume where the last checkpoint stands, learn, tell, save, validate.

Promise: killed at any moment and started again, the losses, the weights and the validations are those of a training
that was never interrupted (on the same device, with as many processes and threads). For that a step is known by its
number, checkpoints hold optimiser, schedule, scaler and the random states of all processes, and whatever validates
leaves the random states as they were.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts import atomic_path
from pipeline.support.errors import UserError
from pipeline.training import curve
from pipeline.training.draws import Course
from pipeline.training.feeding import Feeder
from pipeline.training.learning import Learner, random_state, set_random_state
from pipeline.training.processes import Processes
from pipeline.training.saving import Checkpoint, Checkpoints, Configuration, write_encoder
from pipeline.training.settings import Runtime
from pipeline.training.stopping import asked_to_stop

log = logging.getLogger("pipeline")
_DIVERGED = "lower training.learning_rate, or choose training.precision=bf16 instead of fp16; the checkpoints are sound"
LOG, CURVE = "log.jsonl", "curve.png"

Validate = Callable[[Checkpoint], Mapping[str, float]]
Record = Callable[[Mapping[str, float], int], None]


@dataclass
class Trainer:
    """One training in `directory`. `asked` is all that decides its result; `encoder` gives a checkpoint's
    configuration.

    `validate` gives the scores of a checkpoint by task and their average; all processes call it, and the first one is
    given them. `record` sends numbers elsewhere (the first process calls it).
    """

    directory: Path
    name: str
    course: Course
    feeder: Feeder
    learner: Learner
    runtime: Runtime
    processes: Processes
    asked: Mapping[str, Any]
    encoder: Configuration
    validate: Validate
    record: Record
    step: int = 0
    _window: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.directory / "checkpoints", self.name)
        self.log = self.directory / LOG

    def resume(self, accept_changes: bool) -> int:
        """Go to the last checkpoint; returns its step (0: none). UserError if another training is asked for now."""
        last = self.checkpoints.last()
        if last:
            changes = _changes(last.facts()["asked"], self.asked)
            if changes and not accept_changes:
                raise UserError("this training was begun with other options", str(self.directory), "\n".join([
                    *changes, "go on with the old ones, or name a new training (name=...),",
                    "or take the changes upon you: --accept-changes"]))
            self._load(last, bool(changes))
        self._check_step()
        if self.processes.is_first:
            self.directory.mkdir(parents=True, exist_ok=True)
            curve.rewind(self.log, self.step)
            if last:
                self._settle()  # a kill may have come between a checkpoint and what follows from it
        return self.step

    def _check_step(self) -> None:
        if len(set(self.processes.all_of(self.step))) > 1:
            raise UserError("the processes see different checkpoints", str(self.directory),
                            "work_dir must be one directory that all machines see")
        if self.step > self.course.num_steps:
            raise UserError(f"step {self.step} is behind the last one, {self.course.num_steps}", str(self.directory),
                            "raise training.epochs, or name a new training: name=...")

    def _load(self, checkpoint: Checkpoint, has_changed: bool) -> None:
        state, processes = checkpoint.state(), self.processes
        self.learner.model.load_state_dict(checkpoint.tensors())
        self.learner.load_state(state, checkpoint.step if has_changed else None)
        if len(state["random"]) == processes.world:
            set_random_state(state["random"][processes.rank], self.learner.device)
        else:
            log.warning("this training ran with %d processes before, now with %d: random states begin anew",
                        len(state["random"]), processes.world)
        self.step = checkpoint.step

    def run(self) -> None:
        """All steps that are left, and a validation that a kill has prevented.

        KeyboardInterrupt after a step, with its checkpoint, if SIGINT or SIGTERM asks for it.
        """
        if self.step:
            self._validate_if_due()
        with asked_to_stop() as is_asked, _bar(self.step, self.course.num_steps, self.processes.is_first) as bar:
            self._learn(bar, is_asked)

    def _learn(self, bar: Any, is_asked: Callable[[], bool]) -> None:
        first, started = self.step, time.monotonic()
        for prepared in self.feeder.steps(first):
            learning_rate = self.learner.learning_rate
            outcome = self.learner.step(prepared, self.course.step(self.step))
            self.step += 1
            self._window.append((self.step, outcome.loss, outcome.accuracy, learning_rate))
            stops = self._stops(is_asked)
            saves = stops or self._is_due(self.runtime.save_every) or self._is_due(self.runtime.validate_every)
            if saves or self.step == self.course.num_steps or self._is_due(self.runtime.log_every):
                rate = (self.step - first) * self.course.params.batch_size / (time.monotonic() - started)
                self._tell(bar, rate)
            if saves or self.step == self.course.num_steps:
                before = time.monotonic()
                self._save()
                if stops:
                    raise KeyboardInterrupt
                self._validate_if_due()
                started += time.monotonic() - before  # rates are those of learning

    def _stops(self, is_asked: Callable[[], bool]) -> bool:
        """All processes stop after the same step: alone at once, together when they speak with each other anyway."""
        if self.processes.world == 1:
            return is_asked()
        return self._is_due(self.runtime.log_every) and any(self.processes.all_of(is_asked()))

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.course.num_steps)

    def _tell(self, bar: Any, rate: float) -> None:
        """Write the lines of the steps since the last time; until then losses stay on the device."""
        import torch
        values = torch.stack([torch.stack([loss, accuracy]) for _, loss, accuracy, _ in self._window])
        means = self.processes.mean(values).tolist()
        lines = [{"step": step, "loss": loss, "accuracy": accuracy, "learning_rate": learning_rate}
                 for (step, _, _, learning_rate), (loss, accuracy) in zip(self._window, means)]
        self._window.clear()
        loss, accuracy = (sum(column) / len(means) for column in zip(*means))
        if self.processes.is_first:
            curve.append_lines(self.log, lines)
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} near step {self.step}", str(self.log), _DIVERGED)
        if not self.processes.is_first:
            return
        total = self.course.num_steps
        left = (total - self.step) * self.course.params.batch_size / rate
        log.info("train     step %d/%d  loss %.4f  in-batch accuracy %.3f  %.0f queries/s  %.0f s left",
                 self.step, total, loss, accuracy, rate, left)
        bar.update(self.step - bar.n)
        bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}, {rate:.0f} queries/s")
        self.record({"loss": loss, "accuracy": accuracy, "queries_per_second": rate,
                     "learning_rate": lines[-1]["learning_rate"], "scale": self.learner.scale}, self.step)

    def _save(self) -> None:
        if not self.learner.is_finite():  # the loss tells it one step later
            raise UserError(f"weights are no longer numbers after step {self.step}", str(self.directory), _DIVERGED)
        random = self.processes.all_of(random_state(self.learner.device))
        if self.processes.is_first:
            self.checkpoints.save(self.step, self.learner.model, {**self.learner.state(), "random": random},
                                  {"asked": self.asked, "step": self.step}, self.encoder)
            self._settle()
        self.processes.wait()

    def _validate_if_due(self) -> None:
        """Score the checkpoint of this step, unless that was done before."""
        if not self._is_due(self.runtime.validate_every) or self.processes.all_of(self._is_validated())[0]:
            return
        before = random_state(self.learner.device)
        scores = dict(self.validate(self.checkpoints.at(self.step)))
        set_random_state(before, self.learner.device)
        if self.processes.is_first:
            curve.append_lines(self.log, [{"step": self.step, "validation": scores}])
            log.info("validated step %d  average %.4f  (%s)", self.step, scores["average"],
                     "  ".join(f"{task} {value:.3f}" for task, value in scores.items() if task != "average"))
            self.record({f"validation/{task}": value for task, value in scores.items()}, self.step)
            self._settle()
        self.processes.wait()

    def _is_validated(self) -> bool:
        lines = curve.read_lines(self.log) if self.processes.is_first else []
        return any("validation" in line and line["step"] == self.step for line in lines)

    def _settle(self) -> None:
        """What follows from the checkpoints and lines that are there: the best one, the picture, what may go."""
        lines, last = curve.read_lines(self.log), self.checkpoints.last()
        validations = [line for line in lines if "validation" in line]
        best = max(validations, key=lambda line: line["validation"]["average"], default={"step": None})["step"]
        chosen = self.checkpoints.at(best) if best is not None else last
        assert chosen is not None, "there is nothing to settle before the first checkpoint"
        weights = f"./{chosen.weights.relative_to(self.directory)}"
        with atomic_path(self.directory / f"{self.name}.yaml") as path:
            origin = f"step {chosen.step}" + (", the best so far" if validations else "")
            write_encoder(path, self.encoder(weights), origin)
        self.checkpoints.prune(self.runtime.keep, best)  # last: until now the file above may have named any of them
        if validations or self.step == self.course.num_steps:
            curve.draw(lines, self.directory / CURVE, self.name)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in sorted({*before, *now})
            if before.get(key) != now.get(key)]


def _bar(first: int, total: int, is_shown: bool) -> Any:
    from tqdm import tqdm
    return tqdm(initial=first, total=total, desc="train", unit="step", leave=False,
                disable=not (is_shown and sys.stderr.isatty()))
