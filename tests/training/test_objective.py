"""The loss against loops in float64, against open_clip's, and by finite differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.training import objective
from pipeline.training.draws import Draw
from pipeline.training.examples import Examples
from pipeline.training.feeding import Layout
from pipeline.training.objective import Objective, excluded
from pipeline.training.processes import Processes
from tests.training.tiny import Task, draw_of, examples_of

# Query -> its positives among twelve candidates. 0 and 1 share one, 2 has two, 6 answers what 0 does and more.
ANSWERS = {0: [0], 1: [0], 2: [2, 3], 3: [4], 4: [5], 5: [6], 6: [0, 7]}
CANDIDATES = 12
D = 4


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    task = Task("set_task0", [(f"q{query}", "x", None, 0) for query in ANSWERS],
                [(f"q{query}", f"c{own}", 1) for query, answers in ANSWERS.items() for own in answers])
    return examples_of(tmp_path_factory.mktemp("objective"), [task], ((f"c{row}", "x", None) for row in range(12)))


class Case(NamedTuple):
    draw: Draw
    layout: Layout
    queries_BD: np.ndarray
    candidates_CD: np.ndarray

    @property
    def vectors_ID(self) -> np.ndarray:
        return np.concatenate([self.queries_BD, self.candidates_CD])


def case(queries: Sequence[int], positives: Sequence[int], negatives: Sequence[Sequence[int]] | None = None,
         seed: int = 0) -> Case:
    """Vectors of any length: first one for each query's place, then one for each of the twelve candidates."""
    draw, size = draw_of(queries, positives, negatives), len(queries)
    places = [row + size if row >= 0 else -1 for row in draw.negatives.reshape(-1).tolist()]
    layout = Layout(draw, [], np.arange(size), draw.positives + size, np.array(places, np.int64))
    random = np.random.default_rng(seed)
    return Case(draw, layout, random.normal(size=(size, D)) * 3, random.normal(size=(CANDIDATES, D)) / 2)


def naive(given: Case, scale: float, symmetric: bool) -> tuple[float, float]:
    """Loss and accuracy by the definition: loops over queries and what they are held against."""
    draw, loss, hits = given.draw, 0.0, 0
    candidates = [*draw.positives.tolist(), *draw.negatives.reshape(-1).tolist()]
    size = len(draw.queries)
    for row, query in enumerate(draw.queries.tolist()):
        own = scale * cosine(given.queries_BD[row], given.candidates_CD[candidates[row]])
        others = [scale * cosine(given.queries_BD[row], given.candidates_CD[candidate])
                  for column, candidate in enumerate(candidates)
                  if column != row and candidate >= 0 and candidate not in ANSWERS[query]]
        loss -= own - math.log(sum(math.exp(logit) for logit in (own, *others)))
        hits += all(own > other for other in others)
    if not symmetric:
        return loss / size, hits / size
    back = 0.0
    for row, candidate in enumerate(candidates[:size]):
        own = scale * cosine(given.candidates_CD[candidate], given.queries_BD[row])
        others = [scale * cosine(given.candidates_CD[candidate], given.queries_BD[column])
                  for column, query in enumerate(draw.queries.tolist())
                  if column != row and candidate not in ANSWERS[query]]
        back -= own - math.log(sum(math.exp(logit) for logit in (own, *others)))
    return (loss + back) / 2 / size, hits / size


def cosine(one_D: np.ndarray, other_D: np.ndarray) -> float:
    return float(one_D @ other_D / math.sqrt(float(one_D @ one_D) * float(other_D @ other_D)))


def ours(examples: Examples, given: Case, scale: float, symmetric: bool,
         vectors_ID: torch.Tensor | None = None) -> tuple[Any, float]:
    objective = Objective(examples, symmetric, Processes())
    vectors_ID = torch.tensor(given.vectors_ID) if vectors_ID is None else vectors_ID
    outcome = objective(vectors_ID, torch.tensor(scale), given.layout, given.draw)
    return outcome.loss, float(outcome.accuracy)


@st.composite
def batches(draw: st.DrawFn) -> Case:
    """Queries and positives may repeat; hard negatives may be missing, repeat, or be another query's positive."""
    queries = draw(st.lists(st.sampled_from(sorted(ANSWERS)), min_size=1, max_size=7))
    positives = [draw(st.sampled_from(ANSWERS[query])) for query in queries]
    wanted = draw(st.integers(0, 3))
    negatives = [[own if own not in ANSWERS[query] else -1 for own in draw(
        st.lists(st.integers(-1, CANDIDATES - 1), min_size=wanted, max_size=wanted))] for query in queries]
    return case(queries, positives, negatives, draw(st.integers(0, 99)))


