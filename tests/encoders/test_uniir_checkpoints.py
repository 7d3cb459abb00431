"""UniIR's checkpoints: in with everything that its trainer saves, out with the same names and numbers."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.artifacts import file_sha256
from pipeline.encoders import Item, open_clip, uniir_blip, uniir_clip
from pipeline.encoders.blip_towers import STOCK as BLIP_SIZES
from pipeline.encoders.blip_towers import new_model as new_blip
from pipeline.encoders.clip_towers import read_architecture
from pipeline.encoders.uniir_checkpoints import (STOCK, Imported, check_fit, expected_shapes, export_checkpoint,
                                                 import_checkpoint)
from pipeline.encoders.uniir_clip import Params
from pipeline.pieces import load_encoder_choice
from pipeline.support.errors import UserError

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 64, "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 1},
    "text_cfg": {"context_length": 20, "vocab_size": 600, "width": 64, "heads": 2, "layers": 2},
}
FUSIONS = ("score", "feature")
LEFT_BEHIND = ["config", "optimizer", "scaler", "scheduler"]


class Malicious:
    """What a pickle from somewhere may hold: it calls a function of the reader's when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("architecture") / "tiny.json"
    path.write_text(json.dumps(ARCHITECTURE))
    return str(path)


def uniir_model(architecture: str, fusion: str, kind: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A model as UniIR's module names it: OpenAI's CLIP under `clip_model.`, the fusion layers beside it."""
    state = uniir_clip.new_uniir_model(read_architecture(architecture), fusion, seed=8).state_dict()
    return {name if name.startswith("t5_layers.") else f"clip_model.{name}": tensor.to(kind)
            for name, tensor in state.items()}


def whole(model: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of UniIR's whole structure."""
    moments = {number: {"step": torch.tensor(7.0), "exp_avg": torch.zeros_like(each), "exp_avg_sq": each ** 2}
               for number, each in enumerate(model.values())}
    groups = [{"lr": 1e-5, "betas": (0.9, 0.98), "params": list(moments)}]
    config = {"model": {"name": "CLIPScoreFusion", "size": None}, "dataloader_config": {"sizes": [1, 2.5, "a", True]}}
    return {"model": model, "optimizer": {"state": moments, "param_groups": groups},
            "scheduler": {"T_max": 100, "_last_lr": [1e-5]}, "config": OmegaConf.create(config), "epoch": 3,
            "scaler": {"scale": 65536.0, "_growth_tracker": 12}}


def saved(path: Path, payload: Any) -> Path:
    torch.save(payload, path)
    return path


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == each.dtype and torch.equal(found[name], each) for name, each in expected.items())


def encode(params: Params) -> np.ndarray:
    pixels = np.random.default_rng(3).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    encoder = uniir_clip.build(params, "cpu", "fp32")
    return encoder.encode([encoder.prepare(item) for item in (Item("a red circle", None), Item(None, image),
                                                              Item("two blue squares", image))])


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_there_and_back(architecture: str, fusion: str, kind: torch.dtype, tmp_path: Path) -> None:
    model = uniir_model(architecture, fusion, kind)
    source = saved(tmp_path / "published.pth", whole(model))
    found = import_checkpoint(source, tmp_path / "imported", "ours", architecture)
    choice = load_encoder_choice(str(found.yaml))
    assert (choice.name, choice.module, choice.params.fusion) == ("ours", "uniir_clip", fusion)
    export_checkpoint(choice.params, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert same(back["model"], model) and back["epoch"] == 0 and type(back["config"]) is dict
    export_checkpoint(choice.params, tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), model)
    paths = (source, found.weights, tmp_path / "back.pth", tmp_path / "back.safetensors")
    first, *others = [encode(Params(architecture, str(path), fusion=fusion)) for path in paths]
    assert np.abs(first).max() > 0.1 and np.isfinite(first).all()
    assert all(np.array_equal(first, other) for other in [*others, encode(choice.params)])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_is_written_and_told(architecture: str, fusion: str, tmp_path: Path) -> None:
    model = uniir_model(architecture, fusion)
    source = saved(tmp_path / "published.pth", whole(model))
    directory = tmp_path / "imported"
    found = import_checkpoint(source, directory, "ours", architecture)
    numbers = sum(tensor.numel() for tensor in model.values())
    assert found == Imported(directory / "ours.yaml", directory / "weights.safetensors",
                             f"sha256:{file_sha256(found.weights)}", len(model), numbers, LEFT_BEHIND)
    assert {path.name for path in directory.iterdir()} == {"architecture.json", "ours.yaml", "weights.safetensors"}
    assert same(load_file(found.weights), {name.removeprefix("clip_model."): each for name, each in model.items()})
    assert found.weights.stat().st_size < 4 * numbers + 20_000 < source.stat().st_size
    text = found.yaml.read_text()
    kind = {"score": "CLIP_SF", "feature": "CLIP_FF"}[fusion]
    assert text.startswith(f"# UniIR {kind}, imported from 'published.pth', epoch 3.\n# sha256:{file_sha256(source)}\n")
    assert yaml.safe_load(text) == {"encoder": "uniir_clip", "architecture": "./architecture.json", "fusion": fusion,
                                    "weights": "./weights.safetensors"}
    assert str(tmp_path) not in text
    assert found.weights.stat().st_mode == found.yaml.stat().st_mode  # whoever may read one may read the other


