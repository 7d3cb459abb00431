"""Encoding: every distinct item once, no more than fits, and always the vector of the item itself."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.encoders import Item
from pipeline.encoding import Encoding, batch_size, fitting_batch, unit_vectors, without_exhaustion
from pipeline.support.errors import UserError


class Counting:
    """Numbers as items, their powers as vectors; remembers what it was given, and runs out of memory above `room`."""

    dimension = 3
    modalities = frozenset({"text", "image", "image,text"})

    def __init__(self, room: int = 10**6):
        self.room, self.given = room, list[list[float]]()
        self.prepared: list[Item] = []

    def prepare(self, item: Item) -> float:
        self.prepared.append(item)
        return 1.0

    def encode(self, batch: Sequence[float]) -> np.ndarray:
        self.given.append(list(batch))
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("as torch says it")
        return powers(batch)

    @property
    def items(self) -> list[float]:
        return [item for batch in self.given for item in batch]


def powers(items: Sequence[float]) -> np.ndarray:
    return np.stack([np.asarray(items) ** power for power in (0, 1, 2)], axis=1).astype(np.float32)


def digests(items: Sequence[float]) -> list[bytes | None]:
    return [sha256(str(item).encode()).digest()[:16] for item in items]


BATCHES = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), max_size=6)


@given(BATCHES, st.integers(1, 8), st.integers(1, 9))
def test_vectors_are_the_items_own_whatever_is_remembered(batches: list[list[int]], most: int, size: int) -> None:
    encoder = Counting()
    encoding = Encoding(encoder, "counting", size, max_bytes=most * 4 * 3)
    for batch in batches:
        assert np.array_equal(encoding.vectors(batch, digests(batch)), powers(batch))
    assert len(encoding._known) <= most
    assert encoding.num_encoded == len(encoder.items) >= len({item for batch in batches for item in batch})
    assert all(len(given) <= size for given in encoder.given)


def test_equal_items_are_encoded_once() -> None:
    encoder = Counting()
    encoding = Encoding(encoder, "counting", 64)
    encoding.vectors([5, 3, 5, 4], digests([5, 3, 5, 4]))
    encoding.vectors([4, 7, 5], digests([4, 7, 5]))
    assert encoder.given == [[5, 3, 4], [7]] and encoding.num_encoded == 4
    assert encoding.vectors([7, 3], digests([7, 3])).tolist() == [[1, 7, 49], [1, 3, 9]] and encoding.num_encoded == 4
    encoding.forget()
    encoding.vectors([3], digests([3]))
    assert encoding.num_encoded == 5


def test_items_without_a_digest_are_like_no_other() -> None:
    encoder = Counting()
    encoding = Encoding(encoder, "counting", 64)
    for _ in range(2):
        assert np.array_equal(encoding.vectors([5, 5], [None, None]), powers([5, 5]))
    assert encoding.num_encoded == 4


def test_the_least_recently_used_is_forgotten_first() -> None:
    encoder = Counting()
    encoding = Encoding(encoder, "counting", 64, max_bytes=2 * 4 * 3)
    for item in (1, 2, 1, 3, 1, 2):  # 3 drives out 2, which was not used since
        encoding.vectors([item], digests([item]))
    assert encoder.items == [1, 2, 3, 2]


def test_a_remembered_vector_cannot_be_changed_from_outside() -> None:
    encoding = Encoding(Counting(), "counting", 64)
    encoding.vectors([2], digests([2]))[:] = 0
    assert np.array_equal(encoding.vectors([2, 2], digests([2, 2])), powers([2, 2]))


def test_a_batch_that_does_not_fit_is_halved_until_it_does(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Counting(room=5)
    encoding = Encoding(encoder, "counting", 32)
    items = list(range(32))
    assert np.array_equal(encoding.vectors(items, [None] * 32), powers(items))
    assert [len(given) for given in encoder.given] == [32, 16, 8, *[4] * 8] and encoding.num_encoded == 32
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert "counting goes on with batches of 4" in caplog.text
    encoding.vectors(items, [None] * 32)
    assert len(caplog.records) == 3, "later batches begin with the size that fitted"


def test_one_item_that_does_not_fit_is_told() -> None:
    with pytest.raises(UserError, match="one item alone does not fit"):
        Encoding(Counting(room=0), "counting", 8).vectors([1, 2], [None, None])


def test_other_errors_pass() -> None:
    def fail() -> np.ndarray:
        raise RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        without_exhaustion(fail)


@pytest.mark.parametrize("room, expected", [(10**6, 1024), (2048, 1024), (2047, 512), (300, 128), (10, 64)])
def test_auto_leaves_as_much_room_again(room: int, expected: int) -> None:
    encoder = Counting(room)
    assert fitting_batch(encoder) == expected
    text, image = encoder.prepared[0].text, encoder.prepared[0].image
    assert text is not None and len(text.split()) > 512 and image is not None


def test_what_is_probed_with_is_what_the_encoder_takes() -> None:
    for modalities, has_text, has_image in (({"text"}, True, False), ({"image"}, False, True),
                                            ({"text", "image"}, False, True)):
        encoder = Counting(0)
        encoder.modalities = frozenset(modalities)
        fitting_batch(encoder)
        item = encoder.prepared[0]
        assert (item.text is not None, item.image is not None) == (has_text, has_image)


def test_a_size_is_taken_as_asked_and_found_only_on_a_device_of_its_own_memory() -> None:
    encoder = Counting()
    assert [batch_size(7, encoder, "cuda"), batch_size("auto", encoder, "cpu")] == [7, 64]
    assert encoder.given == []
    assert batch_size("auto", encoder, "cuda:1") == 1024


def test_unit_vectors() -> None:
    found = unit_vectors(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    assert np.allclose(found, [[0.6, 0.8], [0.0, 0.0]])
