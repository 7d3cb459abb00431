"""UniIR CLIP_FF: its sequence, T5's layers against their published definition, its names, what a missing part costs."""

# Shapes: S positions of both towers, H heads, K numbers of a head, D dimensions.

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.encoders import Item, uniir_clip
from pipeline.encoders.clip_feature_fusion import FeatureFusionEncoder, fusion_heads
from pipeline.encoders.clip_towers import read_architecture
from pipeline.encoders.uniir_clip import Params
from pipeline.support.errors import UserError

D, HEADS, K = 128, 2, 64
ARCHITECTURE: dict[str, Any] = {  # 77 + 65 positions: some are farther apart than T5's largest distance, 128
    "embed_dim": D, "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 600, "width": D, "heads": 2, "layers": 2},
}
TEXTS = ("a red circle", "find an image of the following: two blue squares above a star, at night")


def fusion_shapes(dimension: int, heads: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of UniIR's two fusion layers, written down from its published checkpoints' layout."""
    inner = heads * K
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(2):
        attention, dense = (f"t5_layers.block.{layer}.layer.{part}" for part in range(2))
        shapes |= {f"{attention}.SelfAttention.{name}.weight": (inner, dimension) for name in "qkv"}
        shapes |= {f"{attention}.SelfAttention.o.weight": (dimension, inner),
                   f"{attention}.layer_norm.weight": (dimension,), f"{dense}.layer_norm.weight": (dimension,),
                   f"{dense}.DenseReluDense.wi.weight": (2048, dimension),
                   f"{dense}.DenseReluDense.wo.weight": (dimension, 2048)}
    return {**shapes, "t5_layers.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, heads),
            "t5_layers.final_layer_norm.weight": (dimension,)}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Towers as open_clip draws them (with other norms), and fusion layers that matter, under UniIR's names."""
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        towers = open_clip.CLIP(**ARCHITECTURE).state_dict()
        del towers["text_projection"]
        fusion = {name: torch.randn(shape) * 0.1 for name, shape in fusion_shapes(D, HEADS).items()}
        found = {**towers, **fusion}
        return {name: tensor + 0.3 * torch.randn(tensor.shape) if "ln_" in name or "norm" in name else tensor
                for name, tensor in found.items()}


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory, state: dict[str, torch.Tensor]) -> Params:
    folder = tmp_path_factory.mktemp("fused")
    (folder / "tiny.json").write_text(json.dumps(ARCHITECTURE))
    prefixed = {name if name.startswith("t5_") else f"clip_model.{name}": each for name, each in state.items()}
    torch.save({"model": prefixed, "epoch": 3}, folder / "clip_ff_tiny.pth")
    return Params(str(folder / "tiny.json"), str(folder / "clip_ff_tiny.pth"), fusion="feature")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def encoder(params: Params) -> FeatureFusionEncoder:
    built = uniir_clip.build(params, "cpu", "fp32")
    assert isinstance(built, FeatureFusionEncoder)
    return built


def items() -> list[Item]:
    rng = np.random.default_rng(3)
    images = [None, *(Image.fromarray(rng.integers(0, 255, (70, 80 + n, 3), dtype=np.uint8)) for n in range(2))]
    return [Item(text, image) for text in (None, "", *TEXTS) for image in images]


def encode(encoder: FeatureFusionEncoder, batch: list[Item]) -> np.ndarray:
    return encoder.encode([encoder.prepare(item) for item in batch])


def bucket(distance: int) -> int:
    """Raffel et al. (2020): 16 buckets a side; 8 exact, 8 whose bounds grow by sqrt(2), up to 128 and beyond."""
    size = abs(distance)
    number = size if size < 8 else min(15, max(8 + n for n in range(16) if size ** 2 >= 64 * 2 ** n))
    return number + (16 if distance > 0 else 0)


