"""The random baseline: a vector of each content's own, and nothing but chance in it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.encoders import Item, random_vectors
from pipeline.encoders.random_vectors import Params
from pipeline.support.errors import UserError

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
IMAGE = Image.fromarray(PIXELS)
OTHER = Image.fromarray(PIXELS + np.uint8(1))
FLAT = Image.fromarray(PIXELS.reshape(2, 8, 3))  # the same bytes in another shape
TEXTS = ("", "a", "A", "\u00e9\U0001f600", "a" * 9999)
ITEMS = [Item(text, image) for image in (None, IMAGE, OTHER, FLAT) for text in TEXTS]


def vectors(items: list[Item], params: Params = Params()) -> np.ndarray:
    encoder = random_vectors.build(params, "cpu", "fp32")
    return encoder.encode([encoder.prepare(item) for item in items])


def test_every_content_has_a_vector_of_its_own_wherever_it_stands() -> None:
    found = vectors(ITEMS)
    assert found.shape == (len(ITEMS), 256) and found.dtype == np.float32
    assert len(np.unique(found, axis=0)) == len(ITEMS)
    assert np.array_equal(vectors(ITEMS[::-1])[::-1], found)
    assert np.array_equal(np.concatenate([vectors([item]) for item in ITEMS]), found)


def test_only_content_and_seed_decide() -> None:
    same = [Item("a", None), Item("a", None, "an instruction", "a", "query", "1"), Item("a", None, id="2")]
    assert len(np.unique(vectors(same), axis=0)) == 1
    assert np.array_equal(vectors([Item(None, IMAGE)]), vectors([Item("", IMAGE.copy())]))
    assert np.array_equal(vectors([Item(None, None)]), vectors([Item("", None)]))
    assert not np.isin(vectors(ITEMS, Params(seed=1)), vectors(ITEMS)).any()


def test_numbers_are_standard_normal_and_directions_are_chance() -> None:
    found = vectors([Item(str(number), None) for number in range(2000)], Params(64))
    assert abs(found.mean()) < 0.02 and abs(found.std() - 1) < 0.02 and np.abs(found).max() < 7
    units = found / np.linalg.norm(found, axis=1, keepdims=True)
    cosines = (units @ units.T)[np.triu_indices(2000, 1)]
    assert abs(cosines.mean()) < 1e-3 and abs(cosines.std() - 1 / 8) < 2e-3


def test_the_first_numbers_are_pinned() -> None:
    """The same on every machine. After an update of numpy new ones may be pinned: its release is in the identity."""
    found = vectors([Item("a red circle", None), Item("a red circle", IMAGE)], Params(3, 7))
    np.testing.assert_allclose(found, [[-0.251629, 0.368615, 0.039372], [1.115068, 0.091862, -0.411652]], atol=1e-6)


def test_an_empty_batch_and_odd_texts() -> None:
    assert vectors([]).shape == (0, 256)
    assert np.isfinite(vectors([Item("\ud800", None), Item("\0", None)])).all()


def test_identity() -> None:
    found = [str(random_vectors.identity(Params(*each))) for each in ((8, 0), (8, 1), (9, 0))]
    assert len(set(found)) == 3 and "numpy" in found[0]
    for ask in (random_vectors.identity, lambda params: random_vectors.build(params, "cpu", "fp32")):
        with pytest.raises(UserError, match="dimension is 0"):
            ask(Params(0))
