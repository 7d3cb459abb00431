"""The CLIP towers against open_clip itself: sums, items, batches, trimming, precision, tokenizer."""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.encoders import Item, open_clip
from pipeline.encoders.clip_texts import needed_length, new_tokenizer
from pipeline.encoders.clip_towers import ClipEncoder, new_model, read_architecture
from pipeline.encoders.open_clip import Params
from pipeline.support.errors import UserError

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
PLAIN = {"embed_dim": 16, "quick_gelu": False, "vision_cfg": VISION, "text_cfg": TEXT}
FAMILIES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "end_marker": {**PLAIN, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407}},
    "separate_text_tower": {**PLAIN, "custom_text": True},
    "bidirectional": {**PLAIN, "custom_text": True,
                      "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last"}},
    "biased_projection": {**PLAIN, "text_cfg": {**TEXT, "proj_bias": True}},
    "coca": {**PLAIN, "custom_text": True,
             "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2,
                            "attn_pooler_queries": 4, "output_tokens": True},
             "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
             "multimodal_cfg": {**TEXT, "layers": 1}},
}
TRIMMED = {"plain", "end_marker", "separate_text_tower", "biased_projection"}
TEXTS = ("a red circle", "two", "find an image of the following: two blue squares above a yellow star",
         "a small green hexagon left of a ring " * 3)
ALPHABET = "abcdefghijklmnopqrstuvwxyz ETAO0123456789.,'!?&<>_\t\n\u00e9\u00df\u4e2d\u0301\U0001f600"
MARKERS = ["<end_of_text>", "a <end_of_text> b <start_of_text> c"]
SOME_TEXT = st.text(ALPHABET, max_size=60) | st.sampled_from(MARKERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("architectures")
    for name, architecture in FAMILIES.items():
        (folder / f"{name}.json").write_text(json.dumps(architecture))
        (folder / name).mkdir()
        (folder / name / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture}))
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> ClipEncoder:
    return open_clip.build(Params(str(folder / "plain.json"), seed=4), "cpu", "fp32")


