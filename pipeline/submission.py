"""An experiment's missing work as job arrays of Slurm, chained so that a stage begins when the one before it is whole.

The jobs re-enter the command line and find what is missing on disk, so nothing is packed at submission and any number
of elements may work on a stage, now or later. What was submitted is noted in the experiment's folder; `status`, `logs`
and `cancel` look there. The trade: a stage that is not planned yet (its tables are not collected) gets as many
elements as the cluster's file allows, and those without work end at once.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import slurm
from pipeline.artifacts import write_json
from pipeline.cluster import Resources, load_cluster
from pipeline.config import Experiment
from pipeline.pieces import available
from pipeline.plan import Plan, make_plan
from pipeline.stages import STAGES
from pipeline.support.errors import UserError

SCRIPT = Path(__file__).resolve().parent.parent / "slurm" / "stage.sbatch"
_NOTE = "slurm.json"


@dataclass(frozen=True)
class Wanted:
    """A job to submit: what its elements run, and how many there are (0: no array, but one job that does it whole)."""

    stage: str
    arguments: tuple[str, ...]
    elements: int
    resources: Resources


@dataclass(frozen=True)
class Submitted:
    """A job that was submitted: which stage, its id, how many elements (0: no array), where they write."""

    stage: str
    job: str
    elements: int
    logs: str

    def log_of(self, task: str | None) -> Path:
        return Path(self.logs.replace("%A", self.job).replace("%j", self.job).replace("%a", task or "0"))


def cluster_of(experiment: Experiment) -> Mapping[str, Resources]:
    """What each stage asks for on the cluster that the option `cluster` names."""
    if experiment.settings.cluster is None:
        known = ", ".join(available("clusters"))
        raise UserError("--on slurm needs a cluster", None, f"cluster=NAME of: {known} (or a path to a .yaml file)")
    return load_cluster(experiment.settings.cluster)


def wanted(experiment: Experiment, cluster: Mapping[str, Resources], command: Sequence[str],
           limit: int) -> list[Wanted]:
    """One array per stage that misses something; the last job scores, and writes tables and exports as `run` does."""
    plan = make_plan(experiment)
    found = []
    for stage in STAGES[:-1]:
        if not plan.is_done(stage):
            resources = cluster[stage]
            elements = min(resources.workers, limit, _most(plan, stage) or resources.workers)
            found.append(Wanted(stage, (stage, *command), elements, resources))
    if found or not plan.is_done(STAGES[-1]):
        found.append(Wanted(STAGES[-1], ("run", *command), 0, cluster[STAGES[-1]]))
    return found


def _most(plan: Plan, stage: str) -> int | None:
    """Missing units; None while they are not all known."""
    if plan.waiting[stage]:
        return None
    return sum(len(plan.missing_units(job, stage)) for job in plan.jobs[stage])


def sbatch_line(experiment: Experiment, directory: Path, job: Wanted, before: str | None) -> list[str]:
    """The line that submits a job to begin when the one with the id `before` has ended well."""
    depends = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if before else []
    return [*_line(experiment.name, directory, job), *depends, *_script(job)]


def _line(name: str, directory: Path, job: Wanted) -> list[str]:
    asked = job.resources
    options = {
        "job-name": f"plumbline.{name}.{job.stage}", "chdir": str(Path.cwd()), "output": _logs(directory, job),
        "open-mode": "append", "partition": asked.partition, "account": asked.account, "qos": asked.qos,
        "cpus-per-task": asked.cpus, "mem": asked.memory, "time": asked.time,
        "gres": f"gpu:{asked.gpus}" if asked.gpus else None,
        "nodes": asked.nodes if job.stage == "train" else None,
        "signal": f"B:USR1@{asked.grace}" if asked.time and asked.grace else None}
    found = ["sbatch", "--parsable", "--requeue", *(f"--{key}={value}" for key, value in options.items() if value)]
    if job.elements:
        found.append(f"--array=0-{job.elements - 1}" + (f"%{asked.at_once}" if asked.at_once else ""))
    return [*found, *asked.flags]


def _script(job: Wanted) -> list[str]:
    """The script and what it is to do; without a line that activates an environment the jobs run this very Python."""
    asked = job.resources
    python = ["--activate", asked.activate] if asked.activate else ["--python", sys.executable]
    processes = ["--processes", str(max(1, asked.gpus))] if job.stage == "train" else []
    return [str(SCRIPT), *python, *processes, *job.arguments]


def _logs(directory: Path, job: Wanted) -> str:
    return str((directory / "logs" / "slurm" / f"{job.stage}.{'%A_%a' if job.elements else '%j'}.log").resolve())


def submit(experiment: Experiment, directory: Path, jobs: Sequence[Wanted]) -> list[Submitted]:
    """Submit and note them; UserError if jobs of an earlier submission are still in the queue."""
    if active := active_jobs(directory):
        raise UserError(f"jobs {', '.join(active)} of {experiment.name} are still in the queue", None,
                        f"watch them: python -m pipeline status {experiment.name}\n"
                        f"or end them: python -m pipeline cancel {experiment.name}")
    (directory / "logs" / "slurm").mkdir(parents=True, exist_ok=True)
    submitted: list[Submitted] = []
    for job in jobs:
        before = submitted[-1].job if submitted else None
        number = slurm.submit(sbatch_line(experiment, directory, job, before))
        submitted.append(Submitted(job.stage, number, job.elements, _logs(directory, job)))
        _note(directory, submitted[-1])  # at once: whatever comes next, it can be cancelled
    return submitted


def dry_run(experiment: Experiment, directory: Path, jobs: Sequence[Wanted]) -> Iterator[str]:
    """The lines that would be run, a name in the place of each id that is not known yet."""
    before: str | None = None
    for job in jobs:
        yield shlex.join(sbatch_line(experiment, directory, job, before))
        before = f"<{job.stage}>"


def active_jobs(directory: Path) -> list[str]:
    """Ids of all jobs of this experiment that have not ended."""
    elements = slurm.elements_of(job.job for job in noted(directory))
    return sorted({element.job for element in elements if element.is_active}, key=int)


def noted(directory: Path) -> list[Submitted]:
    """Every job that was submitted for this experiment, the oldest first."""
    try:
        return [Submitted(**job) for job in json.loads((directory / _NOTE).read_text())]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise UserError(f"not a note of submitted jobs: {error}", str(directory / _NOTE), "remove it") from None


def _note(directory: Path, job: Submitted) -> None:
    write_json(directory / _NOTE, [vars(each) for each in (*noted(directory), job)])
