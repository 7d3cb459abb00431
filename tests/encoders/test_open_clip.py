"""The open_clip encoder: where weights come from, what its identity sees, which mistakes it names."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
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

from pipeline.encoders import Item, open_clip
from pipeline.encoders.checkpoints import CONFIGS
from pipeline.encoders.clip_towers import ClipEncoder, new_model, read_architecture
from pipeline.encoders.open_clip import Params
from pipeline.pieces import load_encoder_choice
from pipeline.support.errors import UserError

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
TEXT = {"context_length": 24, "vocab_size": 4096, "width": 32, "heads": 2, "layers": 2}
PLAIN: dict[str, Any] = {"embed_dim": 16, "quick_gelu": False, "vision_cfg": VISION, "text_cfg": TEXT}
FAMILIES = {"plain": PLAIN, "separate_text_tower": {**PLAIN, "custom_text": True}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("architectures")
    for name, architecture in FAMILIES.items():
        (folder / f"{name}.json").write_text(json.dumps(architecture))
    return folder


def items() -> list[Item]:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return [Item("a red circle", None), Item("two", None), Item(None, image), Item("a star", image)]


def encode(encoder: ClipEncoder, batch: list[Item]) -> np.ndarray:
    return encoder.encode([encoder.prepare(item) for item in batch])


# weights

def saved(folder: Path, name: str, state: dict[str, torch.Tensor]) -> str:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / name)
    return str(folder / name)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_files_restore_the_model(folder: Path, tmp_path: Path, family: str) -> None:
    architecture = str(folder / f"{family}.json")
    source = open_clip.build(Params(architecture, seed=9), "cpu", "fp32")
    state = source.model.state_dict()
    parallel = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 1, "state_dict": parallel}, tmp_path / "a.pt")
    expected = encode(source, items())
    for weights in (saved(tmp_path, "a.safetensors", state), str(tmp_path / "a.pt")):
        restored = open_clip.build(Params(architecture, weights), "cpu", "fp32")
        assert np.array_equal(encode(restored, items()), expected)


def test_the_text_towers_older_names_are_understood(folder: Path, tmp_path: Path) -> None:
    old = new_model(PLAIN, 9).state_dict()
    weights = saved(tmp_path, "old.safetensors", {**old, "input_resolution": torch.tensor(32)})
    architectures = [str(folder / f"{family}.json") for family in ("plain", "separate_text_tower")]
    vectors = [encode(open_clip.build(Params(architecture, weights), "cpu", "fp32"), items())
               for architecture in architectures]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_position_embeddings_are_never_stretched(folder: Path, tmp_path: Path) -> None:
    larger = new_model({**PLAIN, "vision_cfg": {**VISION, "image_size": 64}}, 9).state_dict()
    params = Params(str(folder / "plain.json"), saved(tmp_path, "larger.safetensors", larger))
    with pytest.raises(UserError, match=r"'visual.positional_embedding' has shape \(65, 32\), not \(17, 32"):
        open_clip.build(params, "cpu", "fp32")


def test_a_seed_is_repeatable_and_leaves_the_callers_generator_alone(folder: Path) -> None:
    encoder = open_clip.build(Params(str(folder / "plain.json"), seed=4), "cpu", "fp32")
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    again = open_clip.build(Params(str(folder / "plain.json"), seed=4), "cpu", "fp32")
    assert torch.equal(torch.rand(3), expected)
    assert np.array_equal(encode(again, items()), encode(encoder, items()))
    other = open_clip.build(Params(str(folder / "plain.json"), seed=5), "cpu", "fp32")
    assert np.abs(encode(other, items()) - encode(encoder, items())).max() > 0.01


# pretrained tags, with a stand-in for the hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_tag_brings_its_weights_at_its_commit_and_its_preprocessing(
        folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = saved(tmp_path, "hub.safetensors", new_model(PLAIN, 9).state_dict())
    tag = {"hf_hub": "lab/tiny/", "quick_gelu": False, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    asked: list[Any] = []

    def download(repository: str, file_name: str | None, revision: str) -> str:
        asked.append((repository, file_name, revision))
        return weights

    monkeypatch.setattr("open_clip.get_pretrained_cfg", lambda architecture, name: tag)
    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", download)
    params = Params(str(folder / "plain.json"), "lab", revision=COMMIT)
    built = open_clip.build(params, "cpu", "fp32")
    assert asked == [("lab/tiny", None, COMMIT)]
    white = built.prepare(Item(None, Image.new("RGB", (32, 32), "white"))).pixels
    assert white is not None and (built.images.normalised(torch.from_numpy(white[None])) == 1).all()  # (1 - 0.5) / 0.5
    expected = open_clip.build(Params(str(folder / "plain.json"), seed=9), "cpu", "fp32")
    assert np.array_equal(encode(built, items()[:2]), encode(expected, items()[:2]))
    tag["quick_gelu"] = True
    with pytest.raises(UserError, match="quick_gelu=True"):
        open_clip.build(params, "cpu", "fp32")
    open_clip.build(dataclasses.replace(params, quick_gelu=True), "cpu", "fp32")


def test_a_tokenizer_of_another_library_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: FOUND.get(name))
    with pytest.raises(UserError, match="pip install transformers"):
        open_clip.build(Params("ViT-B-16-SigLIP", seed=0), "cpu", "fp32")


FOUND = {"open_clip": importlib.util.find_spec("open_clip")}


def test_an_unreachable_hub_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise FileNotFoundError("no network")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", unreachable)
    with pytest.raises(UserError, match="cannot fetch timm/vit_base_patch32_clip_224.openai at 0123"):
        open_clip.build(Params("ViT-B-32-quickgelu", "openai", revision=COMMIT), "cpu", "fp32")


@pytest.mark.parametrize("params, message", [
    (Params("ViT-B-32", "openai"), "needs `revision`"),
    (Params("ViT-B-32", "openai", revision="main"), "needs `revision`"),
    (Params("ViT-B-32", "laion3b", revision=COMMIT), "no pretrained tag 'laion3b'"),
    (Params("ViT-B-32", "openai", revision=COMMIT), "trained with quick_gelu=True"),
    (Params("ViT-B-32", seed=0, revision=COMMIT), "`revision` goes with a pretrained tag"),
    (Params("ViT-B-32"), "exactly one"),
    (Params("ViT-B-32", "openai", seed=0), "exactly one"),
    (Params("ViT-B-32", "absent.safetensors"), "not found"),
    (Params("ViT-B32", seed=0), "nearest: ViT-B-32"),
    (Params("absent.json", seed=0), "architecture not found"),
])
def test_mistakes_are_user_errors(params: Params, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_clip.build(params, "cpu", "fp32")


@pytest.mark.parametrize("content, message", [
    ("{", "not JSON"), ("[]", "lacks embed_dim, vision_cfg"), ('{"embed_dim": 3}', "lacks vision_cfg"),
    (json.dumps({**PLAIN, "wings": 2}), "wings"),
])
def test_a_bad_architecture_file_is_a_user_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_clip.build(Params(str(tmp_path / "bad.json"), seed=0), "cpu", "fp32")


# identity

def test_identity_follows_content_not_names(folder: Path, tmp_path: Path) -> None:
    state = new_model(PLAIN, 9).state_dict()
    first = Params(str(folder / "plain.json"), saved(tmp_path, "a.safetensors", state))
    (tmp_path / "renamed.json").write_text(json.dumps(PLAIN, indent=4, sort_keys=True))
    same = Params(str(tmp_path / "renamed.json"), saved(tmp_path, "b.safetensors", state))
    os.utime(tmp_path / "b.safetensors", ns=(10**18, 10**18))
    changed = {**state, "logit_scale": torch.tensor(1.0)}
    others = [Params(str(folder / "plain.json"), saved(tmp_path, "c.safetensors", changed)),
              dataclasses.replace(first, quick_gelu=True),
              dataclasses.replace(first, architecture=str(folder / "separate_text_tower.json")),
              Params(first.architecture, seed=0), Params(first.architecture, seed=1),
              Params(first.architecture, "openai", revision=COMMIT),
              Params(first.architecture, "openai", revision=COMMIT[::-1])]
    assert open_clip.identity(first) == open_clip.identity(same)
    all_seen = [json.dumps(open_clip.identity(params), sort_keys=True) for params in (first, *others)]
    assert len(set(all_seen)) == len(all_seen)
    assert str(tmp_path) not in "".join(all_seen)


def test_identity_does_not_import_torch() -> None:
    code = ("import sys; from pipeline.encoders import open_clip;"
            f"open_clip.identity(open_clip.Params('ViT-B-32', 'openai', '{COMMIT}'));"
            "open_clip.identity(open_clip.Params('encoders/architectures/tiny_clip.json', seed=0));"
            "print([name for name in ('torch', 'open_clip', 'PIL', 'numpy') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# the configurations that come with the project

@pytest.mark.parametrize("path", sorted((CONFIGS / "encoders").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_name_real_parameters(path: Path) -> None:
    assert list(OmegaConf.load(path))[0] == "encoder"
    choice = load_encoder_choice(path.stem)
    if choice.module == "open_clip" or getattr(choice.params, "weights", "") is None:  # others name what they fetch
        assert "architecture" in choice.identity() or "seed" in choice.identity()


def test_the_quick_start_encoder_is_small() -> None:
    model = new_model(read_architecture("encoders/architectures/tiny_clip.json"), 0)
    assert 1_500_000 < sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
