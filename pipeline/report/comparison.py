"""Two encoders on the same queries: per task the difference, how sure it is, and the queries that it comes from.

Everything is computed from the values per query that `score` keeps. Only what is alike is compared: queries, qrels and
candidates must be the same, by their content, or it is refused. Holm's correction is made over everything that is
compared on one pool (all tasks, all pairs). The trade: no more is tested than the mean over queries.

Shapes: Q queries of a task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
from pipeline.metrics.ranking import Metric
from pipeline.plan import Plan, Scored
from pipeline.report.changes import Change, Values, changes_of, values_of
from pipeline.report.sides import Side, other_options, refuse_other_data, shared_cells, sides_of
from pipeline.significance import average_interval, average_test, bootstrap_interval, holm, randomisation_test
from pipeline.support.errors import UserError

LEVEL = 0.05
RANDOMISATIONS = 9_999


@dataclass(frozen=True)
class Difference:
    """One task on one pool, or their average: the first minus the second. All values are fractions.

    low, high   the paired bootstrap interval of the difference
    p           of the randomisation test; `p_holm` is corrected (for an average, which is one test, it is p)
    wins        queries where the first has the greater value; `losses`: where the second has
    gains       the queries on which the first is ahead by most; `drops`: the second
    """

    first: str
    second: str
    task: str
    pool: str
    metric: str
    queries: int
    means: tuple[float, float]
    low: float
    high: float
    p: float
    p_holm: float
    wins: int
    ties: int
    losses: int
    gains: tuple[Change, ...] = ()
    drops: tuple[Change, ...] = ()

    @property
    def difference(self) -> float:
        return self.means[0] - self.means[1]

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `unclear`: the difference could be chance."""
        if self.p_holm >= LEVEL:
            return "unclear"
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Comparison:
    """All differences, by pair, pool and task; averages; in words, what was left out and what differs."""

    names: tuple[str, ...]
    differences: tuple[Difference, ...]
    averages: tuple[Difference, ...]
    confidence: float
    resamples: int
    left_out: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def pairs(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((each.first, each.second) for each in self.differences))

    def pools(self) -> list[str]:
        return list(dict.fromkeys(each.pool for each in self.differences))

    def of(self, pair: tuple[str, str], pool: str) -> list[Difference]:
        return [each for each in self.differences if (each.first, each.second) == pair and each.pool == pool]


class _Chosen(NamedTuple):
    """What holds for every difference."""

    metric: str | None
    confidence: float
    resamples: int
    seed: int
    changes: int


def comparison(plan: Plan, encoders: Sequence[str] = (), metric: str | None = None, changes: int = 5) -> Comparison:
    """Every pair of the experiment's encoders, or of those named.

    `metric` is any that was measured, each task's headline without it; `changes`: queries told of, in each direction.
    NotReady if something is not scored yet; UserError: fewer than two encoders, a metric that no task has.
    """
    sides = sides_of(plan, encoders)
    if len(sides) < 2:
        raise UserError(f"experiment '{plan.experiment.name}' has one encoder: there is nothing to compare",
                        do="name another one, 'encoders=[a, b]', or another experiment")
    return _compared(list(combinations(sides, 2)), _chosen(plan, metric, changes))


def comparison_of_two(first: Plan, second: Plan, pairs: Sequence[tuple[Side, Side]], metric: str | None = None,
                      changes: int = 5) -> Comparison:
    """Pairs whose sides come from two experiments. UserError if they differ in data; else as for `comparison`."""
    refuse_other_data(first, second, metric)
    found = _compared(pairs, _chosen(first, metric, changes))
    differing = other_options(first, second)
    return replace(found, remarks=(f"the experiments differ in {'; '.join(differing)}",) if differing else ())


def _chosen(plan: Plan, metric: str | None, changes: int) -> _Chosen:
    score = plan.experiment.settings.score
    name = str(Metric.parse(metric)) if metric else None
    return _Chosen(name, score.confidence, score.resamples, score.seed, changes)


def _compared(pairs: Sequence[tuple[Side, Side]], chosen: _Chosen) -> Comparison:
    differences: list[Difference] = []
    averages: list[Difference] = []
    left_out: list[str] = []
    for first, second in pairs:
        shared, alone = shared_cells(first, second, chosen.metric)
        left_out += alone
        values = [values_of(cells, chosen.metric) for cells in shared]
        own = [_difference((first.name, second.name), cells[0], each, chosen) for cells, each in zip(shared, values)]
        differences += own
        averages += _averages(own, [each.difference_Q for each in values], chosen)
    if not differences:
        raise UserError(f"{chosen.metric or 'nothing'} was measured on both sides", do="\n".join(left_out) or None)
    names = dict.fromkeys(side.name for pair in pairs for side in pair)
    return Comparison(tuple(names), tuple(_corrected(differences)), tuple(averages), chosen.confidence,
                      chosen.resamples, tuple(dict.fromkeys(left_out)))


def _difference(names: tuple[str, str], cell: Scored, values: Values, chosen: _Chosen) -> Difference:
    difference_Q = values.difference_Q
    low_M, high_M = bootstrap_interval(difference_Q[:, None], chosen.confidence, chosen.resamples, chosen.seed)
    p = randomisation_test(difference_Q, RANDOMISATIONS, chosen.seed).value
    wins, losses = int((difference_Q > 0).sum()), int((difference_Q < 0).sum())
    first, second = values.values_2Q.mean(axis=1)
    gains, drops = changes_of(cell, values, chosen.changes)
    means = float(first), float(second)
    return Difference(*names, cell.task.name, cell.pool, values.metric, len(difference_Q), means, float(low_M[0]),
                      float(high_M[0]), p, p, wins, len(difference_Q) - wins - losses, losses,
                      gains, drops)


def _averages(own: Sequence[Difference], differences: Sequence[np.ndarray], chosen: _Chosen) -> Iterator[Difference]:
    """One per pool: every task counts the same."""
    for pool in dict.fromkeys(each.pool for each in own):
        rows, of_tasks = zip(*((each, difference_Q) for each, difference_Q in zip(own, differences)
                               if each.pool == pool))
        low, high = average_interval(of_tasks, chosen.confidence, chosen.resamples, chosen.seed)
        p = average_test(of_tasks, RANDOMISATIONS, chosen.seed).value
        first, second = (sum(row.means[side] for row in rows) / len(rows) for side in (0, 1))
        yield Difference(rows[0].first, rows[0].second, f"average of {len(rows)} task{'s' * (len(rows) > 1)}", pool,
                         ", ".join(dict.fromkeys(row.metric for row in rows)), sum(row.queries for row in rows),
                         (first, second), low, high, p, p, sum(row.wins for row in rows),
                         sum(row.ties for row in rows), sum(row.losses for row in rows))


def _corrected(differences: Sequence[Difference]) -> list[Difference]:
    """With Holm's p-values, a family for each pool: the same queries on another pool are not another experiment."""
    adjusted: dict[int, float] = {}
    for pool in dict.fromkeys(each.pool for each in differences):
        places = [place for place, each in enumerate(differences) if each.pool == pool]
        adjusted.update(zip(places, holm([differences[place].p for place in places])))
    return [replace(each, p_holm=adjusted[place]) for place, each in enumerate(differences)]