def test_an_export_is_no_larger_than_its_weights(architecture: str, tmp_path: Path) -> None:
    """A tensor that is a view of a larger file must not bring the file along."""
    model = uniir_model(architecture, "score")
    source = saved(tmp_path / "published.pth", whole(model))
    export_checkpoint(Params(architecture, str(source)), tmp_path / "back.pth")
    bytes_of_weights = sum(tensor.nbytes for tensor in model.values())
    assert bytes_of_weights < (tmp_path / "back.pth").stat().st_size < bytes_of_weights + 500 * len(model)


def test_training_leftovers_and_an_unread_vocabulary_are_dropped_and_told(architecture: str, tmp_path: Path) -> None:
    model = uniir_model(architecture, "feature")
    leftovers = {"query_queue": torch.zeros(64, 6), "new_ptr_queue": torch.zeros(1, dtype=torch.int64),
                 "clip_model_m.visual.proj": torch.zeros(2, 2), "t5_layers.embed_tokens.weight": torch.ones(9, 64)}
    source = saved(tmp_path / "published.pth", whole({**model, **leftovers}))
    found = import_checkpoint(source, tmp_path / "imported", "ours", architecture)
    told = sorted([*(leftovers.keys() - {"clip_model_m.visual.proj"}), "clip_model_m.*"])
    assert found.dropped == LEFT_BEHIND + told and found.tensors == len(model)
    choice = load_encoder_choice(str(found.yaml))
    export_checkpoint(choice.params, tmp_path / "back.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True)["model"], model)


@pytest.mark.parametrize("form", ["bare", "ddp", "state_dict", "safetensors", "legacy", "views", "shared"])
def test_other_forms_of_the_same_weights(architecture: str, form: str, tmp_path: Path) -> None:
    model = uniir_model(architecture, "score")
    plain = {name.removeprefix("clip_model."): each for name, each in model.items()}
    payloads = {"bare": plain, "ddp": {"model": {f"module.{name}": each for name, each in model.items()}},
                "state_dict": {"state_dict": model}, "safetensors": model, "legacy": {"model": model, "epoch": 1},
                "views": {"model": {name: torch.stack([each, each + 1])[0] for name, each in model.items()}},
                "shared": {"model": {**model, "clip_model.ln_final.bias": model["clip_model.ln_final.weight"]}}}
    source = tmp_path / ("source.safetensors" if form == "safetensors" else "source.pth")
    if form == "safetensors":
        save_file(model, source)
    else:
        torch.save(payloads[form], source, _use_new_zipfile_serialization=form != "legacy")
    found = import_checkpoint(source, tmp_path / "imported", "ours", architecture)
    if form == "shared":
        plain = {**plain, "ln_final.bias": plain["ln_final.weight"]}
    assert same(load_file(found.weights), plain) and found.dropped == []
    assert ("epoch 1" in found.yaml.read_text()) == (form == "legacy")


@pytest.mark.parametrize("place", ["model", "beside"])
def test_a_malicious_pickle_is_refused_and_not_run(architecture: str, place: str, tmp_path: Path) -> None:
    trap, model = Malicious(tmp_path / "touched"), uniir_model(architecture, "score")
    change = {"model": {**model, "extra": trap}} if place == "model" else {"scheduler": trap}
    source = saved(tmp_path / "bad.pth", {**whole(model), **change})
    with pytest.raises(UserError, match="refused: it asks for"):
        import_checkpoint(source, tmp_path / "imported", "ours", architecture)
    assert not trap.path.exists() and not (tmp_path / "imported").exists()
    pickle.loads(pickle.dumps(trap))
    assert trap.path.exists()  # it would have been run by a careless reader


BLIP: dict[str, Any] = {
    "image_size": 32, "patch_size": 16, "embed_dim": 32, "vision": {"width": 48, "layers": 1, "heads": 4},
    "text": {"width": 32, "layers": 1, "heads": 4, "vocabulary": 9, "positions": 20, "length": 12}}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "circle")
