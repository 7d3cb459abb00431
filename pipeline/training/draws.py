"""What a step learns from: queries and, for each, a positive, hard negatives and a prompt.

Every draw is a function of the seed and the epoch alone, made for the whole epoch at once, so that a step is known
by its number: a resumed training goes on with the very rows it would have had, and the number of processes does not
matter, because they share the steps of one and the same order.

Shapes: E rows of an epoch, B queries of a step, H hard negatives per query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.support.errors import UserError
from pipeline.training.examples import Examples
from pipeline.training.settings import Params


@dataclass(frozen=True)
class Draw:
    """Rows of examples: queries [B], the number of each one's prompt (-1: none), positives [B], negatives [B, H].

    A negative is -1 where a query has fewer than H of its own.
    """

    queries: np.ndarray
    prompts: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray

    def part(self, start: int, end: int) -> Draw:
        return Draw(self.queries[start:end], self.prompts[start:end], self.positives[start:end],
                    self.negatives[start:end])


class Course:
    """All steps of a training, by number from 0."""

    def __init__(self, examples: Examples, params: Params):
        self.examples, self.params = examples, params
        self._rows_E = rows_of_epoch(examples, params)
        self.steps_per_epoch = len(self._rows_E) // params.batch_size
        if not self.steps_per_epoch:
            raise UserError(f"training.batch_size is {params.batch_size}, but an epoch has {len(self._rows_E)} rows",
                            do=f"set training.batch_size={max(1, len(self._rows_E))} or less, or check training.rows")
        self.num_steps = max(1, int(self.steps_per_epoch * params.epochs))
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # steps are read ahead across the end of an epoch

    def step(self, number: int) -> Draw:
        epoch, place = divmod(number, self.steps_per_epoch)
        start = place * self.params.batch_size
        return self._epoch(epoch).part(start, start + self.params.batch_size)

    def _draw_epoch(self, epoch: int) -> Draw:
        random, examples = np.random.default_rng([self.params.seed, epoch]), self.examples
        queries_E = self._ordered(random)
        lengths_E = _lengths(examples.positives.offsets, queries_E)
        chosen_E = (random.random(len(queries_E)) * lengths_E).astype(np.int64)
        positives_E = examples.positives.values[examples.positives.offsets[queries_E] + chosen_E]
        num_prompts_E = _lengths(examples.instructed_texts.offsets, queries_E)
        prompts_E = (random.random(len(queries_E)) * num_prompts_E).astype(np.int64)
        if self.params.instruction == "none":
            num_prompts_E = np.zeros_like(num_prompts_E)
        return Draw(queries_E, np.where(num_prompts_E > 0, prompts_E, -1), positives_E,
                    self._negatives(queries_E, random))

    def _ordered(self, random: np.random.Generator) -> np.ndarray:
        """A random order, or one in which `same_task` rows of one task stand together."""
        rows_E = random.permutation(self._rows_E)
        group = self.params.same_task
        if group <= 1:
            return rows_E
        tasks_E = self.examples.tasks[rows_E]
        groups = [own[start:start + group] for own in (rows_E[tasks_E == task] for task in np.unique(tasks_E))
                  for start in range(0, len(own), group)]
        return np.concatenate([groups[number] for number in random.permutation(len(groups))])

    def _negatives(self, queries_E: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Neighbours in the query's own list from a random place on: different ones without looking for doubles."""
        lists, wanted = self.examples.negatives, self.params.hard_negatives
        lengths_E1 = _lengths(lists.offsets, queries_E)[:, None]
        starts_E1 = (random.random(len(queries_E))[:, None] * lengths_E1).astype(np.int64)
        places_EH = (starts_E1 + np.arange(wanted)) % np.maximum(lengths_E1, 1)
        has_EH = np.arange(wanted) < lengths_E1
        found_EH = np.full(places_EH.shape, -1, np.int64)
        found_EH[has_EH] = lists.values[(lists.offsets[queries_E][:, None] + places_EH)[has_EH]]
        return found_EH


def rows_of_epoch(examples: Examples, params: Params) -> np.ndarray:
    """Rows of queries that make up an epoch, in order; a group that `rows` names has exactly so many.

    A group is a task ("webqa_task1") or a data set ("webqa", all its tasks together).
    """
    repeats_Q = np.asarray(examples.queries["repeats"]).astype(np.int64)
    random, told = np.random.default_rng([params.seed]), np.zeros(len(repeats_Q), bool)
    for name, target in params.rows.items():
        members = np.flatnonzero(np.isin(examples.tasks, _tasks_called(name, examples.task_names)))
        if told[members].any():
            raise UserError(f"training.rows names the tasks of '{name}' twice", do="name a data set or its tasks")
        told[members] = True
        if not len(members):
            raise UserError(f"training.rows names '{name}', which is neither a task nor a data set",
                            do=f"tasks: {', '.join(examples.task_names)}")
        if target < 0:
            raise UserError(f"training.rows.{name} is {target}; it is a number of queries per epoch")
        whole, rest = divmod(target, len(members))
        repeats_Q[members] = whole
        repeats_Q[random.permutation(members)[:rest]] += 1
    return np.repeat(np.arange(len(repeats_Q)), repeats_Q)


def _tasks_called(name: str, tasks: Sequence[str]) -> list[int]:
    return [number for number, task in enumerate(tasks) if task == name or task.startswith(f"{name}_task")]


def _lengths(offsets: np.ndarray, rows_E: np.ndarray) -> np.ndarray:
    return np.asarray(offsets[rows_E + 1] - offsets[rows_E])
