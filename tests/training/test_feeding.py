"""Feeding: what a step needs, all of it and nothing twice, whoever prepares it and wherever it begins."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.encoders import Item
from pipeline.images import ImageStore
from pipeline.support.errors import UserError
from pipeline.training.draws import Draw
from pipeline.training.feeding import Feeder, Key, Layout, lay_out
from pipeline.training.processes import Processes
from tests.training.tiny import (
    Prepared, Task, ToyEncoder, Toys, draw_of, examples_of, feeder_of, params_of, runtime_of, toys)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return toys(tmp_path_factory.mktemp("feeding"), ["words", "pictures", "captions", "both"])


def feeder(toy: Toys, chunk_size: int = 5, loaders: int = 0, processes: Processes = Processes(),
           max_flawed: int = 0, **changes: Any) -> Feeder:
    params = params_of(**{"hard_negatives": 2, "epochs": 1, **changes})
    runtime = runtime_of(chunk_size=chunk_size, loaders=loaders, max_flawed=max_flawed)
    return feeder_of(toy, params, runtime, ToyEncoder(), processes)


def keys_of(layout: Layout) -> list[Key]:
    return [key for chunk in layout.chunks for key in chunk]


def needed(draw: Draw) -> set[Key]:
    """Every item of a step, by its definition."""
    queries = {Key(True, row, prompt) for row, prompt in zip(draw.queries.tolist(), draw.prompts.tolist())}
    candidates = {*draw.positives.tolist(), *draw.negatives.reshape(-1).tolist()} - {-1}
    return queries | {Key(False, row, -1) for row in candidates}


@pytest.mark.parametrize("chunk_size", [0, 1, 3, 7, 1000])
def test_the_layout_covers_exactly_what_is_needed(toy: Toys, chunk_size: int) -> None:
    feeding = feeder(toy, chunk_size)
    for number in range(feeding.course.num_steps):
        draw, layout = feeding.course.step(number), feeding.layout(number)
        keys = keys_of(layout)
        assert set(keys) == needed(draw) and len(keys) == len(set(keys))
        sizes = [len(chunk) for chunk in layout.chunks]
        assert min(sizes) > 0 and (len(sizes) == 1 if not chunk_size else max(sizes) <= chunk_size)
        assert all(size == chunk_size for size in sizes[:-1])
        assert [keys[place] for place in layout.queries] == [
            Key(True, *pair) for pair in zip(draw.queries.tolist(), draw.prompts.tolist())]
        assert [keys[place].row for place in layout.positives] == draw.positives.tolist()
        placed = [-1 if place < 0 else keys[place].row for place in layout.negatives]
        assert placed == draw.negatives.reshape(-1).tolist()
        assert not any(keys[place].is_query for place in (*layout.positives, *layout.negatives) if place >= 0)


def test_items_stand_by_content_then_by_length(toy: Toys) -> None:
    """Chunks run few towers and pad little: all without an image first, each kind from short to long."""
    feeding, table = feeder(toy), (toy.examples.candidates, toy.examples.queries)
    for number in range(feeding.course.num_steps):
        found = []
        for is_query, row, prompt in keys_of(feeding.layout(number)):
            own = table[is_query].slice(row, 1).to_pylist()[0]
            text = own["instructed_texts"][prompt] if prompt >= 0 else own["text"]
            found.append((own["image"] is not None, len((text or "").encode())))
        assert found == sorted(found)


def test_a_missing_negative_has_no_place(toy: Toys) -> None:
    feeding = feeder(toy)
    layout = lay_out(draw_of([0, 1], [0, 0], [[3, -1], [-1, -1]]), feeding._lengths, 5)
    assert layout.negatives.tolist()[1:] == [-1, -1, -1] and layout.negatives[0] >= 0
    assert layout.positives[0] == layout.positives[1], "a positive of two queries is encoded once"
    assert len(keys_of(layout)) == 4


def contents(steps: Sequence[Any]) -> list[Any]:
    return [[[tuple(item) for item in chunk] for chunk in step.chunks] for step in steps]


def test_prepared_items_are_those_of_the_layout(toy: Toys) -> None:
    """Against the encoder called by hand on the tables' rows."""
    feeding, encoder = feeder(toy, 4), ToyEncoder()
    table = (toy.examples.candidates, toy.examples.queries)
    for step in feeding.steps(0):
        expected: list[Prepared] = []
        for is_query, row, prompt in keys_of(step.layout):
            own = table[is_query].slice(row, 1).to_pylist()[0]
            text = own["instructed_texts"][prompt] if prompt >= 0 else own["text"]
            expected.append(encoder.prepare(Item(text, toy.images.open(own["image"]) if own["image"] else None)))
        assert [item for chunk in step.chunks for item in chunk] == expected
        assert [len(chunk) for chunk in step.chunks] == [len(chunk) for chunk in step.layout.chunks]


