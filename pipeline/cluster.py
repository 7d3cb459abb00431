"""A cluster of configs/clusters: what each stage asks Slurm for. What stands at the top of the file holds for all
stages; `stages` says where one differs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, List, Optional

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline import pieces
from pipeline.sources import read_file
from pipeline.stages import STAGES
from pipeline.support.errors import UserError, nearest

_JOBS = (*STAGES, "train")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")  # sbatch(1): minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s


@dataclass(frozen=True)
class Resources:
    """What the elements of one stage's array ask for; `nodes` and several GPUs are for `train`, which is one job.

    workers: elements, at most; at_once: those that may run at the same time; grace: seconds before the end of `time`
    at which an element stops and goes back into the queue; activate: a line of shell before Python starts.
    """

    workers: int = 1
    at_once: Optional[int] = None
    partition: Optional[str] = None
    account: Optional[str] = None
    qos: Optional[str] = None
    nodes: int = 1
    gpus: int = 0
    cpus: int = 4
    memory: Optional[str] = "16G"
    time: Optional[str] = "04:00:00"
    grace: int = 120
    flags: List[str] = field(default_factory=list)
    activate: str = ""

    def __post_init__(self) -> None:
        for key, least in (("workers", 1), ("nodes", 1), ("gpus", 0), ("cpus", 1), ("grace", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least {least}")
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"at_once is {self.at_once}; it must be at least 1")
        seconds = self.seconds
        if seconds is not None and seconds <= self.grace:
            raise ValueError(f"time is {self.time}, no longer than grace, {self.grace} seconds")

    @property
    def seconds(self) -> int | None:
        """`time` in seconds; ValueError if it is not of sbatch's forms."""
        if self.time is None:
            return None
        found = _TIME.fullmatch(self.time)
        if not found:
            raise ValueError(f"time is {self.time!r}; write it like 04:00:00 or 1-00:00:00")
        days, first, second, third = (None if part is None else int(part) for part in found.groups())
        if days is not None:
            return ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
        if third is None:
            return (first or 0) * 60 + (second or 0)
        return ((first or 0) * 60 + (second or 0)) * 60 + third


def load_cluster(name: str) -> dict[str, Resources]:
    """What each stage, and "train", asks for on the cluster of this name or path; UserError with file and line of what
    does not fit."""
    values = read_file(pieces.find("clusters", name)).values
    for key, (_, where) in values.items():
        _check(key, where)
    return {job: _resources(job, values) for job in _JOBS}


def _check(key: str, where: str) -> None:
    known = [each.name for each in fields(Resources)]
    first, *rest = key.split(".")
    if first == "stages":
        if rest and rest[0] not in _JOBS:
            raise UserError(f"'{rest[0]}' is no stage", where, nearest(rest[0], _JOBS) or f"all: {', '.join(_JOBS)}")
        first, rest = (rest[1] if len(rest) > 1 else known[0]), rest[2:]
    if first not in known or rest:
        raise UserError(f"'{'.'.join([first, *rest])}' is not an option of a cluster", where,
                        nearest(first, known) or f"all: {', '.join(known)}, stages")


def _resources(job: str, values: Mapping[str, tuple[Any, str]]) -> Resources:
    node, where = OmegaConf.structured(Resources()), "configs/clusters"
    OmegaConf.set_readonly(node, False)
    for prefix in ("", f"stages.{job}."):
        for key, (value, where) in values.items():
            own = key.removeprefix(prefix)
            if (key.startswith(prefix) or not prefix) and not own.startswith("stages"):
                try:
                    OmegaConf.update(node, own, value)
                except OmegaConfBaseException as error:
                    raise UserError(f"{key}: {value!r} does not fit: {str(error).splitlines()[0]}", where) from None
    try:
        found = OmegaConf.to_object(node)
    except (ValueError, OmegaConfBaseException) as error:
        raise UserError(f"stage {job}: {str(error).splitlines()[0]}", where) from None
    assert isinstance(found, Resources)
    return found