@settings(max_examples=50)
@given(given_case=batches(), scale=st.floats(0.5, 50), symmetric=st.booleans())
def test_against_loops(examples: Examples, given_case: Case, scale: float, symmetric: bool) -> None:
    loss, _ = ours(examples, given_case, scale, symmetric)
    assert float(loss) == pytest.approx(naive(given_case, scale, symmetric)[0], rel=2e-5, abs=2e-5)


def test_accuracy_against_loops(examples: Examples) -> None:
    seen = set()
    for seed in range(30):
        given_case = case([0, 2, 3, 4, 5], [0, 3, 4, 5, 6], [[8, 9], [10, 11], [8, -1], [-1, -1], [9, 10]], seed)
        _, accuracy = ours(examples, given_case, 10.0, False)
        assert accuracy == pytest.approx(naive(given_case, 10.0, False)[1])
        seen.add(round(accuracy, 3))
    assert len(seen) > 2


@pytest.mark.parametrize("symmetric", [True, False])
def test_against_open_clip(examples: Examples, symmetric: bool) -> None:
    """Where no two queries share an answer, the symmetric loss is CLIP's, and the other its half for queries."""
    from open_clip.loss import ClipLoss
    given_case = case([0, 2, 3, 4, 5], [0, 2, 4, 5, 6])
    queries_BD, candidates_BD = (torch.nn.functional.normalize(torch.tensor(vectors), dim=-1) for vectors in (
        given_case.queries_BD, given_case.candidates_CD[given_case.draw.positives]))
    scale = torch.tensor(14.3)
    if symmetric:
        expected = ClipLoss()(queries_BD, candidates_BD, scale)
    else:
        expected = torch.nn.functional.cross_entropy(ClipLoss().get_logits(queries_BD, candidates_BD, scale)[0],
                                                     torch.arange(5))
    assert float(ours(examples, given_case, 14.3, symmetric)[0]) == pytest.approx(float(expected), rel=1e-5)


def gradient(examples: Examples, given_case: Case, symmetric: bool = False) -> np.ndarray:
    vectors_ID = torch.tensor(given_case.vectors_ID, requires_grad=True)
    loss, _ = ours(examples, given_case, 3.0, symmetric, vectors_ID)
    loss.backward()
    assert vectors_ID.grad is not None
    return vectors_ID.grad.numpy()


@pytest.mark.parametrize("symmetric", [True, False])
def test_queries_that_share_a_positive_do_not_punish_each_other(examples: Examples, symmetric: bool) -> None:
    """Alone, neither has anything to be held against: no loss, no gradient."""
    shared = case([0, 1, 6], [0, 0, 0])
    assert float(ours(examples, shared, 3.0, symmetric)[0]) == pytest.approx(0, abs=1e-6)
    assert np.abs(gradient(examples, shared, symmetric)).max() < 1e-7
    assert float(ours(examples, case([0, 3], [0, 4]), 3.0, symmetric)[0]) > 0.01


def test_other_positives_of_a_query_are_left_out(examples: Examples) -> None:
    """Query 2 stands twice, once for each of its answers: neither answer is its negative, query 3's is."""
    twice = case([2, 2, 3], [2, 3, 4])
    moved = twice._replace(candidates_CD=twice.candidates_CD.copy())
    moved.candidates_CD[3] = -moved.candidates_CD[3]
    rows = [excluded(examples, twice.draw, 0, 1).candidates[row].tolist() for row in range(3)]
    assert rows == [[False, True, False], [True, False, False], [False, False, False]]
    losses = [[naive_row(given_case, row) for row in range(3)] for given_case in (twice, moved)]
    assert losses[0][0] == losses[1][0] and losses[0][2] != losses[1][2]
    for given_case, own in zip((twice, moved), losses):
        assert float(ours(examples, given_case, 3.0, False)[0]) == pytest.approx(sum(own) / 3, rel=1e-5)


def naive_row(given_case: Case, row: int) -> float:
    """One query's loss: the batch in which it is the only one to be counted."""
    draw, query = given_case.draw, int(given_case.draw.queries[row])
    cosines = [3 * cosine(given_case.queries_BD[row], given_case.candidates_CD[own]) for own in draw.positives]
    counted = [logit for column, logit in enumerate(cosines)
               if column == row or draw.positives[column] not in ANSWERS[query]]
    return math.log(sum(map(math.exp, counted))) - cosines[row]


