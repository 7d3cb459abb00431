"""UniIR CLIP_SF: its checkpoint's structure and names, its masked sum, its activation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from pipeline.encoders import Item, uniir_clip
from pipeline.encoders.clip_towers import read_architecture
from pipeline.encoders.uniir_clip import Params
from pipeline.support.errors import UserError

ARCHITECTURE = {
    "embed_dim": 24, "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}
TEXTS = ("a red circle", "", "find an image of the following: two blue squares above a star, at night")


def uniir_shapes(architecture: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of OpenAI's CLIP with a vision transformer, written down from its published layout."""
    vision, text, D = architecture["vision_cfg"], architecture["text_cfg"], architecture["embed_dim"]
    V, W, patch = vision["width"], text["width"], vision["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (text["context_length"], W), "text_projection": (W, D), "logit_scale": (),
        "token_embedding.weight": (text["vocab_size"], W), "ln_final.weight": (W,), "ln_final.bias": (W,),
        "visual.class_embedding": (V,), "visual.proj": (V, D), "visual.conv1.weight": (V, 3, patch, patch),
        "visual.positional_embedding": ((vision["image_size"] // patch) ** 2 + 1, V),
    }
    for norm in ("visual.ln_pre", "visual.ln_post"):
        shapes |= {f"{norm}.weight": (V,), f"{norm}.bias": (V,)}
    for tower, width, layers in (("", W, text["layers"]), ("visual.", V, vision["layers"])):
        for layer in range(layers):
            block = f"{tower}transformer.resblocks.{layer}"
            packed = f"{block}.attn.in_proj"
            shapes |= {f"{packed}_weight": (3 * width, width), f"{packed}_bias": (3 * width,)}
            for name, rows, columns in (("attn.out_proj", width, width), ("mlp.c_fc", 4 * width, width),
                                        ("mlp.c_proj", width, 4 * width)):
                shapes |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
    return shapes


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = uniir_shapes(ARCHITECTURE)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, state: dict[str, torch.Tensor]) -> Path:
    """Architecture files, and a checkpoint as UniIR's trainer saves it."""
    folder = tmp_path_factory.mktemp("uniir")
    (folder / "tiny.json").write_text(json.dumps(ARCHITECTURE))
    (folder / "gelu.json").write_text(json.dumps({**ARCHITECTURE, "quick_gelu": False}))
    prefixed = {f"clip_model.{name}": tensor for name, tensor in state.items()}
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    torch.save({
        "model": prefixed,
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-5, "betas": (0.9, 0.98), "params": [0]}]},
        "scheduler": {"T_max": 100, "_last_lr": [1e-5]},
        "config": OmegaConf.create({"model": {"name": "CLIP", "size": None}, "list": [1, "a", 0.5]}),
        "epoch": 3,
        "scaler": {"scale": 65536.0, "_growth_tracker": 12},
    }, folder / "clip_sf_tiny.pth")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def reference(architecture: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    import open_clip

    model = open_clip.CLIP(**architecture).eval()
    model.load_state_dict(state)
    return model


def items() -> list[Item]:
    rng = np.random.default_rng(3)
    pixels = [rng.integers(0, 255, (40, 50 + n, 3), dtype=np.uint8) for n in range(2)]
    images = [None, *(Image.fromarray(each) for each in pixels)]
    return [Item(text, image) for text in (None, *TEXTS) for image in images if text or image]


def masked_sums(model: Any, encoder: Any) -> np.ndarray:
    """UniIR's own arithmetic: both towers for every item, zeros for a missing image, then the masks."""
    rows = []
    with torch.no_grad():
        for item in items():
            tokens = encoder.tokenizer([item.text or ""])
            pixels = torch.zeros(1, 3, 32, 32) if item.image is None else encoder.images.transform(item.image)[None]
            text_mask, image_mask = float(item.text not in (None, "")), float(item.image is not None)
            rows.append(model.encode_text(tokens) * text_mask + model.encode_image(pixels) * image_mask)
    return torch.cat(rows).numpy()


def test_vectors_are_uniirs_masked_sums(folder: Path, state: dict[str, torch.Tensor]) -> None:
    params = Params(str(folder / "tiny.json"), str(folder / "clip_sf_tiny.pth"))
    encoder = uniir_clip.build(params, "cpu", "fp32")
    vectors = encoder.encode([encoder.prepare(item) for item in items()])
    expected = masked_sums(reference(ARCHITECTURE, state), encoder)
    assert vectors.dtype == np.float32 and vectors.shape == (len(items()), 24)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(vectors, expected, atol=2e-6 * np.abs(expected).max())


def test_quick_gelu_is_active(folder: Path, state: dict[str, torch.Tensor]) -> None:
    params = Params(str(folder / "tiny.json"), str(folder / "clip_sf_tiny.pth"))
    encoder = uniir_clip.build(params, "cpu", "fp32")
    vectors = encoder.encode([encoder.prepare(item) for item in items()])
    plain = masked_sums(reference({**ARCHITECTURE, "quick_gelu": False}, state), encoder)
    assert np.abs(vectors - plain).max(axis=1).min() > 1e-3  # every row differs under the other activation


def test_an_architecture_without_quick_gelu_is_refused(folder: Path) -> None:
    for architecture in (str(folder / "gelu.json"), "ViT-B-32"):
        with pytest.raises(UserError, match="QuickGELU"):
            uniir_clip.identity(Params(architecture, seed=0))


def test_safetensors_and_missing_prefix_give_the_same_vectors(folder: Path, tmp_path: Path,
                                                              state: dict[str, torch.Tensor]) -> None:
    prefixed = {f"clip_model.{name}": tensor for name, tensor in state.items()}
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    save_file(state, tmp_path / "bare.safetensors")
    files = (folder / "clip_sf_tiny.pth", tmp_path / "prefixed.safetensors", tmp_path / "bare.safetensors")
    architecture = str(folder / "tiny.json")
    encoders = [uniir_clip.build(Params(architecture, str(path)), "cpu", "fp32") for path in files]
    first, *others = [encoder.encode([encoder.prepare(item) for item in items()]) for encoder in encoders]
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("change, message", [
    ({"text_projection": None}, "'text_projection' is missing"),
    ({"t5_layers.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2)}, "'t5_layers.*not part"),
    ({"visual.conv1.weight": torch.ones(64, 3, 16, 16)}, r"'visual.conv1.weight' has shape \(64, 3, 16"),
])
def test_a_checkpoint_of_another_model_is_named(folder: Path, tmp_path: Path, state: dict[str, torch.Tensor],
                                                change: dict[str, Any], message: str) -> None:
    changed = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
    prefixed = {f"clip_model.{name}": tensor for name, tensor in changed.items()}
    torch.save({"model": prefixed}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        uniir_clip.build(Params(str(folder / "tiny.json"), str(tmp_path / "other.pth")), "cpu", "fp32")


@pytest.mark.parametrize("name, parameters", [("ViT-B-32-quickgelu", 151_277_313),
                                              ("ViT-L-14-quickgelu", 427_616_513)])
def test_the_published_sizes_have_uniirs_names_and_shapes(name: str, parameters: int) -> None:
    import open_clip

    architecture = read_architecture(name)
    with torch.device("meta"):  # names and shapes without the memory
        model = open_clip.CLIP(**architecture)
    defaults = {"vision_cfg": {"head_width": 64}, "text_cfg": {}}
    full = {**architecture, **{key: {**value, **architecture[key]} for key, value in defaults.items()}}
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == uniir_shapes(full)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameters


def test_identity_follows_content(folder: Path, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    architecture = str(folder / "tiny.json")
    save_file(state, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    save_file({**state, "logit_scale": torch.tensor(1.0)}, tmp_path / "c.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in "abc"]
    a, b, c = (uniir_clip.identity(Params(architecture, path)) for path in files)
    assert a == b != c
    json.dumps(a)
    seeded = [uniir_clip.identity(Params(architecture, seed=seed)) for seed in (0, 1)]
    assert seeded[0] != seeded[1]


def test_unknown_fusion_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="fusion 'sum' is not known"):
        uniir_clip.identity(Params(str(folder / "tiny.json"), seed=0, fusion="sum"))


def test_weights_or_seed_are_required(folder: Path) -> None:
    with pytest.raises(UserError, match="exactly one"):
        uniir_clip.build(Params(str(folder / "tiny.json")), "cpu", "fp32")


def test_identity_does_not_import_torch(folder: Path) -> None:
    architecture, weights = str(folder / "tiny.json"), str(folder / "clip_sf_tiny.pth")
    code = ("import sys; from pipeline.encoders import uniir_clip;"
            f"uniir_clip.identity(uniir_clip.Params({architecture!r}, {weights!r}));"
            "print([name for name in ('torch', 'open_clip', 'PIL') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
