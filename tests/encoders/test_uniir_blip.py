"""UniIR's BLIP_SF and BLIP_FF: the arithmetic written out over timm and plain torch, names, texts and images."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from pipeline.config import load
from pipeline.encoders import Item, blip_texts, uniir_blip
from pipeline.encoders.blip_towers import STOCK, empty_model, new_model, read_architecture
from pipeline.encoders.checkpoints import load_strictly
from pipeline.encoders.uniir_blip import Params
from pipeline.pieces import load_encoder_choice
from pipeline.plan import make_plan
from pipeline.run import run_experiment
from pipeline.support.errors import UserError

WORDS = ["red", "blue", "circle", "find", "an", "image", ",", ".", "un", "##able", "caf", "##es"]
LETTERS = [chr(number) for number in range(ord("a"), ord("z") + 1)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, *(f"##{each}" for each in LETTERS)]
LENGTH = 12
ARCHITECTURE: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "embed_dim": 32, "vision": {"width": 48, "layers": 2, "heads": 4},
    "text": {"width": 32, "layers": 3, "heads": 4, "vocabulary": len(VOCABULARY) + 2, "positions": 20,
             "length": LENGTH}}
FUSIONS = ("score", "feature")
TEXTS = ("a red circle", "", "blue",
         "Find an image, un\u00e0ble caf\u00e9 z \u0161 \u4e2d. blue [MASK] [ENC] circle and much more of it")
TOLERANCE = 1e-6


def published_shapes(architecture: dict[str, Any], fusion: str, queue: int = 12) -> dict[str, tuple[int, ...]]:
    """Every name and shape of UniIR's own module, written down from the published layout."""
    vision, text, D = architecture["vision"], architecture["text"], architecture["embed_dim"]
    V, W, patch = vision["width"], text["width"], architecture["patch_size"]

    def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, V), "visual_encoder.patch_embed.proj.weight": (V, 3, patch, patch),
        "visual_encoder.pos_embed": (1, (architecture["image_size"] // patch) ** 2 + 1, V),
        "visual_encoder.patch_embed.proj.bias": (V,), **norm("visual_encoder.norm", V)}
    for layer in range(vision["layers"]):
        block = f"visual_encoder.blocks.{layer}"
        shapes |= {**norm(f"{block}.norm1", V), **norm(f"{block}.norm2", V), **linear(f"{block}.attn.qkv", 3 * V, V),
                   **linear(f"{block}.attn.proj", V, V), **linear(f"{block}.mlp.fc1", 4 * V, V),
                   **linear(f"{block}.mlp.fc2", V, 4 * V)}
    start = "text_encoder.embeddings"
    shapes |= {f"{start}.position_ids": (1, text["positions"]), **norm(f"{start}.LayerNorm", W),
               f"{start}.word_embeddings.weight": (text["vocabulary"], W),
               f"{start}.position_embeddings.weight": (text["positions"], W)}
    for layer in range(text["layers"]):
        block = f"text_encoder.encoder.layer.{layer}"
        for attention, width in (("attention", W), ("crossattention", V)):
            shapes |= {**linear(f"{block}.{attention}.self.query", W, W),
                       **linear(f"{block}.{attention}.self.key", W, width),
                       **linear(f"{block}.{attention}.self.value", W, width),
                       **linear(f"{block}.{attention}.output.dense", W, W),
                       **norm(f"{block}.{attention}.output.LayerNorm", W)}
        shapes |= {**linear(f"{block}.intermediate.dense", 4 * W, W), **linear(f"{block}.output.dense", W, 4 * W),
                   **norm(f"{block}.output.LayerNorm", W)}
    if fusion == "feature":
        shapes |= linear("text_encoder.pooler.dense", W, W)
    else:
        shapes |= {**linear("vision_proj", D, V), **linear("text_proj", D, W)}
    twins = {re.sub(r"^(\w+)\.", r"\1_m.", name): shape for name, shape in shapes.items()}
    return {**shapes, **twins, "temp": (), "query_queue": (D, queue), "cand_queue": (D, queue),
            "idx_queue": (1, queue), "new_ptr_queue": (1,)}


def is_for_inference(name: str) -> bool:
    return re.fullmatch(r"(visual_encoder|text_encoder|vision_proj|text_proj)\..*(?<!position_ids)", name) is not None


def published(architecture: dict[str, Any], fusion: str, seed: int = 5) -> dict[str, torch.Tensor]:
    """A state as UniIR saves it; the image's embeddings are small, so that an epsilon of a norm can be seen."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in published_shapes(architecture, fusion).items():
        numbers = torch.randn(shape, generator=generator) * 0.12
        if "position_ids" in name:
            numbers = torch.arange(shape[1])[None]
        elif name in ("idx_queue", "new_ptr_queue"):
            numbers = torch.zeros(shape, dtype=torch.int64)
        elif re.search(r"norm\d?\.weight|LayerNorm\.weight", name):
            numbers = numbers + 1
        elif re.search(r"cls_token|pos_embed|patch_embed", name):
            numbers = numbers * 0.03
        found[name] = numbers
    return found


class Written:
    """UniIR's models written out: timm's vision transformer, BERT in plain torch, always padded to the full length."""

    def __init__(self, architecture: dict[str, Any], fusion: str, state: dict[str, torch.Tensor], twist: str = ""):
        from timm.models.vision_transformer import VisionTransformer

        self.text, self.fusion, self.state, self.twist = architecture["text"], fusion, state, twist
        vision = architecture["vision"]
        self.vision = VisionTransformer(
            img_size=architecture["image_size"], patch_size=architecture["patch_size"], embed_dim=vision["width"],
            depth=vision["layers"], num_heads=2 if twist == "vision heads" else vision["heads"], num_classes=0,
            global_pool="", norm_layer=partial(torch.nn.LayerNorm, eps=1e-5 if twist == "epsilon" else 1e-6))
        self.vision.load_state_dict({name.removeprefix("visual_encoder."): each for name, each in state.items()
                                     if name.startswith("visual_encoder.")}, strict=True)
        self.vision.eval()

    def linear(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(hidden, hidden.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-12)

    def attention(self, name: str, hidden: torch.Tensor, others: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = 8 if self.twist == "text heads" else self.text["heads"]
        query, key, value = (
            self.linear(f"{name}.self.{part}", given).unflatten(-1, (heads, -1)).transpose(0, 1)
            for part, given in (("query", hidden), ("key", others), ("value", others)))
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5 + mask
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
        return self.norm(f"{name}.output.LayerNorm", self.linear(f"{name}.output.dense", mixed) + hidden)

    def bert(self, numbers: list[int], image: torch.Tensor | None) -> torch.Tensor:
        if self.twist == "first token" and image is not None:
            numbers = [len(VOCABULARY) + 1, *numbers[1:]]  # [ENC], as LAVIS does
        padding = LENGTH - len(numbers)
        start = "text_encoder.embeddings"
        positions = range(1, LENGTH + 1) if self.twist == "positions" else range(LENGTH)
        hidden = (self.state[f"{start}.word_embeddings.weight"][[*numbers, *[0] * padding]]
                  + self.state[f"{start}.position_embeddings.weight"][list(positions)])
        hidden = self.norm(f"{start}.LayerNorm", hidden)
        mask = torch.tensor([0.0] * len(numbers) + [0.0 if self.twist == "mask" else -10000.0] * padding)
        if self.twist == "causal":
            mask = mask + torch.full((LENGTH, LENGTH), -10000.0).triu(1)
        for layer in range(self.text["layers"]):
            block = f"text_encoder.encoder.layer.{layer}"
            hidden = self.attention(f"{block}.attention", hidden, hidden, mask)
            if image is not None and not (self.twist == "a layer without" and layer == 1):
                hidden = self.attention(f"{block}.crossattention", hidden, image, torch.zeros(()))
            inner = self.linear(f"{block}.intermediate.dense", hidden)
            inner = F.gelu(inner, approximate="tanh" if self.twist == "gelu" else "none")
            hidden = self.norm(f"{block}.output.LayerNorm", self.linear(f"{block}.output.dense", inner) + hidden)
        return hidden[0]

    @torch.no_grad()
    def vector(self, numbers: list[int], pixels: torch.Tensor, has_text: bool, has_image: bool) -> np.ndarray:
        """One row: both towers always, zeros for a missing image, masks of 0 or 1."""
        states = self.vision.forward_features(pixels[None])[0]
        if self.fusion == "feature":
            if self.twist == "nothing for no image" and not has_image:
                states = torch.zeros_like(states)
            pooled = self.linear("text_encoder.pooler.dense", self.bert(numbers, states))
            return (pooled if self.twist == "tanh" else pooled.tanh()).numpy()
        text = self.linear("text_proj", self.bert(numbers, None)) * float(has_text)
        return (text + self.linear("vision_proj", states[0]) * float(has_image)).numpy()


def unnormalised(image: Image.Image | None, size: int) -> torch.Tensor:
    """UniIR's transform in evaluation, from its definition; no image is zeros after it."""
    from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

    if image is None:
        return torch.zeros(3, size, size)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    transform = Compose([Resize((size, size), InterpolationMode.BICUBIC), ToTensor(), Normalize(mean, std)])
    return torch.as_tensor(transform(image))


@lru_cache
def bert(vocabulary: Path) -> Any:
    """transformers' tokenizer with BLIP's additions."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(str(vocabulary), do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


def bert_numbers(vocabulary: Path, text: str) -> list[int]:
    return list(bert(vocabulary)(text, truncation=True, max_length=LENGTH)["input_ids"])


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(3)
    return [Image.fromarray(random.integers(0, 256, (40, 50 + 30 * n, 3), np.uint8)) for n in range(2)]


def items() -> list[Item]:
    return [Item(text, image) for text in (None, *TEXTS) for image in (None, *pictures())]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def architecture_of(fusion: str) -> dict[str, Any]:
    return {**ARCHITECTURE, "embed_dim": 20} if fusion == "score" else ARCHITECTURE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vocabulary, architectures, and checkpoints as UniIR's trainer saves them."""
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    for fusion in FUSIONS:
        (folder / f"{fusion}.json").write_text(json.dumps(architecture_of(fusion)))
        config = {"model": {"name": "BLIP", "queue_size": 12, "size": None}, "list": [1, "a", 0.5]}
        moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
        torch.save({"model": published(architecture_of(fusion), fusion), "config": OmegaConf.create(config),
                    "optimizer": {"state": moments, "param_groups": [{"lr": 1e-5, "params": [0]}]},
                    "scheduler": {"T_max": 100}, "epoch": 3, "scaler": {"scale": 65536.0}}, folder / f"{fusion}.pth")
    return folder


def parameters(folder: Path, fusion: str) -> Params:
    return Params(str(folder / f"{fusion}.json"), str(folder / f"{fusion}.pth"), fusion=fusion,
                  tokenizer=str(folder / "vocab.txt"))


def built(folder: Path, fusion: str, precision: str = "fp32", **changed: Any) -> Any:
    return uniir_blip.build(replace(parameters(folder, fusion), **changed), "cpu", precision)


def vectors_of(encoder: Any, given: list[Item]) -> np.ndarray:
    found: np.ndarray = encoder.encode([encoder.prepare(item) for item in given])
    return found


@lru_cache(maxsize=None)
def written(folder: Path, fusion: str, twist: str = "") -> np.ndarray:
    architecture = architecture_of(fusion)
    model = Written(architecture, fusion, published(architecture, fusion), twist)
    rows = []
    for item in items():
        has_text = bool(item.text) or item.image is None
        numbers = bert_numbers(folder / "vocab.txt", item.text or "")
        pixels = unnormalised(item.image, architecture["image_size"])
        rows.append(model.vector(numbers, pixels, has_text, item.image is not None))
    return np.stack(rows)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_vectors_are_uniirs(folder: Path, fusion: str) -> None:
    encoder = built(folder, fusion)
    expected = written(folder, fusion)
    found = vectors_of(encoder, items())
    assert found.dtype == np.float32 and found.shape == (len(items()), encoder.dimension)
    assert encoder.dimension == architecture_of(fusion)["embed_dim"] and np.abs(expected).max() > 0.5
    bound = TOLERANCE * max(1, np.abs(expected).max())
    assert np.abs(found - expected).max() <= bound
    alone = np.concatenate([vectors_of(encoder, [item]) for item in items()])
    assert np.abs(alone - expected).max() <= bound


@pytest.mark.parametrize("fusion, twist", [
    *((fusion, twist) for fusion in FUSIONS
      for twist in ("epsilon", "vision heads", "text heads", "positions", "mask", "causal", "gelu")),
    ("feature", "first token"), ("feature", "a layer without"), ("feature", "nothing for no image"),
    ("feature", "tanh")])
def test_a_wrong_model_would_be_seen(folder: Path, fusion: str, twist: str) -> None:
    """Each mistake moves some vector by fifty times the tolerance at least."""
    expected = written(folder, fusion)
    assert np.abs(written(folder, fusion, twist) - expected).max() > 50 * TOLERANCE * max(1, np.abs(expected).max())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_batch_mates_and_their_order_change_nothing(folder: Path, fusion: str) -> None:
    encoder = built(folder, fusion)
    given = items() * 3  # more images than go through the tower at once
    expected = vectors_of(encoder, given)
    order = np.random.default_rng(0).permutation(len(given))
    assert np.abs(vectors_of(encoder, [given[number] for number in order]) - expected[order]).max() < TOLERANCE * 10
    assert encoder.encode([]).shape == (0, encoder.dimension)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_missing_text_is_the_empty_one(folder: Path, fusion: str) -> None:
    encoder = built(folder, fusion)
    image = pictures()[0]
    nothing, empty, silent, alone = vectors_of(encoder, [Item(None, None), Item("", None), Item("", image),
                                                         Item(None, image)])
    np.testing.assert_array_equal(nothing, empty)
    np.testing.assert_array_equal(silent, alone)
    assert np.abs(nothing).max() > 0.01 and np.isfinite(nothing).all()


def test_only_what_an_item_needs_is_run(folder: Path) -> None:
    calls: list[str] = []
    given = [Item("red", None), Item("blue circle", None)]
    for fusion in FUSIONS:
        encoder = built(folder, fusion)
        for name in ("visual_encoder", "text_encoder"):
            tower = getattr(encoder.model, name)
            tower.register_forward_hook(lambda *_, fusion=fusion, name=name: calls.append(f"{fusion} {name}"))
        vectors_of(encoder, given)
        vectors_of(encoder, given)
        if fusion == "score":
            vectors_of(encoder, [Item(None, pictures()[0])])
    assert calls == [*["score text_encoder"] * 2, "score visual_encoder", "feature visual_encoder",
                     *["feature text_encoder"] * 2]  # the zero image once


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_half_precision_is_near(folder: Path, fusion: str, precision: str) -> None:
    exact, found = (vectors_of(built(folder, fusion, each), items())
                    for each in ("fp32", precision))
    assert found.dtype == np.float32 and 0 < np.abs(found - exact).max() < 0.1 * np.abs(exact).max()


def test_images_are_squashed_as_in_uniir(folder: Path) -> None:
    encoder = built(folder, "score")
    assert encoder.image_size == (32, 32)
    for image in (*pictures(), Image.new("RGB", (1, 300), "red")):
        prepared = encoder.prepare(Item(None, image))
        assert prepared.tokens is None and prepared.pixels.dtype == np.uint8
        found = encoder.images.normalised(torch.from_numpy(prepared.pixels[None]))[0]
        assert torch.equal(found, unnormalised(image, 32))


@pytest.mark.parametrize("text", [*TEXTS, "red " * 40, "[CLS] [dec] [DEC]x[ENC]", "\u202e\u0000\ud55c\U0001f600e\u0301",
                                  "x" * 300, "RED.blue", " \t\n"])
def test_texts_are_berts(folder: Path, text: str) -> None:
    encoder = built(folder, "score")
    tokens = encoder.prepare(Item(text, None)).tokens
    assert tokens.dtype == np.int64 and list(tokens) == bert_numbers(folder / "vocab.txt", text)
    assert tokens[0] == 2 and tokens[-1] == 3 and len(tokens) <= LENGTH


def test_a_long_text_is_cut_before_its_end_marker(folder: Path) -> None:
    encoder = built(folder, "score")
    long, cut = (encoder.prepare(Item(" ".join(["red", "blue"] * count), None)).tokens for count in (200, 5))
    assert len(long) == LENGTH and np.array_equal(long, cut)
    assert (long[-1], encoder.prepare(Item("[DEC]", None)).tokens[1]) == (3, len(VOCABULARY))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("size, counts", [("base", (947, 943)), ("large", (1235, 1231))])
def test_the_published_sizes_have_uniirs_names_and_shapes(size: str, counts: tuple[int, int], fusion: str) -> None:
    """The numbers of names are those of UniIR's own module, counted there."""
    shapes = published_shapes(STOCK[size], fusion, queue=57960)
    assert len(shapes) == counts[FUSIONS.index(fusion)]
    with torch.device("meta"):  # names and shapes without the memory
        model = new_model(STOCK[size], fusion)
        made_up = {name: torch.empty(shape) for name, shape in shapes.items()}
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == {name: shape for name, shape in shapes.items() if is_for_inference(name)}
    if (size, fusion) == ("large", "feature"):  # twelve bytes each, with the twins and queues, are the 7.49 GB
        assert round(sum(tensor.numel() for tensor in model.state_dict().values()) / 1e6, 1) == 445.9
    load_strictly(model, uniir_blip.own_names(made_up), Path("made-up.pth"))
    config = model.text_encoder.config
    assert (config.num_attention_heads, config.encoder_hidden_size) == (12, 768 if size == "base" else 1024)


def test_the_published_settings_are_uniirs() -> None:
    text = {"width": 768, "layers": 12, "heads": 12, "vocabulary": 30524, "positions": 512, "length": 100}
    for size, vision in (("base", {"width": 768, "layers": 12, "heads": 12}),
                         ("large", {"width": 1024, "layers": 24, "heads": 16})):
        assert read_architecture(size) == {"image_size": 224, "patch_size": 16, "embed_dim": 768, "vision": vision,
                                           "text": text}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_other_forms_of_the_same_weights(folder: Path, fusion: str, tmp_path: Path) -> None:
    state = published(architecture_of(fusion), fusion)
    save_file({name: tensor for name, tensor in state.items() if is_for_inference(name)}, tmp_path / "own.safetensors")
    save_file(state, tmp_path / "all.safetensors")
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "ddp.pth")
    files = (folder / f"{fusion}.pth", tmp_path / "own.safetensors", tmp_path / "all.safetensors", tmp_path / "ddp.pth")
    first, *others = [vectors_of(built(folder, fusion, weights=str(path)), items()) for path in files]
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_empty_model_becomes_the_one_it_is_loaded_with(fusion: str) -> None:
    architecture = architecture_of(fusion)
    model, copy = new_model(architecture, fusion, seed=3), empty_model(architecture, fusion)
    copy.load_state_dict(model.state_dict())
    for name in ("named_parameters", "named_buffers"):
        expected, found = dict(getattr(model, name)()), dict(getattr(copy, name)())
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert not copy.training and not any(each.training for each in copy.modules())


