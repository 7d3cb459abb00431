"""Visualized BGE against its definition, written out in plain products over the published names; both text models."""

# Shapes: B items, L tokens of a text, P patches, S positions, D dimensions, H heads, N numbers of a head.

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, normalize, silu

from pipeline.config import load
from pipeline.encoders import Item, visualized_bge
from pipeline.encoders.checkpoints import CONFIGS
from pipeline.encoders.visualized_bge import Params
from pipeline.encoders.visualized_bge_towers import load_model, new_model, read_vision
from pipeline.plan import make_plan
from pipeline.run import run_experiment
from pipeline.support.errors import UserError

TOWER = {"architecture": "eva02_base_patch16_clip_224", "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2,
         "num_heads": 2, "num_classes": 24}
POSITIONS = 60  # of a text; an image takes 16 of them
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = ("a red circle above two blue squares", "night", "", "   ", "caf\u00e9 \u4e2d\u6587 \U0001f600 \u0130\u00df",
         "words " * 200)
VARIANTS = ("base", "m3")

EXACT = 1e-6  # vectors have length 1
SEEN = 5e-6  # what a wrong model must differ by at least


def text_config(variant: str, **sizes: Any) -> dict[str, Any]:
    usual = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 48, "max_position_embeddings": POSITIONS}
    own: dict[str, Any] = {"model_type": "bert", "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0}
    if variant == "m3":
        own = {"model_type": "xlm-roberta", "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1,
               "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": POSITIONS + 2}
    return {**usual, **own, **sizes}


def published_shapes(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the authors' files have them."""
    D, M, depth = text["hidden_size"], text["intermediate_size"], vision["depth"]
    grid = vision["img_size"] // vision["patch_size"]
    P, K, N = grid * grid, int(D * 8 / 3), D // vision["num_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "bge_embeddings.word_embeddings.weight": (text["vocab_size"], D),
        "bge_embeddings.position_embeddings.weight": (text["max_position_embeddings"], D),
        "bge_embeddings.token_type_embeddings.weight": (text["type_vocab_size"], D),
        "bge_embeddings.LayerNorm.weight": (D,), "bge_embeddings.LayerNorm.bias": (D,),
        "model_visual.logit_scale": (),
        "model_visual.visual.cls_token": (1, 1, D), "model_visual.visual.pos_embed": (1, P + 1, D),
        "model_visual.visual.patch_embed.proj.weight": (D, 3, vision["patch_size"], vision["patch_size"]),
        "model_visual.visual.patch_embed.proj.bias": (D,)}

    def products(place: str, **rows_and_columns: tuple[int, int]) -> None:
        for name, (rows, columns) in rows_and_columns.items():
            full = f"{place}.{name.replace('__', '.')}"
            shapes.update({f"{full}.weight": (rows, columns), f"{full}.bias": (rows,)})

    def norms(place: str, **widths: int) -> None:
        for name, width in widths.items():
            full = f"{place}.{name.replace('__', '.')}"
            shapes.update({f"{full}.weight": (width,), f"{full}.bias": (width,)})

    for layer in range(text["num_hidden_layers"]):
        place = f"bge_encoder.layer.{layer}"
        products(f"{place}.attention", self__query=(D, D), self__key=(D, D), self__value=(D, D), output__dense=(D, D))
        products(place, intermediate__dense=(M, D), output__dense=(D, M))
        norms(place, attention__output__LayerNorm=D, output__LayerNorm=D)
    products("bge_pooler", dense=(D, D))
    for block in range(depth):
        place = f"model_visual.visual.blocks.{block}"
        shapes.update({f"{place}.attn.{name}": (D,) for name in ("q_bias", "v_bias")})
        shapes.update({f"{place}.attn.{name}_proj.weight": (D, D) for name in "qkv"})
        shapes.update({f"{place}.attn.rope.freqs_{name}": (P, N) for name in ("cos", "sin")})
        products(place, attn__proj=(D, D), mlp__w1=(K, D), mlp__w2=(K, D), mlp__w3=(D, K))
        norms(place, norm1=D, norm2=D, attn__inner_attn_ln=D, mlp__ffn_ln=K)
    shapes.update({f"model_visual.visual.rope.freqs_{name}": (P, N) for name in ("cos", "sin")})
    norms("model_visual.visual", norm=D)
    products("model_visual.visual", head=(vision["num_classes"], D))
    shapes.update({"visual_proj.weight": (D, D), "visual_proj.bias": (D,)})
    return shapes


def rotary_tables(grid: int, N: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [P, N] in fp64: half of a head's numbers turn with the row, half with the column."""
    frequencies = 10000.0 ** -(torch.arange(0, N // 2, 2, dtype=torch.float64) / (N // 2))
    angles = torch.outer(torch.arange(grid, dtype=torch.float64) / grid * 16, frequencies).repeat_interleave(2, 1)
    rows, columns = angles[:, None].expand(grid, grid, -1), angles[None].expand(grid, grid, -1)
    both_PN = torch.cat([rows, columns], dim=-1).reshape(grid * grid, N)
    return both_PN.cos(), both_PN.sin()


def published_state(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Tensor]:
    """Half-precision numbers, none of them 0 or 1; tables as the authors compute them, one memory for all blocks."""
    generator = torch.Generator().manual_seed(7)
    cosines, sines = (table.half() for table in rotary_tables(vision["img_size"] // vision["patch_size"], 16))
    state = {}
    for name, shape in published_shapes(text, vision).items():
        around = 1.0 if "norm" in name.lower() and name.endswith("weight") or "_ln.weight" in name else 0.0
        width = 0.5 if "embed" in name or ".q_proj" in name or ".k_proj" in name else 0.2
        state[name] = (around + width * torch.randn(shape, generator=generator)).half()
        if "freqs" in name:
            state[name] = cosines if name.endswith("cos") else sines
    return state


class Definition:
    """The model, one item at a time, in fp64. `wrong` makes one of the mistakes that are easy to make."""

    def __init__(self, state: dict[str, Tensor], text: dict[str, Any], vision: dict[str, Any], wrong: str = ""):
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.text, self.vision, self.wrong = text, vision, wrong
        if wrong == "exact rotary tables":
            cosines, sines = rotary_tables(vision["img_size"] // vision["patch_size"], 16)
            self.state |= {name: cosines if name.endswith("cos") else sines for name in state if "freqs" in name}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return layer_norm(x, weight.shape, weight, self.state[f"{name}.bias"], eps)

    def heads(self, x_SD: Tensor, count: int) -> Tensor:
        return x_SD.unflatten(-1, (count, -1)).transpose(0, 1)

    def attention(self, q_HSN: Tensor, k_HSN: Tensor, v_HSN: Tensor) -> Tensor:
        scores_HSS = q_HSN @ k_HSN.transpose(1, 2) / q_HSN.shape[-1] ** 0.5
        return (scores_HSS.softmax(-1) @ v_HSN).transpose(0, 1).flatten(1)

    def turned(self, x_HSN: Tensor, place: str) -> Tensor:
        """The first position, the class token's, stays as it is."""
        first, patches = x_HSN[:, :1], x_HSN[:, 1:]
        partners = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).flatten(-2)
        cosines, sines = self.state[f"{place}.freqs_cos"], self.state[f"{place}.freqs_sin"]
        return torch.cat([first, patches * cosines + partners * sines], dim=1)

    def tower(self, pixels_CHW: Tensor) -> Tensor:
        place, heads = "model_visual.visual", self.vision["num_heads"]
        weight = self.state[f"{place}.patch_embed.proj.weight"]
        patches = conv2d(pixels_CHW[None], weight, self.state[f"{place}.patch_embed.proj.bias"], weight.shape[-1])
        x = torch.cat([self.state[f"{place}.cls_token"][0], patches[0].flatten(1).T])
        x = x + self.state[f"{place}.pos_embed"][0]
        for number in range(self.vision["depth"]):
            block = f"{place}.blocks.{number}"
            y, attn = self.norm(x, f"{block}.norm1", 1e-6), f"{block}.attn"
            q = self.linear(y, f"{attn}.q_proj") + self.state[f"{attn}.q_bias"]
            k = self.linear(y, f"{attn}.k_proj")
            v = self.linear(y, f"{attn}.v_proj") + self.state[f"{attn}.v_bias"]
            q, k = (self.turned(self.heads(each, heads), f"{attn}.rope") for each in (q, k))
            y = self.attention(q, k, self.heads(v, heads))
            x = x + self.linear(self.norm(y, f"{attn}.inner_attn_ln", 1e-6), f"{attn}.proj")
            y = self.norm(x, f"{block}.norm2", 1e-6)
            y = silu(self.linear(y, f"{block}.mlp.w1")) * self.linear(y, f"{block}.mlp.w2")
            x = x + self.linear(self.norm(y, f"{block}.mlp.ffn_ln", 1e-6), f"{block}.mlp.w3")
        return self.norm(x, f"{place}.norm", 1e-6) if self.wrong == "last norm of the tower" else x

    def embedded(self, words_SD: Tensor, positions: Sequence[int], has_type: bool = True) -> Tensor:
        place = "bge_embeddings"
        x = words_SD + self.state[f"{place}.position_embeddings.weight"][list(positions)]
        if has_type:
            x = x + self.state[f"{place}.token_type_embeddings.weight"][0]
        return self.norm(x, f"{place}.LayerNorm", self.text["layer_norm_eps"])

    def read(self, x: Tensor) -> Tensor:
        eps, heads = self.text["layer_norm_eps"], self.text["num_attention_heads"]
        for layer in range(self.text["num_hidden_layers"]):
            place = f"bge_encoder.layer.{layer}"
            q, k, v = (self.heads(self.linear(x, f"{place}.attention.self.{name}"), heads)
                       for name in ("query", "key", "value"))
            y = self.linear(self.attention(q, k, v), f"{place}.attention.output.dense")
            x = self.norm(x + y, f"{place}.attention.output.LayerNorm", eps)
            y = self.linear(gelu(self.linear(x, f"{place}.intermediate.dense")), f"{place}.output.dense")
            x = self.norm(x + y, f"{place}.output.LayerNorm", eps)
        return x

    def vector(self, tokens: Sequence[int], pixels_CHW: Tensor | None) -> Tensor:
        words = self.state["bge_embeddings.word_embeddings.weight"][list(tokens)]
        L = len(tokens)
        if pixels_CHW is None:
            first = 2 if self.text["model_type"] == "xlm-roberta" else 0
            return normalize(self.read(self.embedded(words, range(first, first + L)))[0], dim=0)
        states = self.tower(pixels_CHW)
        patches = self.linear(states if self.wrong == "class token kept" else states[1:], "visual_proj")
        P, shift = len(patches), {"positions one later": 1, "positions of RoBERTa": 2}.get(self.wrong, 0)
        of_words, of_patches = [0, *range(P + 1, P + L)], range(1, P + 1)
        if self.wrong == "text first":
            of_words, of_patches = list(range(L)), range(L, L + P)
        texts = self.embedded(words, [place + shift for place in of_words])
        images = self.embedded(patches, [place + shift for place in of_patches], self.wrong == "types of patches")
        return normalize(self.read(torch.cat([texts[:1], images, texts[1:]]))[0], dim=0)

    def vectors(self, encoder: Any, items: Sequence[Item]) -> np.ndarray:
        found = []
        for item in items:
            image = None if item.image is None else encoder.images.transform(item.image).double()
            tokens = encoder.tokenizer(item.text or "")["input_ids"]
            limit = POSITIONS if image is None else POSITIONS - 16
            kept = tokens if len(tokens) <= limit else [*tokens[:limit - 1], tokens[-1]]
            found.append(self.vector(kept, image))
        return torch.stack(found).numpy()


def write_tokenizer(variant: str, folder: Path) -> None:
    from transformers import BertTokenizer, XLMRobertaTokenizer

    if variant == "base":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
        BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
        return
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0),
              *((letter, -3.0) for letter in LETTERS), ("<mask>", 0.0)]
    XLMRobertaTokenizer(vocab=pieces).save_pretrained(folder)


def write_model(variant: str, folder: Path) -> Path:
    """A text model's config and tokenizer, an image tower, and weights as the authors publish them."""
    text = text_config(variant)
    (folder / "text").mkdir(parents=True)
    write_tokenizer(variant, folder / "text")
    (folder / "text/config.json").write_text(json.dumps(text))
    (folder / "vision.json").write_text(json.dumps(TOWER))
    torch.save(published_state(text, TOWER), folder / "weights.pth")
    return folder


def params_of(folder: Path, **changes: Any) -> Params:
    return Params(**{"text_model": str(folder / "text"), "vision": str(folder / "vision.json"),
                     "weights": str(folder / "weights.pth"), **changes})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Read only."""
    return {variant: write_model(variant, tmp_path_factory.mktemp("vbge") / variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def encoders(folders: dict[str, Path]) -> dict[str, Any]:
    return {variant: visualized_bge.build(params_of(folders[variant]), "cpu", "fp32") for variant in VARIANTS}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def definition(variant: str, wrong: str = "") -> Definition:
    text = text_config(variant)
    return Definition(published_state(text, TOWER), text, TOWER, wrong)


def images() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
            for height, width in ((40, 53), (20, 31))]


def items() -> list[Item]:
    return [Item(text, image) for text in (None, *TEXTS) for image in (None, *images())]


def pictured() -> list[Item]:
    return [item for item in items() if item.image is not None]


def encode(encoder: Any, batch: Sequence[Item]) -> np.ndarray:
    found: np.ndarray = encoder.encode([encoder.prepare(item) for item in batch])
    return found


# the definition

@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_are_those_of_the_definition(variant: str, encoders: dict[str, Any]) -> None:
    expected = definition(variant).vectors(encoders[variant], items())
    vectors = encode(encoders[variant], items())
    assert vectors.dtype == np.float32 and vectors.shape == (len(items()), 32)
    assert np.abs(vectors - expected).max() <= EXACT
    distances = 1 - np.unique(expected.round(9), axis=0) @ expected.T
    assert np.sort(distances, axis=1)[:, 5].min() > 1e-4  # items really differ: three of 18 are the empty text


@pytest.mark.parametrize("wrong", ["class token kept", "types of patches", "positions one later",
                                   "positions of RoBERTa", "last norm of the tower", "text first",
                                   "exact rotary tables"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_usual_mistakes_would_be_seen(variant: str, wrong: str, encoders: dict[str, Any]) -> None:
    mixed = [item for item in pictured() if len(item.text or "") < 50]  # no text is at the last position
    mistaken = definition(variant, wrong).vectors(encoders[variant], mixed)
    assert np.abs(encode(encoders[variant], mixed) - mistaken).max(axis=1).min() > SEEN


@pytest.mark.parametrize("variant", VARIANTS)
def test_train_mode_would_be_seen(variant: str, folders: dict[str, Path], encoders: dict[str, Any]) -> None:
    encoder = visualized_bge.build(params_of(folders[variant]), "cpu", "fp32")
    assert not any(module.training for module in encoder.model.modules())
    encoder.model.train()
    assert np.abs(encode(encoder, items()) - encode(encoders[variant], items())).max(axis=1).min() > SEEN


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_but_the_unused_ones_matters(variant: str, folders: dict[str, Path], tmp_path: Path,
                                                  encoders: dict[str, Any]) -> None:
    """Zeroed one by one; so none is loaded into the wrong place or not at all."""
    state = {name: tensor.clone() for name, tensor in published_state(text_config(variant), TOWER).items()}
    model, mixed = encoders[variant].model, [Item("a red circle", images()[0])]
    before, prepared = encode(encoders[variant], mixed), [encoders[variant].prepare(mixed[0])]
    silent = set()
    for name in state:
        model.load_state_dict({**state, name: torch.zeros_like(state[name])})
        if np.array_equal(encoders[variant].encode(prepared), before):
            silent.add(name)
    model.load_state_dict(state)
    assert np.array_equal(encoders[variant].encode(prepared), before)
    in_blocks = {name for name in state if ".attn.rope." in name}  # the tower's own table is read in every block
    assert silent == {"bge_pooler.dense.weight", "bge_pooler.dense.bias", "model_visual.logit_scale",
                      *(f"model_visual.visual.{part}.{kind}" for part in ("norm", "head")
                        for kind in ("weight", "bias")), *in_blocks}


# the contract

@pytest.mark.parametrize("variant", VARIANTS)
def test_neither_batch_mates_nor_order_matter(variant: str, encoders: dict[str, Any]) -> None:
    together = encode(encoders[variant], items())
    alone = np.concatenate([encode(encoders[variant], [item]) for item in items()])
    shuffled = np.random.default_rng(0).permutation(len(items()))
    reordered = encode(encoders[variant], [items()[place] for place in shuffled])
    assert np.abs(together - alone).max() <= EXACT
    assert np.abs(together[shuffled] - reordered).max() <= EXACT


@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_have_length_one_and_no_text_is_the_empty_text(variant: str, encoders: dict[str, Any]) -> None:
    encoder, image = encoders[variant], images()[0]
    vectors = encode(encoder, [Item(None, None), Item("", None), Item(None, image), Item("", image)])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() <= EXACT and np.abs(vectors[2] - vectors[3]).max() <= EXACT
    assert encoder.encode([]).shape == (0, 32)


def test_only_the_towers_an_item_needs_are_run(encoders: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoders["base"]
    sizes: list[int] = []
    tower = encoder.model.visual.forward_intermediates

    def counted(pixels: Tensor, **options: Any) -> Any:
        sizes.append(len(pixels))
        return tower(pixels, **options)

    monkeypatch.setattr(encoder.model.visual, "forward_intermediates", counted)
    encode(encoder, [Item("a", None), Item(None, None)])
    assert sizes == []
    encode(encoder, [Item("a", None), Item("b", images()[0]), Item(None, images()[1])])
    assert sizes == [2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_long_text_is_cut_to_what_the_positions_hold(variant: str, encoders: dict[str, Any]) -> None:
    encoder, text = encoders[variant], "abcdefg " * 100
    alone, beside = encoder.prepare(Item(text, None)), encoder.prepare(Item(text, images()[0]))
    assert (len(alone.tokens), len(beside.tokens)) == (POSITIONS, POSITIONS - 16)
    end = encoder.tokenizer("")["input_ids"][-1]
    assert alone.tokens[-1] == beside.tokens[-1] == end  # the second marker is never cut


def test_limits_of_ones_own(folders: dict[str, Path]) -> None:
    encoder = visualized_bge.build(params_of(folders["base"], text_tokens=9, text_tokens_with_image=7), "cpu", "fp32")
    tokens = [encoder.prepare(Item("abcdefg " * 9, image)).tokens for image in (None, images()[0])]
    assert [len(each) for each in tokens] == [9, 7]
    for change in ({"text_tokens": POSITIONS + 1}, {"text_tokens_with_image": POSITIONS - 15}, {"text_tokens": 2}):
        with pytest.raises(UserError, match="this model can have 3 to"):
            visualized_bge.build(params_of(folders["base"], **change), "cpu", "fp32")


def test_prepared_items_are_small_and_picklable(encoders: dict[str, Any]) -> None:
    prepared = encoders["base"].prepare(pictured()[0])
    assert prepared.pixels.dtype == np.uint8 and prepared.pixels.shape == (32, 32, 3)
    copied = pickle.loads(pickle.dumps(prepared))
    assert all(np.array_equal(one, other) for one, other in zip(prepared, copied))
    assert encoders["base"].image_size == (32, 32) and encoders["base"].dimension == 32


@pytest.mark.parametrize("size", [(500, 333), (224, 224), (97, 301), (1, 40)])
def test_pixels_are_those_of_the_published_transform(size: tuple[int, int]) -> None:
    """The shortest side to 224 with PIL's bicubic filter, the centre of that, OpenAI's mean and deviation."""
    from pipeline.encoders.clip_images import ImageInput

    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    width, height = size
    wide = (224, int(224 * height / width)) if width <= height else (int(224 * width / height), 224)
    resized = image.resize(wide, Image.Resampling.BICUBIC)
    left, top = (round((length - 224) / 2) for length in wide)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    inputs = ImageInput((224, 224), None, "cpu")
    assert np.array_equal(inputs.cut(image), expected)
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    normalised = inputs.normalised(torch.from_numpy(expected[None].copy()))[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(normalised, (expected / 255 - mean) / deviation, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision, nearly", [("bf16", 0.05), ("fp16", 0.01)])
def test_lower_precisions_are_near(variant: str, precision: str, nearly: float, folders: dict[str, Path],
                                   encoders: dict[str, Any]) -> None:
    vectors = encode(visualized_bge.build(params_of(folders[variant]), "cpu", precision), items())
    assert vectors.dtype == np.float32
    assert 0 < np.abs(vectors - encode(encoders[variant], items())).max() < nearly


# files

def full_sizes(variant: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if variant == "base":
        text = text_config("base", vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                           intermediate_size=3072, max_position_embeddings=512)
        return text, {"img_size": 224, "patch_size": 16, "depth": 12, "num_heads": 12, "num_classes": 512}
    text = text_config("m3", vocab_size=250002, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                       intermediate_size=4096, max_position_embeddings=8194)
    return text, {"img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 16, "num_classes": 768}


@pytest.mark.parametrize("variant, tower, count, parameters", [
    ("base", "eva02_base_patch16_clip_224", 488, 196_335_873),
    ("m3", "eva02_large_patch14_clip_224", 956, 872_909_505)])
def test_the_published_sizes_have_the_published_names_and_shapes(variant: str, tower: str, count: int,
                                                                 parameters: int) -> None:
    text, vision = full_sizes(variant)
    with torch.device("meta"):  # names and shapes without the memory
        model = new_model(text, read_vision(tower), 0)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == published_shapes(text, vision) and len(shapes) == count
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert published_shapes(text, vision)["model_visual.visual.blocks.0.mlp.w1.weight"][0] == (
        2048 if variant == "base" else 2730)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rotary_tables_are_rounded_as_in_the_files(variant: str, folders: dict[str, Path]) -> None:
    drawn = new_model(text_config(variant), TOWER, 0).state_dict()
    for name, rounded in published_state(text_config(variant), TOWER).items():
        if "freqs" in name:
            assert torch.equal(drawn[name], rounded.float())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_model_has_all_that_a_drawn_one_has(variant: str, folders: dict[str, Path]) -> None:
    """It is made without memory first: what no file holds must not be left as it happened to be."""
    drawn = new_model(text_config(variant), TOWER, 0)
    loaded = load_model(text_config(variant), TOWER, folders[variant] / "weights.pth")
    buffers = dict(loaded.named_buffers())
    assert len(buffers) == 4 and all(torch.equal(buffer, buffers[name]) for name, buffer in drawn.named_buffers())
    state = published_state(text_config(variant), TOWER)
    saved = loaded.state_dict()
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name].float()) for name in state)


def test_safetensors_and_old_position_ids_give_the_same_vectors(folders: dict[str, Path], tmp_path: Path,
                                                                encoders: dict[str, Any]) -> None:
    state = {name: tensor.clone() for name, tensor in published_state(text_config("base"), TOWER).items()}
    save_file(state, tmp_path / "same.safetensors")
    torch.save({**state, "bge_embeddings.position_ids": torch.arange(POSITIONS)[None]}, tmp_path / "old.pth")
    for name in ("same.safetensors", "old.pth"):
        encoder = visualized_bge.build(params_of(folders["base"], weights=str(tmp_path / name)), "cpu", "fp32")
        assert np.array_equal(encode(encoder, items()), encode(encoders["base"], items()))


@pytest.mark.parametrize("change, message", [
    ({"visual_proj.bias": None}, "'visual_proj.bias' is missing"),
    ({"model_visual.visual.blocks.1.mlp.ffn_ln.weight": None}, "'model_visual.visual.blocks.1.mlp.ffn_ln.weight' is m"),
    ({"model_visual.visual.blocks.1.attn.rope.freqs_cos": None}, "blocks.1.attn.rope.freqs_cos' is missing"),
    ({"model_visual.visual.blocks.2.norm1.weight": torch.ones(32)}, "'model_visual.*blocks.2.norm1.*not part"),
    ({"model_visual.visual.blocks.0.attn.q_bias": torch.ones(31)}, r"blocks.0.attn.q_bias' has shape \(31,\), not"),
    ({"bge_embeddings.word_embeddings.weight": torch.ones(65, 32)}, r"has shape \(65, 32\), not \(64, 32\)"),
])
def test_weights_of_another_model_are_named(folders: dict[str, Path], tmp_path: Path, change: dict[str, Any],
                                            message: str) -> None:
    state = {**published_state(text_config("base"), TOWER), **change}
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        visualized_bge.build(params_of(folders["base"], weights=str(tmp_path / "other.pth")), "cpu", "fp32")


def test_a_cut_file_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = (folders["base"] / "weights.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        visualized_bge.build(params_of(folders["base"], weights=str(tmp_path / "cut.pth")), "cpu", "fp32")


def test_the_weights_of_one_variant_do_not_fit_the_other(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="'bge_embeddings.position_embeddings.weight' has shape"):
        weights = str(folders["m3"] / "weights.pth")
        visualized_bge.build(params_of(folders["base"], weights=weights), "cpu", "fp32")


# mistakes

def changed(folder: Path, tmp_path: Path, **config: Any) -> Params:
    """The same model, another config.json."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    text = json.loads((copy / "text/config.json").read_text())
    (copy / "text/config.json").write_text(json.dumps({**text, **config}))
    return params_of(copy, weights=None, seed=0)


@pytest.mark.parametrize("config, message", [
    ({"model_type": "roberta"}, "'roberta' is not the text model"),
    ({"vocab_size": 20}, "the tokenizer has 57 tokens, the text model 20"),
    ({"hidden_size": 64}, "the image tower is 32 wide, the text model 64"),
    ({"max_position_embeddings": 18}, "another image tower"),
    ({"num_attention_heads": 5}, "transformers cannot make this text model"),
    ({"hidden_act": "cosine"}, "transformers cannot make this text model"),
])
def test_text_models_that_cannot_be_are_refused(folders: dict[str, Path], tmp_path: Path, config: dict[str, Any],
                                                message: str) -> None:
    with pytest.raises(UserError) as raised:
        visualized_bge.build(changed(folders["base"], tmp_path, **config), "cpu", "fp32")
    assert message in str(raised.value)


@pytest.mark.parametrize("vision, message", [
    ({**TOWER, "architecture": "vit_base_patch16_224"}, "is not one of Visualized BGE"),
    ({**TOWER, "pretrained": True}, "'pretrained' is not a size"),
    ([1], "not a JSON object"),
    ({"architecture": [1]}, "is not one of Visualized BGE"),
    ({**TOWER, "num_heads": 5}, "timm cannot make this image tower"),
])
def test_image_towers_that_cannot_be_are_refused(folders: dict[str, Path], tmp_path: Path, vision: Any,
                                                 message: str) -> None:
    (tmp_path / "vision.json").write_text(json.dumps(vision))
    params = params_of(folders["base"], weights=None, seed=0, vision=str(tmp_path / "vision.json"))
    with pytest.raises(UserError, match=message):
        visualized_bge.build(params, "cpu", "fp32")


def test_a_text_model_without_tokenizer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    params = changed(folders["base"], tmp_path)
    tokenizer = Path(params.text_model) / "tokenizer.json"
    without_markers = {**json.loads(tokenizer.read_text()), "post_processor": None}
    tokenizer.write_text(json.dumps(without_markers))
    (tokenizer.parent / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "[CLS]", "sep_token": "[SEP]"}))
    with pytest.raises(UserError, match="between two markers"):
        visualized_bge.build(params, "cpu", "fp32")
    tokenizer.write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        visualized_bge.build(params, "cpu", "fp32")
    tokenizer.unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        visualized_bge.build(params, "cpu", "fp32")


def test_names_and_precisions_that_are_not_known_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="eva02_base_patch16_clip_224"):
        visualized_bge.identity(params_of(folders["base"], vision="eva02_base_patch16_clip_448"))
    with pytest.raises(UserError, match="exactly one"):
        visualized_bge.build(params_of(folders["base"], weights=None), "cpu", "fp32")
    with pytest.raises(UserError, match="needs `revision`"):
        visualized_bge.identity(params_of(folders["base"], text_model="BAAI/bge-m3"))
    with pytest.raises(UserError, match="'tf32' is not known"):
        visualized_bge.build(params_of(folders["base"]), "cpu", "tf32")


# fingerprints

def test_identity_follows_content(folders: dict[str, Path], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(folders["base"], moved)
    (moved / "vision.json").rename(moved / "tower.json")
    first = visualized_bge.identity(params_of(folders["base"]))
    again = visualized_bge.identity(params_of(moved, vision=str(moved / "tower.json")))
    assert first == again and str(tmp_path) not in json.dumps(first)
    others = [visualized_bge.identity(params_of(folders["m3"])),
              visualized_bge.identity(params_of(folders["base"], text_tokens=30)),
              visualized_bge.identity(params_of(folders["base"], text_tokens_with_image=30)),
              *(visualized_bge.identity(params_of(folders["base"], weights=None, seed=seed)) for seed in (0, 1))]
    (moved / "tower.json").write_text(json.dumps({**TOWER, "depth": 3}))
    others.append(visualized_bge.identity(params_of(moved, vision=str(moved / "tower.json"))))
    (moved / "text/config.json").write_text(json.dumps(text_config("base", layer_norm_eps=1e-6)))
    others.append(visualized_bge.identity(params_of(moved, vision=str(folders["base"] / "vision.json"))))
    assert len({json.dumps(each, sort_keys=True) for each in (first, *others)}) == 1 + len(others)


def test_random_weights_follow_the_seed(folders: dict[str, Path]) -> None:
    found = [encode(visualized_bge.build(params_of(folders["m3"], weights=None, seed=seed), "cpu", "fp32"), items())
             for seed in (0, 0, 1)]
    assert np.array_equal(found[0], found[1]) and np.abs(found[0] - found[2]).max() > 0.01


def test_identity_does_not_import_torch(folders: dict[str, Path]) -> None:
    code = ("import sys; from pipeline.encoders import visualized_bge as module;"
            f"module.identity({params_of(folders['m3'])!r});"
            "print([name for name in ('torch', 'transformers', 'timm', 'PIL', 'numpy') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code.replace("Params(", "module.Params(")], capture_output=True,
                          text=True, check=True)
    assert done.stdout == "[]\n"


# the whole pipeline

@pytest.mark.parametrize("variant", VARIANTS)
def test_shipped_configurations_name_pinned_text_models(variant: str) -> None:
    from omegaconf import OmegaConf

    fields: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"encoders/visualized_bge_{variant}.yaml"))
    assert fields.pop("encoder") == "visualized_bge"
    params = Params(**fields)
    from pipeline.encoders.model_directories import directory_identity
    assert directory_identity(params.text_model, params.revision)["repository"] == params.text_model
    assert read_vision(params.vision)["num_classes"] == {"base": 512, "m3": 768}[variant]


def test_mini_m_beir_from_end_to_end(folders: dict[str, Path], small_arguments: list[str], tmp_path: Path) -> None:
    piece = folders["base"] / "tiny_visualized_bge.yaml"
    lines = ["encoder: visualized_bge", f"text_model: {folders['base'] / 'text'}", "vision: ./vision.json",
             "weights: ./weights.pth"]
    piece.write_text("# Two layers, two blocks.\n" + "\n".join(lines) + "\n")
    overrides = [f"work_dir={tmp_path}", *small_arguments, f"encoders=[{piece}]", "embed.loaders=2"]
    experiment = load("quickstart", overrides)
    run_experiment(experiment, [], say=lambda *_: None)
    scored = make_plan(experiment).scored
    assert len(scored) == 24 and all(cell.job.artifact.is_complete() for cell in scored)
