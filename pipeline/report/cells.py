"""The cells of an experiment for its report: each row of the score table with the survey of its run.

Cells that search the same pools are surveyed one after the other, so that a union of millions of candidates is
indexed once, and only one such index is held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.metrics.ranking import Metric
from pipeline.plan import Plan, Scored
from pipeline.report.rows import ScoreRow, score_rows
from pipeline.report.survey import PoolIndex, Survey, survey

Key = tuple[str, str, str]
DEFAULT_CUT = 10  # of a headline without a cutoff, such as map


@dataclass(frozen=True)
class Cell:
    row: ScoreRow
    scored: Scored
    survey: Survey

    @property
    def k(self) -> int:
        """The headline's cutoff: what counts as a hit in examples and in what a union loses."""
        return Metric.parse(self.row.headline).k or min(DEFAULT_CUT, len(self.survey.count_KT))


@dataclass(frozen=True)
class Cells:
    """Every cell by (encoder, task, pool), in the order of the plan; the names of each, in that order."""

    by_key: Mapping[Key, Cell]
    encoders: tuple[str, ...]
    tasks: tuple[str, ...]
    pools: tuple[str, ...]

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.by_key.values())

    def of(self, encoder: str, task: str, pool: str) -> Cell:
        return self.by_key[encoder, task, pool]

    def of_task(self, task: str) -> Cell:
        """Any one: what they share is the task's."""
        return self.by_key[self.encoders[0], task, self.pools[0]]

    @property
    def main_pool(self) -> str:
        """The one whose hits and misses are shown: the union, or whatever was named last."""
        return "union" if "union" in self.pools else self.pools[-1]

    @property
    def wider_pools(self) -> tuple[str, ...]:
        """Pools that hold the local one and more; empty if the local pool was not searched."""
        return tuple(pool for pool in self.pools if pool != "local") if "local" in self.pools else ()


def survey_cells(plan: Plan) -> Cells:
    """Survey every run of the plan. NotReady if something is not scored yet; UserError as `survey` raises it."""
    rows = score_rows(plan)
    by_pools: dict[tuple[str, ...], list[int]] = {}
    for number, scored in enumerate(plan.scored):
        by_pools.setdefault(tuple(pool.label for pool in scored.job.pools), []).append(number)
    surveys: dict[int, Survey] = {}
    for numbers in by_pools.values():
        pools = PoolIndex(plan.scored[numbers[0]].job.pools)
        for number in numbers:
            scored = plan.scored[number]
            surveys[number] = survey(scored.job, _own(plan, scored), pools, scored.job.run.params.depth)
    cells = [Cell(row, scored, surveys[number]) for number, (row, scored) in enumerate(zip(rows, plan.scored))]
    return Cells({(cell.row.encoder, cell.row.task, cell.row.pool): cell for cell in cells},
                 *(tuple(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("encoder", "task", "pool")))


def _own(plan: Plan, scored: Scored) -> Sequence[str]:
    """Labels of the pools that are the task's own."""
    prefix = f"{plan.experiment.benchmark.name}.pool."
    names = {prefix + name for name in plan.experiment.members("local", scored.task)}
    return [pool.label for pool in scored.job.pools if pool.name in names]
