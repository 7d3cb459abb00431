"""Tiny architectures of LAVIS's kinds, a vocabulary, and weights of which no bias is 0 and no norm is 1."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.encoders import Item

WORDS = ("a the of in on and photo picture dog cat red blue square circle star two large above left night find image "
         "caption that matches").split()
MARKS = {"blip": 2, "albef": 0, "blip2": 1, "blip2_clip": 1}
TEXTS = ("a red circle", "", "find the image that matches: TWO Blue squares, above a star!!! at night #3",
         "\u00e9t\u00e9 \u72ac")


def vocabulary(folder: Path) -> Path:
    """A vocab.txt that can spell ASCII."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *characters, *(f"##{each}" for each in characters)]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(words)) + "\n")
    return folder / "vocab.txt"


def architecture(name: str, words: int) -> dict[str, Any]:
    """Of "blip", "albef", "blip2" or "blip2_clip" (its image tower is CLIP's)."""
    text = {"vocab_size": words + MARKS[name], "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48, "hidden_act": "gelu", "max_position_embeddings": 40, "layer_norm_eps": 1e-12,
            "initializer_range": 0.3, "pad_token_id": 0}
    vision: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    if name == "blip2":
        vision |= {"kind": "eva_vit", "mlp_ratio": 4.3637, "qkv_bias": True, "layer_norm_eps": 1e-6}
    if name == "blip2_clip":
        vision = {"kind": "clip_vit", "input_resolution": 32, "patch_size": 8, "width": 48, "layers": 3, "heads": 4}
    if name in ("blip2", "blip2_clip"):
        text |= {"query_length": 5, "cross_attention_freq": 2}
    else:
        text |= {"add_type_embeddings": False, "add_cross_attention": True}
    return {"embed_dim": 24, "vision": vision, "text": {**text, "fusion_layer": 1} if name == "albef" else text}


def write_architecture(folder: Path, name: str, **changes: Any) -> str:
    """A JSON file, and the vocabulary beside it."""
    words = len(vocabulary(folder).read_text().split())
    made = {**architecture(name, words), **changes}
    (folder / f"{name}.json").write_text(json.dumps(made))
    return str(folder / f"{name}.json")


def perturbed(state: dict[str, torch.Tensor], seed: int = 3) -> dict[str, torch.Tensor]:
    """The same names and shapes, other numbers in every tensor of floats."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.15 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point()
            else tensor for name, tensor in state.items()}


def images() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 255, (40, 50 + 9 * n, 3), dtype=np.uint8)) for n in range(2)]


def items() -> list[Item]:
    """Texts, images, both."""
    return [Item(text, image) for text in (None, *TEXTS) for image in (None, *images()) if text or image]
