"""Artifacts that no experiment you name refers to: listed, and removed only when asked.

What is kept is what the plans of the experiments name now, and what their complements need. So the plans must be
whole: while a job waits for a table to be collected, its artifacts cannot be told from garbage, and nothing is
removed. A directory goes only if its name and everything in it look like an artifact; symbolic links are never
followed. There are no locks: do not run this beside a stage of an experiment that is not named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.artifacts import MANIFEST
from pipeline.config import Experiment
from pipeline.plan import make_plan
from pipeline.report.results import artifacts_of_complements
from pipeline.report.text import size_text
from pipeline.stages import STAGES
from pipeline.support.errors import UserError

_NAME = re.compile(r".+-[0-9a-f]{12}")
_FILE = re.compile(r"[a-z_]+(-[0-9]{5,})?\.(parquet|json|npz|faiss)|\..+\.tmp-.+")


def collect_garbage(experiments: Sequence[Experiment], delete: bool) -> list[str]:
    """One line per artifact that none of the experiments uses, with its size; the last line is the total.

    UserError: no experiments, experiments of several work_dirs, or a plan with waiting jobs.
    """
    root = _root(experiments)
    kept = {label for experiment in experiments for label in _labels(experiment)}
    lines, total = [], 0
    for directory in sorted(_unused(root, kept)):
        foreign = _foreign(directory)
        if foreign:
            lines.append(f"left alone  {directory}: {foreign} is not a file of ours")
            continue
        size = sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(directory))
        total += size
        lines.append(f"{'deleted' if delete else 'unused'}  {size_text(size):>7}  {directory}")
        if delete:
            _remove(directory)
    advice = "" if delete or not total else " (--delete removes them)"
    return [*lines, f"{size_text(total)} {'freed' if delete else 'unused'}{advice}"]


def _root(experiments: Sequence[Experiment]) -> Path:
    roots = {experiment.work_dir.resolve() for experiment in experiments}
    if len(roots) != 1:
        raise UserError("all experiments must share one work_dir", ", ".join(map(str, sorted(roots))) or None,
                        "name every experiment of that work_dir, and no other")
    return roots.pop() / "artifacts"


def _labels(experiment: Experiment) -> set[str]:
    plan = make_plan(experiment)
    waiting = [f"{stage} {name}" for stage in STAGES for name in plan.waiting[stage]]
    if waiting:
        listed = ", ".join(waiting[:3]) + (f" and {len(waiting) - 3} more" if len(waiting) > 3 else "")
        raise UserError(f"artifacts of experiment {experiment.name} are not known yet: {listed}",
                        do=f"collect first: python -m pipeline collect {experiment.name}")
    return artifacts_of_complements(experiment) | {artifact.label for artifact in plan.artifacts()}


def _unused(root: Path, kept: set[str]) -> Iterator[Path]:
    for stage in STAGES:
        folder = root / stage
        if folder.is_symlink() or not folder.is_dir():
            continue
        for entry in os.scandir(folder):
            is_artifact = entry.is_dir(follow_symlinks=False) and _NAME.fullmatch(entry.name)
            if is_artifact and f"{stage}/{entry.name}" not in kept:
                yield Path(entry.path)


def _foreign(directory: Path) -> str | None:
    """The first thing in it that no stage writes."""
    foreign = sorted(entry.name for entry in os.scandir(directory)
                     if not entry.is_file(follow_symlinks=False) or not _FILE.fullmatch(entry.name))
    return foreign[0] if foreign else None


def _remove(directory: Path) -> None:
    """The manifest first, so that an artifact that is half removed is not taken for a whole one."""
    files = sorted(os.scandir(directory), key=lambda entry: entry.name != MANIFEST)
    for entry in files:
        os.unlink(entry.path)
    directory.rmdir()
