"""Ours beside a named baseline: both run by turns, so that a noisy machine disturbs both alike.

What a benchmark of this folder is: a module with

    Options                          a dataclass of sizes, all with defaults
    rows(options) -> Iterator[Row]   the comparisons, one by one

`python -m pipeline bench NAME key=value` runs it; the name is the file's. These are never tests: nothing passes or
fails by a time.
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from pipeline.support.errors import UserError, nearest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """One comparison.

    `ours` and `baseline` are medians over the repetitions, in `unit` (a rate: more is better); `ratio` is the median of
    ours / baseline over the turns, `spread` its least and greatest. `equal` says whether both gave the same result
    (a share where results are many; None where there is nothing to compare). `facts` is whatever else is worth
    knowing, such as peak memory. A baseline that could not run here has no numbers and a fact `skipped`: why.
    """

    name: str
    work: str
    ours: float | None
    baseline: float | None
    baseline_name: str
    ratio: float | None
    spread: tuple[float, float] | None
    unit: str
    equal: bool | float | None
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, work: str, amount: float, unit: str, ours: list[float], baseline: list[float],
           baseline_name: str, equal: bool | float | None, **facts: Any) -> Row:
        """From the seconds that each turn took for `amount` units of work."""
        assert len(ours) == len(baseline) > 0, (len(ours), len(baseline))
        ratios = [theirs / mine for mine, theirs in zip(ours, baseline)]
        return cls(name, work, digits(amount / median(ours)), digits(amount / median(baseline)), baseline_name,
                   round(median(ratios), 3), (round(min(ratios), 3), round(max(ratios), 3)), unit, equal, facts)

    @classmethod
    def skipped(cls, name: str, work: str, unit: str, baseline_name: str, reason: str, ours: float | None = None,
                **facts: Any) -> Row:
        """Of a baseline (or, without `ours`, of both) for which this machine has not the room."""
        return cls(name, work, None if ours is None else digits(ours), None, baseline_name, None, None, unit, None,
                   {"skipped": reason, **facts})

    def as_json(self) -> dict[str, Any]:
        """One flat object, the facts last."""
        named = {name: value for name, value in vars(self).items() if name != "facts"}
        return {**named, **self.facts}


def digits(number: float) -> float:
    """Four digits say more than a noisy machine knows."""
    return float(f"{number:.4g}")


def by_turns(flows: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every turn of each flow; one turn of all before the clock starts, to warm caches and threads."""
    for flow in flows.values():
        flow()
    seconds: dict[str, list[float]] = {name: [] for name in flows}
    for _ in range(repetitions):
        for name, flow in flows.items():
            gc.collect()
            started = time.perf_counter()
            flow()
            seconds[name].append(time.perf_counter() - started)
    return seconds


class Process(NamedTuple):
    """What the operating system saw of a process that ran alone: how long, and its greatest resident memory."""

    seconds: float
    peak_gb: float
    output: str


# A process hands its own peak of memory on to what it starts, so the one that measures must be small, as we are not.
_MEASURE = """
import json, os, signal, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
signal.signal(signal.SIGTERM, lambda *_: process.terminate())
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    json.dump([time.perf_counter() - started, usage.ru_maxrss / 2**20], file)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


def alone(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> Process:
    """Run this Python with arguments in a process of its own, from the root of the checkout."""
    with tempfile.NamedTemporaryFile() as seen:
        command = [sys.executable, "-c", _MEASURE, seen.name, sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env=environment)
        try:
            output, errors = process.communicate()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if process.returncode:
            raise RuntimeError(f"{' '.join(map(str, arguments))[:200]} failed:\n{errors[-2000:]}")
        seconds, peak_gb = json.loads(Path(seen.name).read_text())
        return Process(seconds, peak_gb, output)


def processes_by_turns(flows: Mapping[str, Callable[[], Process]], repetitions: int) -> dict[str, list[Process]]:
    """Every turn of each flow, each a process of its own. Nothing is warmed: flows that read files just written."""
    turns = [{name: flow() for name, flow in flows.items()} for _ in range(repetitions)]
    return {name: [turn[name] for turn in turns] for name in flows}


def seconds_of(processes: Sequence[Process]) -> list[float]:
    return [process.seconds for process in processes]


def peak_of(processes: Sequence[Process]) -> float:
    """The greatest peak of the turns, GB."""
    return round(max(process.peak_gb for process in processes), 2)


def at_least_one(options: Any, *names: str) -> None:
    """UserError unless each of these options is 1 or more."""
    for name in names:
        if getattr(options, name) < 1:
            raise UserError(f"{name} is {getattr(options, name)}; it must be at least 1", "command line")


def one_of(key: str, value: str, known: Sequence[str]) -> None:
    """UserError with the nearest names unless this is one of them."""
    if value not in known:
        advice = [nearest(value, known), f"all: {', '.join(known)}"]
        raise UserError(f"{key}: there is no '{value}'", "command line", "\n".join(filter(None, advice)))


def memory_flaw(needed_gb: float) -> str:
    """Why a flow cannot run in the memory that is free here, or nothing."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available_gb = int(fields["MemAvailable"].split()[0]) / 2**20
    if needed_gb < 0.95 * available_gb:
        return ""
    return f"needs about {needed_gb:.1f} GB of memory, {available_gb:.1f} GB are free"


def disk_flaw(directory: Path, needed_gb: float) -> str:
    """Why a flow cannot write its files here, or nothing."""
    free_gb = shutil.disk_usage(directory).free / 2**30
    if needed_gb < 0.95 * free_gb:
        return ""
    return f"needs about {needed_gb:.1f} GB in {directory}, {free_gb:.1f} GB are free (set directory=...)"