MADE_FOR_TRAINING = {"temp", "query_queue", "cand_queue", "idx_queue", "new_ptr_queue"}


def blip_model(fusion: str, architecture: dict[str, Any], queue: int) -> dict[str, torch.Tensor]:
    """A model as UniIR's module names it: towers and heads, their momentum twins, queues and the temperature."""
    online = {**new_blip(architecture, fusion, seed=8).state_dict(),
              "text_encoder.embeddings.position_ids": torch.arange(architecture["text"]["positions"])[None]}
    twins = {name.replace(".", "_m.", 1): tensor + 1 for name, tensor in online.items()}
    vectors = torch.ones(()).expand(architecture["embed_dim"], queue)
    return {**online, **twins, "temp": torch.tensor(0.1), "query_queue": vectors, "cand_queue": vectors,
            "idx_queue": torch.full((1, queue), -100), "new_ptr_queue": torch.zeros(1, dtype=torch.int64)}


def is_needed(name: str) -> bool:
    head, *rest = name.split(".")
    return not head.endswith("_m") and name not in MADE_FOR_TRAINING and rest[-1:] != ["position_ids"]


@pytest.fixture
def blip_architecture(tmp_path: Path) -> str:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    (tmp_path / "blip.json").write_text(json.dumps(BLIP))
    return str(tmp_path / "blip.json")


@pytest.mark.parametrize("fusion, own", [("score", ["text_proj_m.*", "vision_proj_m.*"]), ("feature", [])])
def test_blip_there_and_back(blip_architecture: str, fusion: str, own: list[str], tmp_path: Path) -> None:
    model = blip_model(fusion, BLIP, 12)
    needed = {name: tensor for name, tensor in model.items() if is_needed(name)}
    source = saved(tmp_path / "published.pth", whole(model))
    found = import_checkpoint(source, tmp_path / "imported", "ours", blip_architecture)
    assert same(load_file(found.weights), needed) and found.tensors == len(needed)
    assert found.dropped == LEFT_BEHIND + sorted([
        *MADE_FOR_TRAINING, *own, "text_encoder_m.*", "visual_encoder_m.*", "text_encoder.embeddings.position_ids"])
    text = found.yaml.read_text()
    kind = {"score": "BLIP_SF", "feature": "BLIP_FF"}[fusion]
    assert text.startswith(f"# UniIR {kind}, imported from 'published.pth', epoch 3.\n")
    assert yaml.safe_load(text) == {"encoder": "uniir_blip", "architecture": "./architecture.json", "fusion": fusion,
                                    "weights": "./weights.safetensors"}
    params = replace(load_encoder_choice(str(found.yaml)).params, tokenizer=str(tmp_path / "vocab.txt"))
    export_checkpoint(params, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert same({name: back["model"][name] for name in needed}, needed) and type(back["config"]) is dict
    export_checkpoint(params, tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), needed)
    image = Image.fromarray(np.random.default_rng(3).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    given = (Item("a red circle", None), Item(None, image), Item("blue", image))
    rows = []
    for path in (source, found.weights, tmp_path / "back.pth", tmp_path / "back.safetensors"):
        encoder = uniir_blip.build(replace(params, weights=str(path)), "cpu", "fp32")
        rows.append(encoder.encode([encoder.prepare(item) for item in given]))
    assert all(np.array_equal(rows[0], other) for other in rows[1:]) and np.abs(rows[0]).max() > 0


@pytest.mark.parametrize("fusion", FUSIONS)
def test_uniirs_own_blip_would_load_an_export_strictly(blip_architecture: str, fusion: str, tmp_path: Path) -> None:
    """Every name and shape, the twins equal to the weights, and no more bytes for all that than the weights have."""
    export_checkpoint(uniir_blip.Params(blip_architecture, seed=8, fusion=fusion), tmp_path / "random.pth")
    found = torch.load(tmp_path / "random.pth", weights_only=True)["model"]
    expected = blip_model(fusion, BLIP, 57600)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}
    positions = "text_encoder.embeddings.position_ids"
    online = {name: tensor for name, tensor in expected.items() if is_needed(name) or name == positions}
    assert same({name: found[name] for name in online}, online)
    assert same({name: found[name.replace(".", "_m.", 1)] for name in online}, online)
    number_of_bytes = sum(tensor.nbytes for tensor in online.values())
    assert (tmp_path / "random.pth").stat().st_size < number_of_bytes + 500 * len(expected)
    assert uniir_blip.own_names(found).keys() == {name for name in expected if is_needed(name)}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("size, queue", [("base", 57600), ("large", 57960)])
