"""How long a command takes to begin and end where there is nothing, or next to nothing, to do.

The quick start is run once, small; then `plan` and `status`, and stages over what is there already or with one artifact
to make anew. Beside each: the bare import of what it cannot do without, torch or the libraries of tables and
configuration. All are processes of their own, with their modules compiled beforehand as those of any installation are.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Optional

from tests.speed.comparison import Process, Row, alone, at_least_one, peak_of, processes_by_turns, seconds_of

_SMALL = ("benchmark.options.scale=0.05", "embed.loaders=0", "score.resamples=50")
_LIGHT, _TORCH = "import numpy, pyarrow.compute, pyarrow.parquet, omegaconf", "import torch"


@dataclass(frozen=True)
class Options:
    repetitions: int = 5
    directory: Optional[str] = None

    def __post_init__(self) -> None:
        at_least_one(self, "repetitions")


def rows(options: Options) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": f"{folder}/compiled"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        start = partial(alone, environment=environment)
        work = Path(folder) / "work"
        arguments = ("quickstart", f"work_dir={work}", f"benchmark.root={folder}/data", *_SMALL)
        start("-m", "pipeline", "run", *arguments)
        for what, flow, imports in _flows(start, work, arguments):
            flows: dict[str, Callable[[], Process]] = {"ours": flow, "baseline": partial(start, "-c", imports)}
            processes_by_turns(flows, 1)
            turns = processes_by_turns(flows, options.repetitions)
            ours = turns["ours"]
            yield Row.of("startup", what, 1, "starts/s", seconds_of(ours), seconds_of(turns["baseline"]),
                         f"python -c '{imports}'", None, seconds=round(median(seconds_of(ours)), 3),
                         peak_gb=peak_of(ours))


def _flows(start: Callable[..., Process], work: Path,
           arguments: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], Process], str]]:
    """What is started, how, and what is imported beside it."""
    command = partial(start, "-m", "pipeline")
    yield "list", partial(command, "list"), _LIGHT
    for name in ("plan", "status"):
        yield f"{name}, all done", partial(command, name, *arguments), _LIGHT
    for stage in ("collect", "embed", "index", "retrieve", "score"):
        yield f"{stage}, nothing to do", partial(command, stage, *arguments), _LIGHT
    for stage, imports in (("index", _TORCH), ("retrieve", _TORCH), ("score", _LIGHT)):
        flow = partial(_anew, work, stage, partial(command, stage, *arguments))
        yield f"{stage}, one artifact to make", flow, imports


def _anew(work: Path, stage: str, flow: Callable[[], Process]) -> Process:
    """With the first artifact of a stage taken away."""
    shutil.rmtree(min((work / "artifacts" / stage).iterdir()))
    return flow()