@pytest.mark.parametrize("change, message", [
    ({"visual_encoder.norm.bias": None}, "'visual_encoder.norm.bias' is missing"),
    ({"text_encoder.encoder.layer.1.crossattention.self.key.weight": torch.ones(32, 32)},
     r"'text_encoder.encoder.layer.1.crossattention.self.key.weight' has shape \(32, 32\), not \(32, 48\)"),
    ({"visual_encoder.blocks.2.norm1.bias": torch.ones(48)}, "'visual_encoder.blocks.2.norm1.bias' is not part"),
    ({"itm_head.bias": torch.ones(2)}, "'itm_head.bias' is not part"),
])
def test_a_checkpoint_of_another_model_is_named(folder: Path, tmp_path: Path, change: dict[str, Any],
                                                message: str) -> None:
    changed = {**published(architecture_of("score"), "score"), **change}
    torch.save({"model": {name: tensor for name, tensor in changed.items() if tensor is not None}},
               tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        built(folder, "score", weights=str(tmp_path / "other.pth"))


def test_weights_of_the_other_fusion_are_told(folder: Path) -> None:
    for fusion, other in (FUSIONS, FUSIONS[::-1]):
        with pytest.raises(UserError, match=f"of {other} fusion, not of {fusion} fusion"):
            built(folder, fusion, weights=str(folder / f"{other}.pth"))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_cut_file_is_refused(folder: Path, tmp_path: Path, share: float) -> None:
    whole = (folder / "feature.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(UserError, match="cut short"):
        built(folder, "feature", weights=str(tmp_path / "cut.pth"))


def test_a_seed_is_a_model(folder: Path) -> None:
    first, again, other = [vectors_of(built(folder, "feature", weights=None, seed=seed), items())
                           for seed in (1, 1, 2)]
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_identity_follows_content(folder: Path, tmp_path: Path) -> None:
    given = parameters(folder, "feature")
    expected = uniir_blip.identity(given)
    json.dumps(expected)
    for name in ("vocab.txt", "feature.json", "feature.pth"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    moved = replace(parameters(tmp_path, "feature"), tokenizer=str(tmp_path))  # the directory with the vocabulary
    assert uniir_blip.identity(moved) == expected
    state = published(ARCHITECTURE, "feature", seed=6)
    torch.save({"model": state}, tmp_path / "other.pth")
    (tmp_path / "other.txt").write_text("\n".join([*VOCABULARY[:-1], "other"]) + "\n")
    (tmp_path / "other.json").write_text(json.dumps({**ARCHITECTURE, "patch_size": 4}))
    changes: list[dict[str, Any]] = [
        {"weights": str(tmp_path / "other.pth")}, {"tokenizer": str(tmp_path / "other.txt")},
        {"architecture": str(tmp_path / "other.json")}, {"fusion": "score"}, {"weights": None, "seed": 1},
        {"weights": None, "seed": 2}]
    found = [uniir_blip.identity(replace(given, **change)) for change in changes]
    assert len({json.dumps(each, sort_keys=True) for each in [expected, *found]}) == len(changes) + 1
    assert not any(str(tmp_path) in json.dumps(each) for each in found)


def test_the_same_vocabulary_is_the_same_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = uniir_blip.identity(Params("base", seed=0))
    assert fetched["vocabulary"] == blip_texts.CONTENT == f"sha256:{blip_texts.CONTENT[7:]}"
    monkeypatch.setattr(blip_texts, "weights_hash", lambda path: blip_texts.CONTENT)
    entries = [*VOCABULARY, *(f"word{number}" for number in range(30522 - len(VOCABULARY)))]
    (tmp_path / "vocab.txt").write_text("\n".join(entries) + "\n")
    assert uniir_blip.identity(Params("base", seed=0, tokenizer=str(tmp_path))) == fetched


def test_identity_does_not_import_torch(folder: Path) -> None:
    code = ("import sys; from pipeline.encoders import uniir_blip;"
            f"uniir_blip.identity(uniir_blip.{parameters(folder, 'feature')!r});"
            "print([name for name in ('torch', 'transformers', 'tokenizers', 'PIL') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_vocabulary_that_cannot_be_fetched_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="cannot fetch BERT's vocabulary(.|\n)*as `tokenizer`"):
        blip_texts.new_tokenizer(None, 100)


def test_a_fetched_vocabulary_is_compared_and_pinned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(*place: str, revision: str) -> str:
        asked.append((*place, revision))
        return str(folder / "vocab.txt")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    with pytest.raises(UserError, match="not the vocabulary of google-bert"):
        blip_texts.new_tokenizer(None, 100)
    assert asked == [("google-bert/bert-base-uncased", "vocab.txt", blip_texts.REVISION)]
    assert re.fullmatch("[0-9a-f]{40}", blip_texts.REVISION)
    monkeypatch.setattr(blip_texts, "weights_hash", lambda path: blip_texts.CONTENT)
    assert blip_texts.new_tokenizer(None, 100).encode("red").ids == [2, VOCABULARY.index("red"), 3]


@pytest.mark.parametrize("content, message", [
    ("\n".join(VOCABULARY[:-1]), "78 .*not the 81"), ("a\nb", r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
    ("\n".join([*VOCABULARY, "red"]), "same line twice"), ("\n".join([*VOCABULARY[:-2], "[DEC]", "[ENC]"]), "already"),
    (b"\xff\xfe\x00", "UTF-8")])
def test_a_wrong_vocabulary_is_refused(folder: Path, tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "vocab.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = message.replace("78", str(len(VOCABULARY) - 1)).replace("81", str(len(VOCABULARY) + 2))
    for run in (uniir_blip.identity, lambda params: uniir_blip.build(params, "cpu", "fp32")):
        with pytest.raises(UserError, match=message):
            run(replace(parameters(folder, "score"), tokenizer=str(tmp_path / "vocab.txt")))
    with pytest.raises(UserError, match="vocabulary not found"):
        uniir_blip.identity(replace(parameters(folder, "score"), tokenizer=str(tmp_path / "none.txt")))


def test_odd_characters_are_entries_of_their_own(tmp_path: Path) -> None:
    """Python's splitlines would part the file at some of them, and every number behind would be wrong."""
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY[:5], "\u2028", "\x85", "\x1c", "red"]), encoding="utf-8")
    assert blip_texts.new_tokenizer(str(tmp_path), 9).encode("red").ids == [2, 8, 3]
    assert blip_texts.vocabulary_identity(str(tmp_path), 11).startswith("sha256:")


@pytest.mark.parametrize("change, message", [
    ({"patch_size": None}, "lacks 'patch_size'"), ({"pach_size": 8}, "'pach_size' is not part .*nearest: patch_size"),
    ({"vision": {"width": 48, "layers": 2}}, "lacks 'vision.heads'"), ({"text": 3}, "'text' is not a mapping"),
    ({"image_size": 30}, "no multiple of patch_size"), ({"embed_dim": 0}, "'embed_dim' is not a whole number"),
    ({"vision": {"width": 50, "layers": 2, "heads": 4}}, "50 is no multiple of its 4 heads"),
    ({"text": {**ARCHITECTURE["text"], "length": 21}}, "21 is not between 3 and text.positions")])
def test_a_wrong_architecture_is_told(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    changed = {key: value for key, value in {**ARCHITECTURE, **change}.items() if value is not None}
    (tmp_path / "wrong.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=message):
        read_architecture(str(tmp_path / "wrong.json"))


def test_wrong_choices_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for changed, message in (({"fusion": "sum"}, "fusion 'sum' is not known"), ({"seed": 1}, "exactly one"),
                             ({"architecture": "huge"}, "'huge' is not one of"), ({"weights": None}, "exactly one"),
                             ({"architecture": str(tmp_path / "broken.json")}, "not JSON"),
                             ({"fusion": "feature"}, "as wide as its text tower, 32, not embed_dim 20")):
        with pytest.raises(UserError, match=message):
            uniir_blip.build(replace(parameters(folder, "score"), **changed), "cpu", "fp32")
    with pytest.raises(UserError, match="precision 'int8'"):
        built(folder, "score", "int8")


@pytest.mark.parametrize("kind, fusion", [("sf", "score"), ("ff", "feature")])
@pytest.mark.parametrize("size", ["base", "large"])
def test_the_shipped_configurations_are_of_published_models(kind: str, fusion: str, size: str,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIIR_CHECKPOINT_DIR", "/nowhere/checkpoint")
    choice = load_encoder_choice(f"blip_{kind}_{size}")
    weights = f"/nowhere/checkpoint/BLIP_{kind.upper()}/blip_{kind}_{size}.pth"
    assert (choice.module, choice.params) == ("uniir_blip", Params(size, weights, fusion=fusion))
    with pytest.raises(UserError, match="weights file not found"):
        choice.identity()


def test_mini_mbeir_runs_from_end_to_end(folder: Path, small_arguments: list[str], tmp_path: Path) -> None:
    paths = [folder / f"tiny_{fusion}.yaml" for fusion in FUSIONS]
    for fusion, path in zip(FUSIONS, paths):
        path.write_text(f"# A tiny BLIP.\nencoder: uniir_blip\narchitecture: ./{fusion}.json\nfusion: {fusion}\n"
                        f"weights: ./{fusion}.pth\ntokenizer: ./vocab.txt\n")
    names = ",".join(map(str, paths))
    arguments = [f"work_dir={tmp_path}", *small_arguments, f"encoders=[{names}]", "pools=[union]"]
    experiment = load("quickstart", arguments)
    run_experiment(experiment, [], say=lambda *_: None)
    scored = make_plan(experiment).scored
    assert len(scored) == 24 and all(cell.job.artifact.is_complete() for cell in scored)