def test_published_sizes_of_blip_are_found(size: str, queue: int, fusion: str, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size without the memory: every tensor is one number, repeated."""
    monkeypatch.setattr("pipeline.encoders.uniir_checkpoints.save_safetensors", lambda _, path: path.touch())
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in blip_model(fusion, BLIP_SIZES[size], queue).items()}
    model = {name: torch.zeros((), dtype=torch.int64 if "_queue" in name and name[0] in "in" else None).expand(shape)
             for name, shape in shapes.items()}
    source = saved(tmp_path / f"blip_{size}.pth", {**whole({}), "model": model})
    found = import_checkpoint(source, tmp_path / "imported", "ours")
    written = yaml.safe_load(found.yaml.read_text())
    assert (written["encoder"], written["architecture"], written["fusion"]) == ("uniir_blip", size, fusion)
    state = {name: tensor for name, tensor in model.items() if is_needed(name)}
    params = uniir_blip.Params(size, seed=0, fusion=fusion)
    again = uniir_blip.training_state(state, params)
    assert {name: tensor.shape for name, tensor in again.items()} == shapes


def test_a_blip_of_another_size_is_held_against_the_closest(blip_architecture: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "tiny.pth", {"model": blip_model("feature", BLIP, 12)})
    with pytest.raises(UserError, match=r"fit none of base, large; base is closest(.|\n)*name it \(a JSON file\)"):
        import_checkpoint(source, tmp_path / "imported", "ours")
    changed = {name: each for name, each in blip_model("feature", BLIP, 12).items() if "blocks.0.norm1" not in name}
    source = saved(tmp_path / "damaged.pth", {"model": changed})
    with pytest.raises(UserError, match="with feature fusion(.|\n)*'visual_encoder.blocks.0.norm1.weight' is missing"):
        import_checkpoint(source, tmp_path / "imported", "ours", blip_architecture)
    assert not (tmp_path / "imported").exists()


def test_only_uniirs_encoders_are_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only UniIR's encoders"):
        export_checkpoint(open_clip.Params("ViT-B-32", seed=0), tmp_path / "back.pth")  # type: ignore[arg-type]
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize("change, message", [
    ({"clip_model.visual.proj": None}, "'visual.proj' is missing"),
    ({"clip_model.visual.proj": torch.zeros(3, 4)}, r"'visual.proj' has shape \(3, 4\), not \(64, 64\)"),
    ({"clip_model.other": torch.zeros(3)}, "'other' is not part of it"),
    ({"visual.proj": torch.zeros(64, 64)}, "'clip_model.visual.proj' is not part of it"),
    ({"t5_layers.final_layer_norm.weight": torch.zeros(64)}, "'t5_layers.final_layer_norm.weight' is not part of it"),
    ({"clip_model.logit_scale": torch.tensor(4)}, "'logit_scale' holds torch.int64"),
])
def test_what_does_not_fit_is_named_and_nothing_written(architecture: str, change: dict[str, Any], message: str,
                                                        tmp_path: Path) -> None:
    model = {name: each for name, each in {**uniir_model(architecture, "score"), **change}.items() if each is not None}
    source = saved(tmp_path / "other.pth", {"model": model})
    with pytest.raises(UserError, match=message):
        import_checkpoint(source, tmp_path / "imported", "ours", architecture)
    assert not (tmp_path / "imported").exists()


def test_many_misfits_are_counted(architecture: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "tiny.pth", {"model": uniir_model(architecture, "score")})
    with pytest.raises(UserError, match=r"fit none of ViT-B-32-quickgelu(.|\n)*and \d+ more(.|\n)*name it"):
        import_checkpoint(source, tmp_path / "imported", "ours")


def zeros(architecture: str, fusion: str) -> dict[str, torch.Tensor]:
    """A model of a published size that takes no memory, here or in a file: every tensor is one number, repeated."""
    expected = expected_shapes(Params(architecture, fusion=fusion))
    return {name if name.startswith("t5_") else f"clip_model.{name}": torch.zeros(()).expand(shape)
            for name, shape in expected.items()}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", STOCK)
def test_published_architectures_are_found(name: str, fusion: str, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.encoders.uniir_checkpoints.save_safetensors", lambda _, path: path.touch())
    source = saved(tmp_path / "large.pth", {**whole({}), "model": zeros(name, fusion)})
    found = import_checkpoint(source, tmp_path / "imported", "ours")
    written = yaml.safe_load(found.yaml.read_text())
    assert (written["architecture"], written["fusion"]) == (name, fusion)
    assert found.parameters == sum(each.numel() for each in zeros(name, fusion).values()) > 100_000_000


def test_a_damaged_published_checkpoint_is_held_against_the_closest(tmp_path: Path) -> None:
    model = zeros("ViT-L-14-quickgelu", "score")
    del model["clip_model.ln_final.bias"]
    source = saved(tmp_path / "large.pth", {"model": model})
    with pytest.raises(UserError, match=r"ViT-L-14-quickgelu is closest .*\n *'ln_final.bias' is missing\n"):
        import_checkpoint(source, tmp_path / "imported", "ours")


def test_importing_again_changes_nothing_and_nothing_is_replaced(architecture: str, tmp_path: Path) -> None:
    model = uniir_model(architecture, "score")
    source = saved(tmp_path / "published.pth", whole(model))
    first = import_checkpoint(source, tmp_path / "imported", "ours", architecture)
    before = {path.name: path.read_bytes() for path in (tmp_path / "imported").iterdir()}
    assert import_checkpoint(source, tmp_path / "imported", "ours", architecture) == first
    other = saved(tmp_path / "other.pth", whole({name: each + 1 for name, each in model.items()}))
    with pytest.raises(UserError, match="exists already, with other content"):
        import_checkpoint(other, tmp_path / "imported", "other", architecture)
    assert {path.name: path.read_bytes() for path in (tmp_path / "imported").iterdir()} == before


@pytest.mark.parametrize("name", ["", "../ours", "a/b", "a.b", "-a", "a b"])
def test_a_name_that_is_no_file_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot name an encoder"):
        import_checkpoint(tmp_path / "any.pth", tmp_path, name)


def test_a_line_break_in_the_files_name_stays_in_the_comment(architecture: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "a\nfusion: no.pth", whole(uniir_model(architecture, "score")))
    found = import_checkpoint(source, tmp_path / "imported", "ours", architecture)
    assert yaml.safe_load(found.yaml.read_text())["fusion"] == "score" and found.yaml.read_bytes().isascii()


def test_a_directory_that_is_a_file_is_refused(architecture: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "published.pth", whole(uniir_model(architecture, "score")))
    with pytest.raises(UserError, match="a file, not a directory"):
        import_checkpoint(source, source, "ours", architecture)


def test_an_export_replaces_nothing(architecture: str, tmp_path: Path) -> None:
    (tmp_path / "there.pth").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        export_checkpoint(Params(architecture, seed=0), tmp_path / "there.pth")
    assert (tmp_path / "there.pth").read_text() == "precious"


@pytest.mark.parametrize("fusion", FUSIONS)
def test_random_weights_can_be_exported(architecture: str, fusion: str, tmp_path: Path) -> None:
    export_checkpoint(Params(architecture, seed=8, fusion=fusion), tmp_path / "new" / "random.pth")
    found = torch.load(tmp_path / "new" / "random.pth", weights_only=True)["model"]
    assert same(found, uniir_model(architecture, fusion))


def test_an_export_of_weights_that_do_not_fit_is_refused(architecture: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "published.pth", whole(uniir_model(architecture, "score")))
    with pytest.raises(UserError, match=r"with feature fusion(.|\n)*'t5_layers.*is missing"):
        export_checkpoint(Params(architecture, str(source), fusion="feature"), tmp_path / "back.pth")
    with pytest.raises(UserError, match="exactly one"):
        export_checkpoint(Params(architecture), tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


def test_a_checkpoint_that_fits_is_accepted(architecture: str, tmp_path: Path) -> None:
    model = uniir_clip.own_names(uniir_model(architecture, "feature"))
    check_fit(model, Params(architecture, fusion="feature"), tmp_path)
    with pytest.raises(UserError, match="is not part of it"):
        check_fit(model, Params(architecture, fusion="score"), tmp_path)