def picture(seed: int = 0, width: int = 50, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def items() -> list[Item]:
    images = [picture(seed, 40 + seed, 60) for seed in range(3)]
    return [*(Item(text, None) for text in TEXTS), *(Item(None, image) for image in images),
            *(Item(text, image) for text, image in zip(TEXTS, images))]


def encode(encoder: ClipEncoder, batch: list[Item]) -> np.ndarray:
    return encoder.encode([encoder.prepare(item) for item in batch])


def cosines(a_BD: np.ndarray, b_BD: np.ndarray) -> np.ndarray:
    return (a_BD * b_BD).sum(1) / np.linalg.norm(a_BD, axis=1) / np.linalg.norm(b_BD, axis=1)


# against open_clip, called as its own documentation does

@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_open_clips(folder: Path, family: str) -> None:
    import open_clip as library

    location = f"local-dir:{folder / family}"
    torch.manual_seed(4)
    model, _, transform = library.create_model_and_transforms(location)
    tokenizer = library.get_tokenizer(location)
    model.eval()
    expected = []
    with torch.no_grad():
        for item in items():
            vector = torch.zeros(1, 16)
            if item.text is not None:
                vector = vector + model.encode_text(tokenizer([item.text]), normalize=False)
            if item.image is not None:
                vector = vector + model.encode_image(transform(item.image)[None], normalize=False)
            expected.append(vector[0].numpy())
    vectors = encode(open_clip.build(Params(str(folder / f"{family}.json"), seed=4), "cpu", "fp32"), items())
    assert vectors.dtype == np.float32 and vectors.shape == (len(expected), 16)
    assert np.ptp(np.linalg.norm(vectors, axis=1)) > 0.01  # not normalised
    np.testing.assert_allclose(vectors, np.stack(expected), atol=1e-6 * np.abs(expected).max())


def test_stock_architectures_are_open_clips_own() -> None:
    import open_clip as library

    for name in ("ViT-B-32", "ViT-L-14-quickgelu", "coca_ViT-B-32"):
        stock = library.get_model_config(name)
        assert read_architecture(name) == {**stock, "quick_gelu": stock.get("quick_gelu", False)}
    assert read_architecture("ViT-B-32", quick_gelu=True) == read_architecture("ViT-B-32-quickgelu")


def test_quick_gelu_is_active_when_asked_for(folder: Path, encoder: ClipEncoder) -> None:
    quick = open_clip.build(Params(str(folder / "plain.json"), seed=4, quick_gelu=True), "cpu", "fp32")
    pairs = zip(quick.model.state_dict().values(), encoder.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # the same weights, so only the activation differs
    assert np.abs(encode(quick, items()) - encode(encoder, items())).max(axis=1).min() > 1e-5
    again = open_clip.build(Params(str(folder / "plain.json"), seed=4, quick_gelu=False), "cpu", "fp32")
    assert np.array_equal(encode(again, items()), encode(encoder, items()))


# items

def test_both_modalities_are_the_sum_of_each(encoder: ClipEncoder) -> None:
    text, image, both = encode(encoder, [Item("a", None), Item(None, picture()), Item("a", picture())])
    np.testing.assert_allclose(both, text + image, atol=1e-6)


def test_only_the_towers_needed_are_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = open_clip.build(Params(str(folder / "plain.json"), seed=4), "cpu", "fp32")
    rows: dict[str, list[int]] = {"text": [], "image": []}
    encode_texts, encode_images = own._encode_texts, own._encode_images

    def counted(kind: str, tower: Any) -> Any:
        def run(batch: torch.Tensor) -> torch.Tensor:
            rows[kind].append(len(batch))
            return tower(batch)
        return run

    monkeypatch.setattr(own, "_encode_texts", counted("text", encode_texts))
    monkeypatch.setattr(own, "_encode_images", counted("image", encode_images))
    encode(own, [Item("a", None)] * 3)
    encode(own, [Item(None, picture())] * 2)
    encode(own, [Item("a", picture()), Item("b", None), Item(None, picture())])
    assert rows == {"text": [3, 2], "image": [2, 2]}


def test_empty_text_counts_only_when_alone(encoder: ClipEncoder) -> None:
    beside, image, alone, nothing = encode(
        encoder, [Item("", picture()), Item(None, picture()), Item("", None), Item(None, None)])
    np.testing.assert_allclose(beside, image, atol=1e-6)
    np.testing.assert_allclose(nothing, alone, atol=1e-6)
    assert np.linalg.norm(alone) > 0.01


def test_an_empty_batch_has_no_rows(encoder: ClipEncoder) -> None:
    assert encoder.encode([]).shape == (0, 16)


def test_prepared_items_travel_between_processes(encoder: ClipEncoder) -> None:
    batch = [encoder.prepare(item) for item in items()]
    assert np.array_equal(encoder.encode(pickle.loads(pickle.dumps(batch))), encoder.encode(batch))


def test_images_of_any_mode_and_shape(encoder: ClipEncoder) -> None:
    images = [picture(1, 3, 200), picture(1, 200, 3), picture(3, 1, 1),
              *(picture(2).convert(mode) for mode in ("L", "RGBA", "P", "CMYK"))]
    assert np.isfinite(encode(encoder, [Item(None, image) for image in images])).all()


def test_embed_carries_gradients(encoder: ClipEncoder) -> None:
    encoder.embed([encoder.prepare(Item(TEXTS[0], picture()))]).sum().backward()
    for parameter in (encoder.model.token_embedding.weight, encoder.model.visual.conv1.weight):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
    encoder.model.zero_grad()


# batches

def test_vectors_do_not_depend_on_batch_mates(encoder: ClipEncoder) -> None:
    batch = [encoder.prepare(item) for item in items() * 4]
    together = encoder.encode(batch)
    alone = np.concatenate([encoder.encode([prepared]) for prepared in batch])
    order = np.random.default_rng(0).permutation(len(batch))
    shuffled = encoder.encode([batch[row] for row in order])
    tolerance = 2e-6 * np.linalg.norm(together, axis=1).max()
    assert np.abs(together - alone).max() < tolerance and np.abs(together[order] - shuffled).max() < tolerance


def many(encoder: ClipEncoder) -> list[Any]:
    batch = [encoder.prepare(item) for item in items() * 30]
    return sorted(batch, key=lambda each: (each.pixels is None, each.tokens is None))


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_batch_make_the_vectors_of_the_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = made_encoder(family)
    batch, sizes = many(encoder), list[int]()
    encoder.model.visual.conv1.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    with torch.no_grad():
        whole = encoder.embed(batch).numpy()
    assert sizes == [180]
    monkeypatch.setattr("pipeline.encoders.clip_towers._MOST_BYTES", 300 * 4 * 128)
    vectors = encoder.encode(batch)
    assert sizes[1:] == [17] * 10 + [10] if "attentional_pool" not in FAMILIES[family]["vision_cfg"] else sizes[1:]
    np.testing.assert_allclose(vectors, whole, atol=1e-6 * np.abs(whole).max())


def test_training_is_not_cut_into_parts(encoder: ClipEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of gradients over parts would round differently."""
    monkeypatch.setattr("pipeline.encoders.clip_towers._MOST_BYTES", 1)
    sizes = list[int]()
    handle = encoder.model.visual.conv1.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    encoder.embed([encoder.prepare(Item(None, picture(seed))) for seed in range(5)])
    handle.remove()
    assert sizes == [5]


# trimming

@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_cut_only_where_it_is_exact(family: str) -> None:
    model, tokens_BL = new_model(FAMILIES[family], 1), new_tokenizer(PLAIN)(["a red circle", "two"])
    assert needed_length(model, tokens_BL) == (5 if family in TRIMMED else 24)


@settings(max_examples=40, deadline=None)
@given(st.lists(SOME_TEXT, min_size=1, max_size=4), st.sampled_from(sorted(TRIMMED)))
def test_trimming_changes_nothing(texts: list[str], family: str) -> None:
    """In float64, where rounding does not hide what a wrong cut would change, nor look like it."""
    encoder = made_encoder(family, torch.float64)
    batch = [encoder.prepare(Item(text, None)) for text in texts]
    with torch.no_grad():
        whole = encoder.model.encode_text(encoder.tokenizer(texts)).numpy()
    np.testing.assert_allclose(encoder.encode(batch), whole, rtol=1e-6, atol=1e-7)  # the result is rounded to float32


@functools.cache
def made_encoder(family: str, weights: torch.dtype = torch.float32) -> ClipEncoder:
    return ClipEncoder(FAMILIES[family], new_model(FAMILIES[family], 1).to(weights), "cpu", "fp32")


def test_a_cut_that_is_not_exact_would_be_seen() -> None:
    model, tokens_BL = new_model(FAMILIES["bidirectional"], 1), new_tokenizer(PLAIN)(["a red circle"])
    with torch.no_grad():
        assert (model.encode_text(tokens_BL) - model.encode_text(tokens_BL[:, :5])).abs().max() > 1e-3


def test_short_texts_cost_less(encoder: ClipEncoder) -> None:
    lengths: list[int] = []

    def note_length(_module: Any, _inputs: Any, hidden_BLW: torch.Tensor) -> None:
        lengths.append(hidden_BLW.shape[1])

    handle = encoder.model.transformer.resblocks[0].ln_1.register_forward_hook(note_length)
    encode(encoder, [Item("two", None), Item("a red circle", None)])
    encode(encoder, [Item("a long text " * 20, None)])
    handle.remove()
    assert lengths == [5, 24]


# precision

@pytest.mark.parametrize("precision, least", [("bf16", 0.999), ("fp16", 0.99999)])
def test_half_precisions_are_close_and_really_used(folder: Path, encoder: ClipEncoder, precision: str,
                                                   least: float) -> None:
    half = open_clip.build(Params(str(folder / "plain.json"), seed=4), "cpu", precision)
    exact, vectors = encode(encoder, items()), encode(half, items())
    assert vectors.dtype == np.float32 and cosines(exact, vectors).min() > least
    assert np.abs(exact - vectors).max() > 1e-5
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}


def test_no_bit_depends_on_the_number_of_threads(encoder: ClipEncoder) -> None:
    """Workers share the processors: two of them must make the bytes of one."""
    words = [encoder.prepare(Item("red blue small " * (number % 5) + "dog", None)) for number in range(20)]
    pictures, threads = [encoder.prepare(Item(None, picture(seed))) for seed in range(20)], torch.get_num_threads()
    try:
        for batch in (part[:count] for part in (words, pictures) for count in (1, 2, 5, 10, 19, 20)):
            made = []
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                made.append(encoder.encode(batch))
            np.testing.assert_array_equal(made[0], made[1])
            np.testing.assert_array_equal(made[0], made[2])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_compiled_vectors_differ_by_rounding(folder: Path, precision: str, tolerance: float) -> None:
    """Batches and texts of several sizes run through one compiled graph, as they would on a GPU."""
    plain, compiled = (open_clip.build(Params(str(folder / "plain.json"), seed=4), "cpu", precision) for _ in range(2))
    compiled._image_blocks = compiled._text_blocks = None
    compiled.compile()
    torch._dynamo.reset()
    for count in (10, 7, 3, 10):
        expected = encode(plain, items()[:count])
        np.testing.assert_allclose(encode(compiled, items()[:count]), expected, atol=tolerance * np.abs(expected).max())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())


def test_what_is_faster_than_compiled_is_not_compiled(encoder: ClipEncoder, caplog: pytest.LogCaptureFixture) -> None:
    blocks = encoder._image_blocks, encoder._text_blocks
    with caplog.at_level("INFO", "pipeline"):
        encoder.compile()
    assert (encoder._image_blocks, encoder._text_blocks) == blocks and None not in blocks
    assert "faster as it is" in caplog.text


def test_unknown_precision_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="precision 'fp8' is not known"):
        open_clip.build(Params(str(folder / "plain.json"), seed=4), "cpu", "fp8")