def test_a_positive_that_is_anothers_hard_negative(examples: Examples) -> None:
    """Query 0 lists query 2's answers as its negatives: they punish 0, never 2."""
    out = excluded(examples, draw_of([0, 2], [0, 2], [[2, 3], [-1, 8]]), 0, 1).candidates
    #                   positives 0, 2; negatives 2, 3, none, 8
    assert out.tolist() == [[False, False, False, False, True, False], [False, False, True, True, True, False]]


def test_hard_negatives_are_columns_of_all_queries(examples: Examples) -> None:
    """UniIR's own branch held each query against copies of its own positive; here every query sees every negative."""
    given_case = case([3, 4], [4, 5], [[9], [10]])
    moved = gradient(examples, given_case)
    size = len(given_case.draw.queries)
    assert all(np.abs(moved[size + row]).max() > 1e-4 for row in (9, 10))
    without = case([3, 4], [4, 5], [[-1], [10]])
    np.testing.assert_array_equal(gradient(examples, without)[size + 9], 0)
    assert not excluded(examples, given_case.draw, 0, 1).candidates.any()


@pytest.mark.parametrize("world", [2, 3])
def test_what_is_excluded_is_the_same_for_any_number_of_processes(examples: Examples, world: int) -> None:
    joint = draw_of([0, 1, 2, 3, 6, 2], [0, 0, 3, 4, 7, 2], [[4], [-1], [0], [2], [5], [9]])
    alone = excluded(examples, joint, 0, 1)
    size = 6 // world
    parts = [excluded(examples, joint, rank, world) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate([part.candidates for part in parts]), alone.candidates)
    np.testing.assert_array_equal(np.concatenate([part.queries for part in parts]), alone.queries)
    assert all(part.candidates.shape == (size, 12) and part.queries.shape == (size, 6) for part in parts)
    assert not alone.candidates[range(6), range(6)].any() and not alone.queries[range(6), range(6)].any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_by_finite_differences(examples: Examples, symmetric: bool) -> None:
    """Of the loops, in float64: the gradient of each number of each vector, and of the scale."""
    given_case = case([0, 1, 2, 3], [0, 0, 3, 4], [[8, 9], [8, -1], [4, 0], [-1, -1]])
    vectors_ID, step = given_case.vectors_ID, 1e-5
    expected = np.zeros_like(vectors_ID)
    for place in np.ndindex(*vectors_ID.shape):
        losses = []
        for sign in (1, -1):
            moved = vectors_ID.copy()
            moved[place] += sign * step
            losses.append(naive(given_case._replace(queries_BD=moved[:4], candidates_CD=moved[4:]), 3.0, symmetric)[0])
        expected[place] = (losses[0] - losses[1]) / 2 / step
    np.testing.assert_allclose(gradient(examples, given_case, symmetric), expected, rtol=1e-4, atol=1e-6)
    scale = torch.tensor(3.0, requires_grad=True)
    objective = Objective(examples, symmetric, Processes())
    objective(torch.tensor(vectors_ID), scale, given_case.layout, given_case.draw).loss.backward()
    slope = [naive(given_case, 3.0 + sign * step, symmetric)[0] for sign in (1, -1)]
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx((slope[0] - slope[1]) / 2 / step, rel=1e-4)


def test_half_precision_vectors_and_large_scales_stay_finite(examples: Examples) -> None:
    given_case = case([0, 2, 3, 4], [0, 2, 4, 5], [[8], [9], [-1], [10]])
    for kind in (torch.float16, torch.bfloat16):
        vectors_ID = torch.tensor(given_case.vectors_ID, dtype=kind, requires_grad=True)
        loss, _ = ours(examples, given_case, 100.0, True, vectors_ID)
        loss.backward()
        rounded = given_case._replace(queries_BD=vectors_ID.detach().double().numpy()[:4],
                                      candidates_CD=vectors_ID.detach().double().numpy()[4:])
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(naive(rounded, 100.0, True)[0], rel=1e-4)
        assert vectors_ID.grad is not None and torch.isfinite(vectors_ID.grad).all()


def test_a_batch_of_one_has_nothing_to_learn(examples: Examples) -> None:
    loss, accuracy = ours(examples, case([3], [4]), 10.0, True)
    assert float(loss) == 0 and accuracy == 1


def test_the_gradient_does_not_depend_on_the_luck_of_threads() -> None:
    """An item that many queries share: its gradient is summed in one order, so that a training can be repeated."""
    weights_BD = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    places_B = np.random.default_rng(0).integers(0, 7, 4096)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        gradients = []
        for _ in range(20):
            vectors_ID = torch.ones(300, 64, requires_grad=True)
            (objective._rows(vectors_ID, places_B) * weights_BD).sum().backward()
            gradients.append(vectors_ID.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])  # type: ignore[arg-type]