def t5_norm(hidden: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * hidden / np.sqrt((hidden ** 2).mean(axis=-1, keepdims=True) + 1e-6)


def t5_encoder(hidden_SD: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """T5's encoder in float64: norms before each part, no biases, no scaling, position biases of the first layer."""
    S = len(hidden_SD)
    table = weights["block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias_SSH = np.array([[table[bucket(key - query)] for key in range(S)] for query in range(S)])
    for layer in range(2):
        first, second = (f"block.{layer}.layer.{part}" for part in range(2))
        normed = t5_norm(hidden_SD, weights[f"{first}.layer_norm.weight"])
        q, k, v = (normed @ weights[f"{first}.SelfAttention.{name}.weight"].T for name in "qkv")
        mixed = []
        for head in range(bias_SSH.shape[2]):
            part = slice(head * K, (head + 1) * K)
            scores = q[:, part] @ k[:, part].T + bias_SSH[:, :, head]
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            mixed.append(shares / shares.sum(axis=1, keepdims=True) @ v[:, part])
        hidden_SD = hidden_SD + np.concatenate(mixed, axis=1) @ weights[f"{first}.SelfAttention.o.weight"].T
        normed = t5_norm(hidden_SD, weights[f"{second}.layer_norm.weight"])
        inner = np.maximum(normed @ weights[f"{second}.DenseReluDense.wi.weight"].T, 0)
        hidden_SD = hidden_SD + inner @ weights[f"{second}.DenseReluDense.wo.weight"].T
    return t5_norm(hidden_SD, weights["final_layer_norm.weight"])


def reference(state: dict[str, torch.Tensor], encoder: FeatureFusionEncoder, item: Item) -> np.ndarray:
    """UniIR's arithmetic, step by step: open_clip's modules by hand, then T5's definition."""
    import open_clip

    model = open_clip.CLIP(**ARCHITECTURE).eval()
    model.load_state_dict({name: each for name, each in state.items() if not name.startswith("t5_")}, strict=False)
    tokens = encoder.tokenizer([item.text or ""])
    pixels = torch.zeros(1, 3, 64, 64) if item.image is None else encoder.images.transform(item.image)[None]
    with torch.no_grad():
        text = model.token_embedding(tokens) + model.positional_embedding
        text = model.ln_final(model.transformer(text, attn_mask=model.attn_mask))
        visual = model.visual
        patches = visual.conv1(pixels).flatten(2).transpose(1, 2)
        image = torch.cat([visual.class_embedding.expand(1, 1, -1), patches], 1) + visual.positional_embedding
        image = visual.ln_post(visual.transformer(visual.ln_pre(image))) @ visual.proj
    fusion = {name.removeprefix("t5_layers."): each.double().numpy() for name, each in state.items()
              if name.startswith("t5_")}
    assert text.shape == (1, 77, D) and image.shape == (1, 65, D)
    return t5_encoder(torch.cat([text, image], 1)[0].double().numpy(), fusion).mean(axis=0)


def test_vectors_are_t5_over_both_towers(encoder: FeatureFusionEncoder, state: dict[str, torch.Tensor]) -> None:
    chosen = [item for number, item in enumerate(items()) if number not in (2, 4, 5, 8, 11)]
    vectors = encode(encoder, chosen)
    expected = np.stack([reference(state, encoder, item) for item in chosen])
    assert vectors.dtype == np.float32 and vectors.shape == (len(chosen), D)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    distances = np.abs(expected[:, None] - expected[None]).max(axis=2)
    assert np.sort(distances, axis=1)[:, 2].min() > 1e-2  # but for "" and no text, all items differ


def test_no_text_is_the_empty_text(encoder: FeatureFusionEncoder) -> None:
    all_items = items()
    assert np.array_equal(encode(encoder, all_items[:3]), encode(encoder, all_items[3:6]))


def test_vectors_do_not_depend_on_batch_mates(encoder: FeatureFusionEncoder) -> None:
    batch = items()
    alone = np.concatenate([encode(encoder, [item]) for item in batch])
    np.testing.assert_allclose(encode(encoder, batch), alone, atol=3e-6)
    np.testing.assert_allclose(encode(encoder, batch[::-1])[::-1], alone, atol=3e-6)


def test_parts_of_a_batch_make_the_vectors_of_the_whole(encoder: FeatureFusionEncoder,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    batch, sizes = [encoder.prepare(item) for item in items() * 4], list[int]()
    encoder.model.t5_layers.register_forward_hook(
        lambda _, __, inputs, ___: sizes.append(len(inputs["inputs_embeds"])), with_kwargs=True)
    with torch.no_grad():
        whole = encoder.embed(batch).numpy()
    assert sizes == [48]
    monkeypatch.setattr("pipeline.encoders.clip_towers._MOST_BYTES", 142 * 20 * 4 * 2048)
    np.testing.assert_allclose(encoder.encode(batch), whole, atol=3e-6)
    assert sizes[1:] == [20, 20, 8]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_whatever_the_order_of_positions(params: Params, encoder: FeatureFusionEncoder,
                                                                 precision: str) -> None:
    half = uniir_clip.build(params, "cpu", precision)
    batch = [half.prepare(item) for item in items()]
    with torch.no_grad():
        expected = half.embed(batch).numpy()
    vectors = half.encode(batch)
    tolerance = (5e-2 if precision == "bf16" else 5e-3) * np.abs(expected).max()
    np.testing.assert_allclose(vectors, expected, atol=tolerance)
    np.testing.assert_allclose(vectors, encode(encoder, items()), atol=tolerance)


def test_an_empty_batch_has_no_rows(encoder: FeatureFusionEncoder) -> None:
    assert encoder.encode([]).shape == (0, D)


def test_what_is_missing_is_run_once_and_texts_are_not_cut(encoder: FeatureFusionEncoder) -> None:
    seen: dict[str, list[tuple[int, ...]]] = {"text": [], "image": []}
    model = encoder.model
    model.token_embedding.register_forward_hook(lambda _, inputs, __: seen["text"].append(tuple(inputs[0].shape)))
    model.visual.conv1.register_forward_hook(lambda _, inputs, __: seen["image"].append(tuple(inputs[0].shape)))
    some = items()
    encode(encoder, [Item("one", None), Item("two", None), Item("three", None)])
    encode(encoder, [some[1], some[2]])
    encode(encoder, [Item("one", some[1].image), some[7]])
    assert seen == {"text": [(3, 77), (1, 77), (2, 77)], "image": [(1, 3, 64, 64), (2, 3, 64, 64), (2, 3, 64, 64)]}


@pytest.mark.parametrize("name, dimension, parameters", [("ViT-B-32-quickgelu", 512, 158_358_145),
                                                         ("ViT-L-14-quickgelu", 768, 438_040_961)])
def test_the_published_sizes_have_uniirs_names_and_shapes(name: str, dimension: int, parameters: int) -> None:
    import open_clip

    architecture = read_architecture(name)
    with torch.device("meta"):
        model = uniir_clip.new_uniir_model(architecture, "feature")
        towers = open_clip.CLIP(**architecture).state_dict()
    expected = {key: tuple(each.shape) for key, each in towers.items() if key != "text_projection"}
    found = {key: tuple(each.shape) for key, each in model.state_dict().items()}
    assert found == {**expected, **fusion_shapes(dimension, 12)}
    assert sum(each.numel() for each in model.parameters()) == parameters


def test_heads_are_uniirs_at_clips_sizes_and_fit_below() -> None:
    assert [fusion_heads(size) for size in (24, 64, 128, 448, 512, 640, 768)] == [1, 1, 2, 7, 12, 12, 12]


def test_a_seed_means_the_same_weights_and_score_fusions_towers(params: Params) -> None:
    seeded = [uniir_clip.build(Params(params.architecture, seed=seed, fusion=fusion), "cpu", "fp32").model.state_dict()
              for seed, fusion in ((4, "feature"), (4, "feature"), (5, "feature"), (4, "score"))]
    first, again, other, score = seeded
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["t5_layers.block.1.layer.0.SelfAttention.q.weight"],
                           other["t5_layers.block.1.layer.0.SelfAttention.q.weight"])
    shared = first.keys() & score.keys()
    assert score.keys() - first.keys() == {"text_projection"}
    assert all(torch.equal(first[name], score[name]) for name in shared)


def test_building_leaves_the_callers_generator_alone(params: Params) -> None:
    torch.manual_seed(11)
    expected = torch.randn(3)
    torch.manual_seed(11)
    uniir_clip.build(Params(params.architecture, seed=1, fusion="feature"), "cpu", "fp32")
    assert torch.equal(torch.randn(3), expected)


def gradients(encoder: FeatureFusionEncoder, batch: list[Item]) -> dict[str, torch.Tensor]:
    encoder.model.zero_grad()
    weights = torch.linspace(-1, 1, D)
    (encoder.embed([encoder.prepare(item) for item in batch]) @ weights).square().sum().backward()
    return {name: each.grad.clone() for name, each in encoder.model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(6, 7), slice(1, 3), slice(0, 12)])
def test_every_parameter_learns_from_every_batch(encoder: FeatureFusionEncoder, chosen: slice) -> None:
    """A parameter without a gradient would stall training in several processes."""
    found = gradients(encoder, items()[chosen])
    assert {name for name, _ in encoder.model.named_parameters()} - set(found) == {"logit_scale"}


def test_gradients_of_the_shared_blank_add_up(encoder: FeatureFusionEncoder) -> None:
    batch = [Item(text, None) for text in TEXTS]
    parts = [gradients(encoder, [item]) for item in batch]
    for name, whole in gradients(encoder, batch).items():
        expected = parts[0][name] + parts[1][name]
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_dropout_is_active_in_training_only(encoder: FeatureFusionEncoder) -> None:
    batch = items()[6:8]
    still = encode(encoder, batch)
    assert np.array_equal(still, encode(encoder, batch))
    encoder.model.train()
    first, second = encode(encoder, batch), encode(encoder, batch)
    assert np.abs(first - second).max() > 1e-3
    encoder.model.eval()
    assert np.array_equal(still, encode(encoder, batch))


def test_gradient_checkpointing_runs_all_blocks_again_and_changes_nothing(encoder: FeatureFusionEncoder) -> None:
    calls: list[str] = []
    blocks = {name: block for name, block in encoder.model.named_modules()
              if type(block).__name__ in ("ResidualAttentionBlock", "T5Block")}
    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    encoder.model.train()
    found = []
    for enable in (False, True, False):
        encoder.model.set_grad_checkpointing(enable)
        torch.manual_seed(2)
        calls.clear()
        found.append(gradients(encoder, items()[5:8]))
        assert sorted(calls) == sorted([*blocks] * (2 if enable else 1))
    assert len(blocks) == 6
    for plain, checkpointed in zip(found[0].values(), found[1].values()):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.05), ("fp16", 0.01)])
