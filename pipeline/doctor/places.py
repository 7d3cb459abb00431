"""Are the data where the configuration says, is there room for what the plan makes, can the cluster be asked?"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.benchmarks import load_adapter
from pipeline.cluster import load_cluster
from pipeline.config import Experiment
from pipeline.plan import make_plan
from pipeline.report.forecast import forecast, free_bytes
from pipeline.report.text import size_text
from pipeline.stages.collect import AuditJob
from pipeline.support.errors import UserError
from pipeline.support.findings import FAIL, NOTE, OK, Finding, failed


def findings(experiment: Experiment, command: str) -> Iterator[Finding]:
    yield _writable(experiment.work_dir)
    yield from _sources(experiment, command)
    yield from _images_folders(experiment)
    yield from _plan(experiment)


def pools_of(experiment: Experiment) -> tuple[str, ...]:
    """Every pool that a task of the experiment searches, by itself or in a union."""
    return tuple(dict.fromkeys(name for task in experiment.tasks for pool in experiment.settings.pools
                               for name in experiment.members(pool, task)))


def _writable(directory: Path) -> Finding:
    absolute = directory.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return Finding(OK, "work_dir", f"{directory} can be written")
    except OSError as error:
        return Finding(FAIL, "work_dir", f"{directory} cannot be written: {error.strerror}",
                       f"chmod u+w {existing}, or name another: work_dir=DIRECTORY")


def _sources(experiment: Experiment, command: str) -> Iterator[Finding]:
    """Every file that tasks and pools are read from; what a benchmark writes itself need not be there yet."""
    benchmark, adapter = experiment.benchmark, load_adapter(experiment.benchmark.adapter)
    paths = [path for task in experiment.tasks for path in adapter.task_sources(benchmark, task)]
    paths += [path for pool in pools_of(experiment) for path in adapter.pool_sources(benchmark, pool)]
    missing = [path for path in dict.fromkeys(paths) if not readable(path)]
    if not missing:
        size = sum(path.stat().st_size for path in set(paths))
        yield Finding(OK, "files", f"{len(set(paths))} below {benchmark.root}, {size_text(size)}")
    elif hasattr(adapter, "generate") and len(missing) == len(set(paths)):
        yield Finding(NOTE, "files", f"{benchmark.name} is not written yet", f"python -m pipeline collect {command}")
    else:
        yield Finding(FAIL, "files", f"{len(missing)} of {len(set(paths))} cannot be read, the first is {missing[0]}",
                      f"put it there, or name the data's directory: benchmark.root=DIRECTORY (it is {benchmark.root})")


def readable(path: Path) -> bool:
    """Whether there is something in it to read."""
    return path.is_file() and os.access(path, os.R_OK) and path.stat().st_size > 0


def _images_folders(experiment: Experiment) -> Iterator[Finding]:
    root = Path(experiment.benchmark.root)
    for name in experiment.benchmark.archives:
        yield _archive(root / Path(name).expanduser(), name)
    for name in experiment.benchmark.trusted_roots:
        path = root / Path(name).expanduser()
        if path.is_dir():
            yield Finding(OK, "trusted_roots", str(path))
        else:
            yield Finding(FAIL, "trusted_roots", f"{path} is no directory", "mend benchmark.trusted_roots")


def _archive(path: Path, name: str) -> Finding:
    """Its first header only: the rest is read when it is indexed, on first use."""
    try:
        with tarfile.open(path, "r:") as archive:
            is_empty = archive.next() is None
    except (OSError, tarfile.TarError) as error:
        return Finding(FAIL, f"archive {name}", f"{path}: {getattr(error, 'strerror', None) or error}",
                       "put a plain tar there (not compressed, not in parts), or mend benchmark.archives")
    if is_empty:
        return Finding(FAIL, f"archive {name}", f"{path} is empty", "download it again")
    return Finding(OK, f"archive {name}", size_text(path.stat().st_size))


def _plan(experiment: Experiment) -> Iterator[Finding]:
    try:
        plan = make_plan(experiment)
    except UserError as error:
        yield failed("plan", error)
        return
    tables = [job for job in plan.jobs["collect"] if not isinstance(job, AuditJob)]
    done = sum(job.artifact.is_complete() for job in tables)
    yield Finding(OK if done == len(tables) else NOTE, "tables", f"{done} of {len(tables)} are collected")
    yield room("disk", [stage.bytes for stage in forecast(plan)], experiment.work_dir)


def room(name: str, needed: Iterable[int | None], directory: Path) -> Finding:
    """Whether so many bytes are free; None is a size that is not known."""
    sizes, free = list(needed), free_bytes(directory)
    known = sum(size for size in sizes if size is not None)
    detail = f"{size_text(free)} free, {size_text(known)} needed" + (" as far as it is known" if None in sizes else "")
    if known > free:
        return Finding(FAIL, name, detail, f"free {size_text(known - free)} there, or name another: work_dir=DIRECTORY")
    return Finding(NOTE if None in sizes else OK, name, detail)


def cluster(name: str) -> Iterator[Finding]:
    """The file of a cluster, and the program that it is asked with."""
    try:
        found = load_cluster(name)
    except UserError as error:
        yield failed("file", error)
        return
    yield Finding(OK, "file", ", ".join(
        f"{stage} {each.workers} x {each.gpus} GPUs" if each.gpus else f"{stage} {each.workers}"
        for stage, each in found.items()))
    if shutil.which("sbatch"):
        yield Finding(OK, "sbatch", str(shutil.which("sbatch")))
    else:
        yield Finding(NOTE, "sbatch", "is not here", "submit from a login node of the cluster")
