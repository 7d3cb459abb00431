"""Our run of open_clip's blocks against open_clip's own: every way of pooling, precisions, towers it leaves alone."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.encoders import Item, clip_blocks, clip_texts
from pipeline.encoders.clip_blocks import Blocks, fits
from pipeline.encoders.clip_towers import ClipEncoder, new_model
from pipeline.encoders.precision import weights_dtype
from tests.encoders.test_clip_towers import FAMILIES as OTHERS
from tests.encoders.test_clip_towers import PLAIN, TEXT, TEXTS, VISION

EXACT = 4e-6  # of the largest number
FAMILIES: dict[str, dict[str, Any]] = {
    **OTHERS,
    "quick_gelu": {**PLAIN, "quick_gelu": True},
    "approximate_gelu": {**PLAIN, "vision_cfg": {**VISION, "act_kwargs": {"approximate": "tanh"}}},
    "mean_of_patches": {**PLAIN, "vision_cfg": {**VISION, "pool_type": "avg"}},
    "norm_after_pool": {**PLAIN, "vision_cfg": {**VISION, "final_ln_after_pool": True}},
    "layer_scale": {**PLAIN, "vision_cfg": {**VISION, "ls_init_value": 0.3},
                    "text_cfg": {**TEXT, "ls_init_value": 0.3}},
    "first_token": {**PLAIN, "custom_text": True,
                    "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "first"}},
    "class_token_sees_all": {**PLAIN, "custom_text": True,
                             "text_cfg": {**TEXT, "no_causal_mask": True, "embed_cls": True}},
    "custom_blocks": {**PLAIN, "vision_cfg": {**VISION, "qk_norm": True}, "text_cfg": {**TEXT, "scale_fc": True}},
    "resnet": {**PLAIN, "vision_cfg": {"image_size": 32, "width": 8, "head_width": 8, "layers": [1, 1, 1, 1]}},
}
FOREIGN_IMAGES, FOREIGN_TEXTS = {"custom_blocks", "resnet"}, {"custom_blocks"}
READ_EVERYWHERE = {"mean_of_patches", "coca"}


def made(family: str, precision: str = "fp32") -> ClipEncoder:
    return ClipEncoder(FAMILIES[family], new_model(FAMILIES[family], 5), "cpu", precision)


@functools.cache
def batch(kind: str) -> list[Any]:
    """Prepared texts or images; all families see the same."""
    random, encoder = np.random.default_rng(3), made("plain")
    if kind == "texts":
        return [encoder.prepare(Item(text, None)) for text in TEXTS * 6]
    return [encoder.prepare(Item(None, Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8))))
            for _ in range(20)]


def theirs(encoder: ClipEncoder, kind: str, precision: str = "fp32") -> np.ndarray:
    """open_clip's own methods over full length texts or whole images."""
    half = precision != "fp32"
    with torch.no_grad(), torch.autocast("cpu", weights_dtype(precision) if half else torch.bfloat16, enabled=half):
        if kind == "texts":
            tokens_BL = torch.from_numpy(np.stack([each.tokens for each in batch(kind)]))
            vectors = encoder.model.encode_text(tokens_BL, normalize=False)
        else:
            pixels = torch.from_numpy(np.stack([each.pixels for each in batch(kind)]))
            vectors = encoder.model.encode_image(encoder.images.normalised(pixels), normalize=False)
    return vectors.float().numpy()