def test_half_precisions_are_close_and_really_used(params: Params, encoder: FeatureFusionEncoder, precision: str,
                                                   tolerance: float) -> None:
    exact = encode(encoder, items())
    half = encode(uniir_clip.build(params, "cpu", precision), items())  # type: ignore[arg-type]
    assert half.dtype == np.float32
    assert 0 < np.abs(half - exact).max() < tolerance * np.abs(exact).max()


def test_a_vocabulary_that_nobody_reads_is_accepted(params: Params, encoder: FeatureFusionEncoder, tmp_path: Path,
                                                    state: dict[str, torch.Tensor]) -> None:
    extra = {"t5_layers.embed_tokens.weight": torch.ones(32128, D, dtype=torch.float16)}
    save_file({**state, **extra}, tmp_path / "extra.safetensors")
    other = uniir_clip.build(Params(params.architecture, str(tmp_path / "extra.safetensors"), fusion="feature"),
                             "cpu", "fp32")
    batch = items()[5:8]
    assert np.array_equal(other.encode([other.prepare(item) for item in batch]), encode(encoder, batch))


def test_weights_of_the_other_fusion_are_named(params: Params, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of feature fusion, not of score") as caught:
        uniir_clip.build(Params(params.architecture, params.weights), "cpu", "fp32")
    assert caught.value.do == "fusion: feature"
    score = uniir_clip.build(Params(params.architecture, seed=0), "cpu", "fp32")
    save_file(score.model.state_dict(), tmp_path / "score.safetensors")
    with pytest.raises(UserError, match="of score fusion, not of feature"):
        uniir_clip.build(Params(params.architecture, str(tmp_path / "score.safetensors"), fusion="feature"),
                         "cpu", "fp32")


@pytest.mark.parametrize("change, message", [
    ({"text_cfg": {"width": 64}}, "width 64 for embed_dim 128"),
    ({"embed_dim": 256}, "width 128 for embed_dim 256"),
    ({"vision_cfg": {"layers": [1, 1, 1, 1]}}, "layers of a ResNet"),
    ({"vision_cfg": {"timm_model_name": "vit_tiny"}}, "timm_model_name"),
    ({"text_cfg": {"hf_model_name": "a/b"}}, "hf_model_name"),
    ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask"),
    ({"custom_text": True}, "custom_text"),
    ({"quick_gelu": False}, "QuickGELU"),
])
def test_an_architecture_that_cannot_be_fused_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    changed = {key: {**value, **change.get(key, {})} if isinstance(value, dict) else change.get(key, value)
               for key, value in {**dict.fromkeys(change), **ARCHITECTURE}.items()}
    (tmp_path / "other.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=message):
        uniir_clip.identity(Params(str(tmp_path / "other.json"), seed=0, fusion="feature"))


def test_identity_knows_the_fusion_and_imports_no_torch(params: Params) -> None:
    score = uniir_clip.identity(Params(params.architecture, params.weights))
    feature = uniir_clip.identity(params)
    assert {**feature, "fusion": "score"} == score != feature
    assert "transformers" in uniir_clip.identity(Params(params.architecture, seed=0, fusion="feature"))
    code = ("import sys; from pipeline.encoders import uniir_clip, uniir_checkpoints;"
            f"uniir_clip.identity(uniir_clip.Params({params.architecture!r}, {params.weights!r}, fusion='feature'));"
            "print([name for name in ('torch', 'open_clip', 'transformers', 'PIL') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
