"""The commands for a cluster: submit, look at logs, cancel. cli.py parses, commands.py has the others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import Experiment
    from pipeline.submission import Wanted

DONE = 0


def run(options: Any) -> int:
    """Submit every stage that misses something."""
    from pipeline.config import load
    from pipeline.slurm import max_array_size
    from pipeline.submission import cluster_of, wanted
    experiment = load(options.experiment, options.overrides)
    cluster = cluster_of(experiment)
    experiment.check_encoders()
    limit = sys.maxsize if options.dry_run else max_array_size()
    return _submit(options, experiment, experiment.directory, wanted(experiment, cluster, _command(options), limit))


def train(options: Any) -> int:
    """Submit a training: one job, on as many nodes as the cluster's file says."""
    from pipeline.config import load
    from pipeline.submission import Wanted, cluster_of
    from pipeline.training_set import directory_of
    training = load(options.experiment, options.overrides, kind="training")
    accepted = ["--accept-changes"] if options.accept_changes else []
    job = Wanted("train", ("train", *_command(options), *accepted), 0, cluster_of(training)["train"])
    return _submit(options, training, directory_of(training), [job])


def logs(options: Any) -> int:
    from pipeline.queue import states
    from pipeline.report.jobs import logs_text
    directory = _directory(options)
    print(logs_text(states(directory), directory, options.stage, options.lines))
    return DONE


def cancel(options: Any) -> int:
    from pipeline import slurm
    from pipeline.submission import active_jobs
    jobs = active_jobs(_directory(options))
    if jobs:
        slurm.cancel(jobs)
    print(f"cancelled  {', '.join(jobs)}" if jobs else "nothing to cancel: no job of this experiment is in the queue")
    return DONE


def _directory(options: Any) -> Path:
    """Of an experiment, or of a training."""
    from pipeline.config import load
    from pipeline.training_set import directory_of
    if options.training:
        return directory_of(load(options.experiment, options.overrides, kind="training"))
    return load(options.experiment, options.overrides).directory


def _command(options: Any) -> list[str]:
    """Experiment and options as a job finds them again: it runs in the directory where it was submitted."""
    return [options.experiment, *options.overrides]


def _submit(options: Any, experiment: Experiment, directory: Path, jobs: Sequence[Wanted]) -> int:
    from pipeline.report.jobs import submitted_text
    from pipeline.submission import dry_run, submit
    if not jobs:
        print("nothing to do: everything was there already")
    elif options.dry_run:
        print("\n".join(dry_run(experiment, directory, jobs)))
    else:
        print(submitted_text(options.experiment, submit(experiment, directory, jobs)))
    return DONE
