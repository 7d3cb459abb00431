"""Run stages here: in this process, or embed with one process per device.

A worker makes every n-th unit and then helps with whatever is still missing, from the far end, so a dead or slow
worker delays nobody for long. Two workers on one unit waste work and damage nothing (see artifacts.py).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline import artifacts, indexes
from pipeline.benchmarks import load_adapter
from pipeline.config import Experiment, part
from pipeline.plan import MODULES, Plan, make_plan
from pipeline.stages import STAGES
from pipeline.support.children import start
from pipeline.support.errors import NotReady, UserError
from pipeline.support.progress import follow

log = logging.getLogger("pipeline")


class Share(NamedTuple):
    """Worker `number` (from 0) `of` so many."""

    number: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        number, slash, count = text.partition("/")
        if slash and number.isdigit() and count.isdigit() and int(number) < int(count):
            return cls(int(number), int(count))
        raise UserError(f"'{text}' is not a share of the work", "--worker",
                        "write i/n with i from 0 to n-1, such as 0/4")


@dataclass
class Outcome:
    """What one stage did: units made and found, rows of work, seconds."""

    stage: str
    made: int = 0
    found: int = 0
    rows: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.rows / self.seconds if self.seconds else 0.0


def run_stage(experiment: Experiment, stage: str, share: Share = Share()) -> Outcome:
    """Make what is missing of a stage; NotReady if an earlier stage is not complete."""
    started, outcome, module = time.monotonic(), Outcome(stage), MODULES[stage]
    runtime = runtime_of(experiment, stage)
    if stage == "embed" and experiment.settings.index.factory != "Flat":  # before what takes longest
        indexes.check_factory(experiment.settings.index.factory)
    if stage == "collect":
        load_adapter(experiment.benchmark.adapter).prepare(experiment.benchmark)
    asked: set[tuple[str, str]] = set()
    for job in make_plan(experiment).jobs[stage]:
        artifacts.sweep_temporaries(job.artifact.directory)
    while True:  # audits can be planned only when the tables are there
        plan = make_plan(experiment)
        _require_inputs(plan, stage)
        work = _work(plan, stage, share)
        if not work:
            break
        asked, before = {(job.artifact.label, unit) for job, unit in work}, asked
        assert asked != before, f"{stage} was asked for units and did not make them: {sorted(asked)[:3]}"
        for landed in follow(stage, module.make(work, runtime), len(work)):
            outcome.made, outcome.rows = outcome.made + 1, outcome.rows + landed.rows
        _seal(plan, stage, runtime)
    _seal(plan, stage, runtime)
    for job in plan.jobs[stage]:
        if hasattr(module, "accept"):
            module.accept(job, runtime)
    outcome.found = sum(len(module.units(job)) for job in plan.jobs[stage]) - outcome.made
    outcome.seconds = time.monotonic() - started
    return outcome


def runtime_of(experiment: Experiment, stage: str) -> artifacts.Runtime:
    return part(getattr(experiment.settings, stage), MODULES[stage].Runtime)


def _require_inputs(plan: Plan, stage: str) -> None:
    for earlier in STAGES[:STAGES.index(stage)]:
        missing = sum(len(plan.missing_units(job, earlier)) for job in plan.jobs[earlier]) + len(plan.waiting[earlier])
        if missing:
            raise NotReady(f"{stage} waits for {earlier}: {missing} units are missing")


def _work(plan: Plan, stage: str, share: Share) -> list[tuple[Any, str]]:
    """Missing units: this worker's own first, then everybody else's from the far end."""
    everything = [(job, unit) for job in plan.jobs[stage] for unit in MODULES[stage].units(job)]
    absent = {id(job): set(plan.missing_units(job, stage)) for job in plan.jobs[stage]}
    own: list[tuple[Any, str]] = []
    others: list[tuple[Any, str]] = []
    for position, (job, unit) in enumerate(everything):
        if unit in absent[id(job)]:
            (own if position % share.of == share.number else others).append((job, unit))
    turn = len(others) * share.number // share.of  # helpers begin at different places
    return own + (others[turn:] + others[:turn])[::-1]


def _seal(plan: Plan, stage: str, runtime: artifacts.Runtime) -> None:
    for job in plan.jobs[stage]:
        if not job.artifact.is_complete() and not plan.missing_units(job, stage):
            job.artifact.seal(MODULES[stage].facts(job, runtime))


def run_embed_processes(experiment: Experiment, command: Sequence[str], count: int) -> Outcome:
    """Embed with `count` processes of this program, each with a device and a share of the cores of its own."""
    started, plan = time.monotonic(), make_plan(experiment)
    before = _missing(plan, "embed")
    rows = sum(job.rows_of(unit) for job in plan.jobs["embed"] for unit in plan.missing_units(job, "embed"))
    if not before:
        return run_stage(experiment, "embed")
    devices, count = _cuda_devices(), min(count, before)
    workers = []
    for number in range(count):
        environment = dict(os.environ, OMP_NUM_THREADS=str(max(1, len(os.sched_getaffinity(0)) // count)))
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        share = ["--worker", f"{number}/{count}"]
        workers.append(start([sys.executable, "-m", "pipeline", *command, *share], env=environment))
    try:
        codes = [worker.wait() for worker in workers]
    finally:  # interrupted: they must not go on without us
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
    if _missing(make_plan(experiment), "embed") and any(codes):
        raise UserError(f"{sum(map(bool, codes))} of {count} embed workers failed; their messages stand above")
    outcome = run_stage(experiment, "embed")  # seals, and makes what a worker that died has left
    outcome.made, outcome.found, outcome.rows = before, outcome.found - before, rows
    outcome.seconds = time.monotonic() - started
    return outcome


def _missing(plan: Plan, stage: str) -> int:
    return sum(len(plan.missing_units(job, stage)) for job in plan.jobs[stage])


def num_workers(experiment: Experiment) -> int:
    """As configured, or one per CUDA device that this process may see, or one."""
    asked = experiment.settings.local.workers
    if asked > 0:
        return asked
    uses_cuda = experiment.settings.embed.device in ("auto", "cuda")
    return max(1, len(_cuda_devices())) if uses_cuda else 1


def _cuda_devices() -> list[str]:
    """Visible devices, found without importing torch: the driver's list, or what the environment allows."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [device for device in allowed.split(",") if device.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(number) for number, _ in enumerate(listed.stdout.splitlines())] if listed.returncode == 0 else []