def assert_equal(ours: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(ours, expected, rtol=0, atol=EXACT * np.abs(expected).max())


# vectors

@pytest.mark.parametrize("kind", ["texts", "images"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_open_clips_modules(family: str, kind: str) -> None:
    encoder = made(family)
    assert_equal(encoder.encode(batch(kind)), theirs(encoder, kind))


@pytest.mark.parametrize("kind", ["texts", "images"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_loses_no_more_than_open_clips(family: str, precision: str, kind: str) -> None:
    encoder = made(family, precision)
    exact = theirs(encoder, kind)
    loss, their_loss = (np.linalg.norm(vectors - exact)
                        for vectors in (encoder.encode(batch(kind)), theirs(encoder, kind, precision)))
    assert 0 < loss <= 1.3 * their_loss


@pytest.mark.parametrize("precision, tolerance", [("fp32", EXACT), ("bf16", 2e-2)])
@pytest.mark.parametrize("family", ["plain", "quick_gelu", "layer_scale", "coca"])
def test_without_the_fused_products_vectors_are_the_same(family: str, precision: str, tolerance: float,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    fused = made(family, precision)
    monkeypatch.setattr(clip_blocks, "fused_linear", lambda *_: None)
    plain = made(family, precision)
    for kind in ("texts", "images"):
        expected = plain.encode(batch(kind))
        np.testing.assert_allclose(fused.encode(batch(kind)), expected, atol=tolerance * np.abs(expected).max())


def test_the_fused_product_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clip_blocks.fused_linear("cuda", torch.float32) is clip_blocks.fused_linear("cpu", torch.float64) is None
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert clip_blocks.fused_linear("cpu", torch.float32) is None


# where a tower is read

@functools.cache
def states() -> tuple[Any, torch.Tensor]:
    """A tower, and what may enter it: [B, L, W]."""
    tower = new_model(PLAIN, 5).transformer
    return tower, torch.randn(6, 9, 32, generator=torch.Generator().manual_seed(0))


def masks() -> dict[str, torch.Tensor | None]:
    causal = torch.full((9, 9), -torch.inf).triu(1)
    drawn = torch.randn(6 * 2, 9, 9, generator=torch.Generator().manual_seed(1))
    return {"none": None, "causal": causal, "of each item and head": causal + drawn}


@pytest.mark.parametrize("mask", masks())
def test_one_position_is_that_of_all(mask: str) -> None:
    (tower, hidden_BLW), attn_mask = states(), masks()[mask]
    read_at_B = torch.tensor([0, 8, 3, 5, 3, 1])
    with torch.inference_mode():
        expected_BLW = tower(hidden_BLW, attn_mask=attn_mask)
        blocks = Blocks(tower, None)
        assert_equal(blocks(hidden_BLW, attn_mask).numpy(), expected_BLW.numpy())
        read_BW = blocks(hidden_BLW, attn_mask, read_at_B)[:, 0].numpy()
    assert_equal(read_BW, expected_BLW[torch.arange(6), read_at_B].numpy())
    wrong_BW = expected_BLW[torch.arange(6), (read_at_B + 1) % 9].numpy()
    assert (np.abs(read_BW - wrong_BW).max(axis=1) > 1000 * EXACT * np.abs(wrong_BW).max()).all()


def test_reading_another_position_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, read_at = made("end_marker"), clip_texts._read_at
    monkeypatch.setattr(clip_texts, "_read_at", lambda *given: (read_at(*given) - 1).clamp(min=0))
    expected = theirs(encoder, "texts")
    assert np.abs(encoder.encode(batch("texts")) - expected).max() > 1000 * EXACT * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["texts", "images"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - FOREIGN_IMAGES))
def test_the_last_block_works_only_where_the_tower_is_read(family: str, kind: str) -> None:
    encoder, lengths = made(family), list[int]()
    tower = encoder.model.visual.transformer if kind == "images" else clip_texts.text_transformer(encoder.model)
    for block in tower.resblocks:
        block.ln_2.register_forward_hook(lambda _, __, states: lengths.append(states.shape[1]))
    encoder.encode(batch(kind)[:4])
    reads_all = kind == "images" and family in READ_EVERYWHERE
    assert len(lengths) == 2 and lengths[0] > 4 and lengths[1] == (lengths[0] if reads_all else 1)


# what is left to open_clip

@pytest.mark.parametrize("family", FAMILIES)
def test_other_towers_run_as_open_clip_made_them(family: str) -> None:
    encoder = made(family)
    assert (encoder._image_blocks is None) == (family in FOREIGN_IMAGES)
    assert (encoder._text_blocks is None) == (family in FOREIGN_TEXTS)


def test_a_changed_block_is_not_taken_for_a_plain_one() -> None:
    class OtherBlock(type(states()[0].resblocks[0])):  # type: ignore[misc]
        """Would compute something else."""

    tower = new_model(PLAIN, 5).transformer
    assert fits(tower) and not fits(None)
    tower.resblocks[1].__class__ = OtherBlock
    assert not fits(tower)


def test_training_runs_open_clips_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = made("plain")
    monkeypatch.setattr(Blocks, "__call__", lambda *_, **__: pytest.fail("has no gradients"))
    encoder.embed(batch("texts") + batch("images")).sum().backward()
    assert all(parameter.grad is not None for name, parameter in encoder.model.named_parameters()
               if "logit" not in name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_new_weights_are_noticed(precision: str) -> None:
    """In place by an optimiser, or loaded."""
    encoder, other = made("plain", precision), made("quick_gelu", precision)
    before = encoder.encode(batch("images"))
    with torch.no_grad():
        for parameter in encoder.model.visual.transformer.parameters():
            parameter.mul_(1.5)
    changed = encoder.encode(batch("images"))
    assert np.abs(changed - before).max() > 1e-2 * np.abs(before).max()
    encoder.model.load_state_dict(other.model.state_dict())
    np.testing.assert_array_equal(encoder.encode(batch("images")), before)
