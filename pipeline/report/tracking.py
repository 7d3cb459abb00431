"""Rates and scores for Weights & Biases, if `log.wandb` names a project; otherwise wandb is not imported.

A tracker must never cost a result: whatever goes wrong here (not installed, not logged in, no network) is one
warning, after which the run goes on untracked. It never asks for a login and never waits long for a server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.config import Experiment
from pipeline.report.rows import ScoreRow, average

log = logging.getLogger("pipeline")

INIT_SECONDS = 20.0
FINISH_SECONDS = 60.0
_COLUMNS = ("encoder", "task", "kind", "pool", "queries", "candidates", "headline", "mean", "low", "high",
            "ceiling")


class Tracker:
    """A context around a run: `stage` after each stage, `scores` at the end; `numbers` as a training goes.

    WANDB_MODE is honoured. `directory` is where wandb keeps its files (default: the experiment's).
    """

    def __init__(self, experiment: Experiment, kind: str = "evaluation", directory: Path | None = None,
                 enabled: bool = True):
        self.experiment, self.kind = experiment, kind
        self.directory = directory or experiment.directory
        self.enabled = enabled and bool(experiment.settings.log.wandb)
        self._run: Any = None

    def __enter__(self) -> Tracker:
        if self.enabled:
            self._try(self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._run is not None:
            self._try(lambda: self._run.finish(exit_code=0 if kind is None else 1))

    def stage(self, name: str, rows_per_second: float, seconds: float, units_made: int) -> None:
        if self._run is not None:
            values = {"rows_per_second": rows_per_second, "seconds": seconds, "units_made": units_made}
            self._try(lambda: self._run.log({f"{name}/{key}": value for key, value in values.items()}))

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        if self._run is not None:
            self._try(lambda: self._run.log(dict(values), step=step))

    def scores(self, rows: Sequence[ScoreRow]) -> None:
        """Every mean and the averages as summary values, and the table of headlines."""
        if self._run is not None:
            self._try(lambda: self._send(rows))

    def report(self, path: Path) -> None:
        """The file of the report, as an artifact."""
        if self._run is not None:
            self._try(lambda: self._run.log_artifact(str(path), name=f"{self.experiment.name}-report", type="report"))

    def _start(self) -> None:
        import wandb
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ConnectionError("not logged in (`wandb login`, or set WANDB_MODE=offline)")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self.experiment.settings.log.wandb, name=self.experiment.name, job_type=self.kind,
            dir=str(self.directory), config=dict(self.experiment.resolved), settings=wandb.Settings(
                init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, silent=True, console="off"))

    def _send(self, rows: Sequence[ScoreRow]) -> None:
        import wandb
        self._run.summary.update(dict(_summary(rows)))
        data = [[row.encoder, row.task, row.kind, row.pool, row.queries, row.candidates, row.headline,
                 *row.value, row.ceiling] for row in rows]
        self._run.log({"scores": wandb.Table(columns=list(_COLUMNS), data=data)})

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # anything at all: a score is worth more than its record elsewhere
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            log.warning("Weights & Biases: %s; the run goes on without it", reason)
            self._run = None


def _summary(rows: Sequence[ScoreRow]) -> Iterator[tuple[str, float]]:
    cells: dict[tuple[str, str], list[ScoreRow]] = {}
    for row in rows:
        cells.setdefault((row.encoder, row.pool), []).append(row)
        for name, value in row.metrics.items():
            yield f"{row.encoder}/{row.task}/{row.pool}/{name}", value.mean
    for (encoder, pool), own in cells.items():
        yield f"{encoder}/average/{pool}", average(own)
