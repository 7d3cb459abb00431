"""Both halves of the image transform together are open_clip's own, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.encoders.clip_images import ImageInput

SIZES = st.integers(1, 90)
KINDS: list[dict[str, Any]] = [
    {}, {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}, {"interpolation": "bilinear"}, {"resize_mode": "squash"},
    {"resize_mode": "longest"}, {"mean": (0.1, 0.2, 0.3), "std": (0.07, 0.7, 0.9)}]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(width * 97 + height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def halves(images: ImageInput, picture: Image.Image) -> torch.Tensor:
    return images.normalised(torch.from_numpy(images.cut(picture)[None]))[0]


@settings(max_examples=60)
@given(SIZES, SIZES, st.sampled_from(KINDS), st.sampled_from([(32, 32), (24, 40)]))
def test_the_halves_make_open_clips_transform(width: int, height: int, kind: dict[str, Any],
                                              size: tuple[int, int]) -> None:
    images = ImageInput(size, kind, "cpu")
    assert torch.equal(halves(images, picture(width, height)), images.transform(picture(width, height)))


def test_every_value_of_a_pixel_is_normalised_alike() -> None:
    images = ImageInput((16, 16), {}, "cpu")
    every = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert torch.equal(halves(images, every), images.transform(every))
    assert len(halves(images, every)[0].unique()) == 256


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb_as_in_open_clip(mode: str) -> None:
    images = ImageInput((32, 32), {}, "cpu")
    assert torch.equal(halves(images, picture(50, 40, mode)), images.transform(picture(50, 40, mode)))


def test_what_travels_is_small_and_its_own() -> None:
    """A view of the decoder's memory would keep all of it alive, and could not be written to."""
    cut = ImageInput((32, 40), {}, "cpu").cut(picture(300, 200))
    assert cut.dtype == np.uint8 and cut.shape == (32, 40, 3) and cut.flags.owndata and cut.flags.writeable
