"""Which queries to show: the worst misses, near misses, what a union loses, wins and losses between encoders.

The choice is by ranks and scores, ties by the order of the task: the same runs always give the same examples. Queries
that no search of the pool can answer are never chosen; the audit has counted them.

Shapes: Q queries of a task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.report.cells import Cell, Cells, Key

NEAR = 10  # ranks behind the cutoff that count as a near miss
TOPICS: Mapping[str, str] = {
    "worst": "Worst misses",
    "near": "Near misses",
    "lost": "Lost in the wider pool",
    "win": "Wins",
    "loss": "Losses",
}


@dataclass(frozen=True)
class Example:
    """A query, by its position in the task, and the rankings to show: the one it was chosen for first.

    turn: 0 for the first example of its group, and so on; when there is room for few, later turns go first.
    """

    topic: str
    task: str
    query: int
    shown: tuple[Key, ...]
    turn: int


def choose(cells: Cells, most: int) -> list[Example]:
    """At most `most` examples of each topic, task and encoder (or pair of them); first turns first."""
    found = [example for task in cells.tasks for example in _of_task(cells, task, most)]
    place = {topic: number for number, topic in enumerate(TOPICS)}
    return sorted(found, key=lambda example: (example.turn, place[example.topic]))


def _of_task(cells: Cells, task: str, most: int) -> Iterator[Example]:
    first, *others = ((encoder, task, cells.main_pool) for encoder in cells.encoders)
    for key in (first, *others):
        yield from _examples("worst", (key,), _worst(cells.by_key[key])[:most])
        yield from _examples("near", (key,), _near(cells.by_key[key])[:most])
    for pool in cells.wider_pools:
        for encoder in cells.encoders:
            narrow, wide = (encoder, task, "local"), (encoder, task, pool)
            lost = _better(cells.by_key[narrow], cells.by_key[wide])
            yield from _examples("lost", (wide, narrow), lost[:most])
    for key in others:
        ours, theirs = cells.by_key[first], cells.by_key[key]
        yield from _examples("win", (first, key), _better(ours, theirs)[:most])
        yield from _examples("loss", (first, key), _better(theirs, ours)[:most])


def _examples(topic: str, shown: tuple[Key, ...], queries: np.ndarray) -> Iterator[Example]:
    for turn, query in enumerate(queries.tolist()):
        yield Example(topic, shown[0][1], query, shown, turn)


def _worst(cell: Cell) -> np.ndarray:
    """Answerable queries without a hit: those whose first relevant candidate is farthest, the surest of them first."""
    is_miss_Q = ~cell.survey.is_hit(cell.k) & cell.survey.reachable_Q
    return _ordered(is_miss_Q, -_distance(cell), -cell.survey.score_Q)


def _near(cell: Cell) -> np.ndarray:
    first_Q = cell.survey.first_Q
    return _ordered((first_Q > cell.k) & (first_Q <= cell.k + NEAR), first_Q)


def _better(left: Cell, right: Cell) -> np.ndarray:
    """Hits of the left cell that are misses of the right one, the greatest difference of reciprocal ranks first."""
    is_better_Q = left.survey.is_hit(left.k) & ~right.survey.is_hit(right.k)
    return _ordered(is_better_Q, 1 / _distance(right) - 1 / _distance(left))


def _distance(cell: Cell) -> np.ndarray:
    """float64 [Q]: rank of the first relevant candidate, infinite if there is none."""
    return np.where(cell.survey.first_Q > 0, cell.survey.first_Q, np.inf)


def _ordered(chosen_Q: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Positions of the chosen, by ascending keys (the first counts most), then by position."""
    chosen = np.flatnonzero(chosen_Q)
    return np.asarray(chosen[np.lexsort([key[chosen] for key in reversed((*keys, np.arange(len(chosen_Q))))])])