@pytest.mark.parametrize("loaders", [0, 2])
def test_steps_from_the_middle_are_the_later_part(toy: Toys, loaders: int) -> None:
    whole = list(feeder(toy).steps(0))
    assert len(whole) == 6
    for start in (0, 4):
        later = list(feeder(toy, loaders=loaders).steps(start))
        assert contents(later) == contents(whole[start:])
        for one, other in zip(later, whole[start:]):
            assert one.layout.chunks == other.layout.chunks
            np.testing.assert_array_equal(one.layout.draw.queries, other.layout.draw.queries)
    assert list(feeder(toy, loaders=loaders).steps(6)) == []


@pytest.mark.parametrize("world", [2, 4])
def test_the_parts_of_all_processes_are_the_joint_step(toy: Toys, world: int) -> None:
    whole = feeder(toy)
    parts = [feeder(toy, processes=Processes(rank, world)) for rank in range(world)]
    for number in range(whole.course.num_steps):
        joint, layouts = whole.course.step(number), [part.layout(number) for part in parts]
        for name in ("queries", "prompts", "positives", "negatives"):
            joined = np.concatenate([getattr(layout.draw, name) for layout in layouts])
            np.testing.assert_array_equal(joined, getattr(joint, name))
        assert set().union(*(keys_of(layout) for layout in layouts)) == set(keys_of(whole.layout(number)))


@pytest.mark.parametrize("loaders", [0, 1])
def test_feeding_leaves_the_random_state_alone(toy: Toys, loaders: int) -> None:
    """Or dropout after a resumed training's first step would differ from that of an uninterrupted one."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    next(feeder(toy, loaders=loaders).steps(3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def spoiled(tmp_path: Path) -> Toys:
    """Two of twelve pictures are broken; 3.png is one query's, and no candidate's."""
    found = toys(tmp_path, ["captions"])
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "8.png").unlink()
    return found


@pytest.mark.parametrize("loaders", [0, 1])
@pytest.mark.parametrize("tolerated", [0, 1])
def test_more_broken_images_than_tolerated_end_the_training(spoiled: Toys, tolerated: int, loaders: int) -> None:
    feeding = feeder(spoiled, max_flawed=tolerated, loaders=loaders, batch_size=12, hard_negatives=0)
    with pytest.raises(UserError, match=f"images are broken, {tolerated} tolerated") as caught:
        list(feeding.steps(0))
    assert active_children() == [], "no loader outlives the error, though its traceback does"
    assert "captions-c3: undecodable_image" in str(caught.value) or "captions-c8: missing_image" in str(caught.value)
    assert not tolerated or all(f"captions-c{row}" in str(caught.value) for row in (3, 8))


def test_a_tolerated_broken_image_is_replaced(spoiled: Toys) -> None:
    """It counts once, however often it is met; what stands in for it is the item without an image."""
    feeding = feeder(spoiled, max_flawed=2, batch_size=12, hard_negatives=0, epochs=3)
    bare = Prepared([0], None)  # the toy's item for an empty text
    for step in feeding.steps(0):
        prepared = dict(zip(keys_of(step.layout), (item for chunk in step.chunks for item in chunk)))
        assert {key.row for key, item in prepared.items() if not key.is_query and item == bare} == {3, 8}


def test_a_reference_that_leaves_the_root_is_told_as_it_is(tmp_path: Path) -> None:
    """The user's mistake keeps its type on the way out of a loader process."""
    task = Task("out_task0", [("q0", "a", None, 1)], [("q0", "c0", 1)])
    outside = Toys(examples_of(tmp_path / "out", [task], [("c0", None, "../x.png")]), ImageStore(tmp_path), tmp_path)
    for loaders in (0, 1):
        with pytest.raises(UserError, match="climbs"):
            list(feeder(outside, loaders=loaders, batch_size=1, max_flawed=9).steps(0))
