"""Draws: a step is a function of its number; who stands in it, and how often, is what was asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.support.errors import UserError
from pipeline.training.draws import Course, Draw, rows_of_epoch
from pipeline.training.examples import Examples
from tests.training.tiny import Task, examples_of, params_of

QUERIES = 23
NEGATIVES = tuple(row % 6 for row in range(QUERIES))  # how many each query lists
POSITIVES = tuple(1 + row % 3 for row in range(QUERIES))
PROMPTS = tuple(row % 4 for row in range(QUERIES))
TASK = tuple(0 if row < 11 else 1 if row < 18 else 2 for row in range(QUERIES))
NAMES = ("a_task0", "a_task3", "ab_task1")  # two of data set a; the other one's name only begins alike


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return made(tmp_path_factory.mktemp("draws"), None)


def made(directory: Path, repeats: dict[str, int] | None) -> Examples:
    """Query q has the candidates 10q, 10q + 1 ... as its positives, and 10q + 4 ... as its hard negatives."""
    tasks = [Task(name, negatives=[]) for name in NAMES]
    for row in range(QUERIES):
        task = tasks[TASK[row]]
        task.queries.append((f"q{row}", f"text {row}", None, PROMPTS[row]))
        task.pairs += [(f"q{row}", f"c{10 * row + number}", 1) for number in range(POSITIVES[row])]
        assert task.negatives is not None
        task.negatives.append((f"q{row}", [f"c{10 * row + 4 + number}" for number in range(NEGATIVES[row])]))
    return examples_of(directory, tasks, ((f"c{row}", "x", None) for row in range(10 * QUERIES)), repeats)


def course(examples: Examples, **changes: Any) -> Course:
    return Course(examples, params_of(**{"batch_size": 4, "epochs": 6, **changes}))


def assert_equal(one: Draw, other: Draw) -> None:
    for name in ("queries", "prompts", "positives", "negatives"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def all_steps(wanted: Course) -> list[Draw]:
    return [wanted.step(number) for number in range(wanted.num_steps)]


@given(order=st.permutations(range(18)))
def test_a_step_is_a_function_of_its_number(examples: Examples, order: list[int]) -> None:
    options: dict[str, Any] = dict(hard_negatives=3, same_task=2, epochs=3.6)
    expected, asked = all_steps(course(examples, **options)), course(examples, **options)
    assert asked.num_steps == len(expected) == 18
    for number in order:
        assert_equal(asked.step(number), expected[number])


def test_each_seed_and_each_epoch_draws_anew(examples: Examples) -> None:
    seeds = [np.concatenate([draw.queries for draw in all_steps(course(examples, seed=seed))]) for seed in (0, 1)]
    assert not np.array_equal(seeds[0], seeds[1])
    epochs = seeds[0].reshape(6, -1)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6


@pytest.mark.parametrize("same_task", [0, 1, 4])
def test_every_row_of_an_epoch_stands_in_it_once(examples: Examples, same_task: int) -> None:
    wanted = course(examples, same_task=same_task)
    assert wanted.steps_per_epoch == QUERIES // 4 and wanted.num_steps == 6 * (QUERIES // 4)
    dropped = []
    for epoch in range(6):
        steps = [wanted.step(epoch * wanted.steps_per_epoch + place) for place in range(wanted.steps_per_epoch)]
        counts = Counter(int(row) for draw in steps for row in draw.queries)
        assert set(counts.values()) == {1} and len(counts) == QUERIES - QUERIES % 4
        dropped.append(frozenset(range(QUERIES)) - set(counts))
    assert len(set(dropped)) > 1, "the remainder is another one in each epoch"


def test_positives_prompts_and_negatives_are_the_querys_own(examples: Examples) -> None:
    seen: dict[str, Counter[tuple[int, int]]] = {"positives": Counter(), "prompts": Counter(), "negatives": Counter()}
    for draw in all_steps(course(examples, hard_negatives=4, epochs=60)):
        assert draw.negatives.shape == (4, 4)
        for query, prompt, positive, negatives in zip(*(column.tolist() for column in (
                draw.queries, draw.prompts, draw.positives, draw.negatives))):
            assert positive // 10 == query and positive % 10 < POSITIVES[query]
            assert -1 <= prompt < max(PROMPTS[query], 0) and (prompt == -1) == (PROMPTS[query] == 0)
            found = [row for row in negatives if row >= 0]
            assert len(found) == len(set(found)) == min(4, NEGATIVES[query])
            assert all(row // 10 == query and 4 <= row % 10 < 4 + NEGATIVES[query] for row in found)
            seen["positives"][query, positive] += 1
            seen["prompts"][query, prompt] += 1
            seen["negatives"].update((query, row) for row in found)
    assert len(seen["positives"]) == sum(POSITIVES), "each of a query's positives has its turn"
    assert len(seen["prompts"]) == sum(max(number, 1) for number in PROMPTS)
    assert len(seen["negatives"]) == sum(NEGATIVES)
    for query in range(QUERIES):  # evenly: 60 draws or fewer of at most three, so 4 deviations are at most 15
        shares = [count for (own, _), count in seen["positives"].items() if own == query]
        assert max(shares) - sum(shares) / len(shares) < 16


def test_without_instructions_or_hard_negatives(examples: Examples) -> None:
    for draw in all_steps(course(examples, instruction="none")):
        assert draw.prompts.tolist() == [-1] * 4 and draw.negatives.shape == (4, 0)


def test_the_instruction_moves_no_other_draw(examples: Examples) -> None:
    """With and without prompts the same rows are learned from: what is compared differs in one thing."""
    for one, other in zip(all_steps(course(examples)), all_steps(course(examples, instruction="none"))):
        np.testing.assert_array_equal(one.queries, other.queries)
        np.testing.assert_array_equal(one.positives, other.positives)


@pytest.mark.parametrize("group", [2, 3, 4, 5, 50])
def test_rows_of_one_task_stand_together(examples: Examples, group: int) -> None:
    """Every run of one task is made of whole groups, and at most once of the task's remainder."""
    wanted, orders = course(examples, batch_size=1, same_task=group, epochs=8), set()
    for epoch in range(8):
        rows = [int(wanted.step(epoch * QUERIES + place).queries[0]) for place in range(QUERIES)]
        assert sorted(rows) == list(range(QUERIES))
        runs = [[TASK[rows[0]], 0]]
        for row in rows:
            if runs[-1][0] != TASK[row]:
                runs.append([TASK[row], 0])
            runs[-1][1] += 1
        for task in range(3):
            rest = TASK.count(task) % group
            remainders = [length % group for own, length in runs if own == task and length % group]
            assert remainders in ([], [rest])
        orders.add(tuple(rows))
    assert len(orders) == 8


@pytest.mark.parametrize("rows", [{"a": 7}, {"a": 18}, {"a": 61}, {"a_task3": 3}, {"ab": 11, "a_task0": 40}, {"a": 0}])
def test_named_groups_have_exactly_so_many_rows(examples: Examples, rows: dict[str, int]) -> None:
    found = rows_of_epoch(examples, params_of(rows=rows))
    per_query = np.bincount(found, minlength=QUERIES)
    groups = {"a": (0, 1), "a_task0": (0,), "a_task3": (1,), "ab": (2,)}
    rest = np.ones(QUERIES, bool)
    for name, target in rows.items():
        members = np.isin(TASK, groups[name])
        rest &= ~members
        assert per_query[members].sum() == target
        assert per_query[members].max() - per_query[members].min() <= 1, "as evenly as it goes"
    assert (per_query[rest] == 1).all()
    np.testing.assert_array_equal(found, rows_of_epoch(examples, params_of(rows=rows)))


def test_repeats_are_honoured(tmp_path: Path) -> None:
    repeats = {"q0": 3, "q4": 1, "q20": 2}
    repeated = made(tmp_path, repeats)
    wanted = course(repeated, batch_size=1)
    assert wanted.steps_per_epoch == 6
    for epoch in range(6):
        rows = Counter(int(wanted.step(6 * epoch + place).queries[0]) for place in range(6))
        assert rows == {0: 3, 4: 1, 20: 2}
    upsampled = np.bincount(rows_of_epoch(repeated, params_of(rows={"a_task3": 7})), minlength=QUERIES)
    assert upsampled.tolist() == [3, 0, 0, 0, 1, *[0] * 6, *[1] * 7, 0, 0, 2, 0, 0]


def test_a_part_is_a_slice_of_every_column(examples: Examples) -> None:
    draw = course(examples, hard_negatives=2).step(1)
    both = [draw.part(0, 2), draw.part(2, 4)]
    assert_equal(Draw(*(np.concatenate([getattr(part, name) for part in both])
                        for name in ("queries", "prompts", "positives", "negatives"))), draw)


@pytest.mark.parametrize("epochs, steps", [(0.01, 1), (1, 5), (1.5, 7), (2.0, 10)])
def test_epochs_may_be_fractions(examples: Examples, epochs: float, steps: int) -> None:
    assert course(examples, epochs=epochs).num_steps == steps


def test_a_batch_larger_than_an_epoch_is_refused(examples: Examples) -> None:
    assert course(examples, batch_size=QUERIES).steps_per_epoch == 1
    with pytest.raises(UserError, match=rf"batch_size is {QUERIES + 1}.*epoch has {QUERIES} rows"):
        course(examples, batch_size=QUERIES + 1)


@pytest.mark.parametrize("name", ["b", "a_task", "a_task1", "ab_task0", ""])
def test_an_unknown_name_in_rows_is_refused(examples: Examples, name: str) -> None:
    with pytest.raises(UserError, match=rf"training.rows names '{name}'") as caught:
        course(examples, rows={name: 5})
    assert all(known in str(caught.value) for known in NAMES)


def test_fewer_rows_than_none_are_refused(examples: Examples) -> None:
    with pytest.raises(UserError, match="training.rows"):
        course(examples, rows={"a": -3})


def test_a_task_and_its_data_set_cannot_both_be_told(examples: Examples) -> None:
    with pytest.raises(UserError, match="twice"):
        course(examples, rows={"a": 3, "a_task0": 4})
