"""UniIR's BLIP_SF and BLIP_FF put together from LAVIS's classes. Run by .venv-lavis, for a test outside of it:

    python -m tests.lavis.towers FOLDER

reads items.json, architecture.json and vocab.txt there; writes vectors.safetensors ("score" and "feature" [items, D])
and names.json (every name of UniIR's two checkpoints with its shape), and, if the architecture is small, the two
checkpoints. Both sides draw a tensor from its name, so that nothing large has to be written.
"""

# Shapes: D dimensions of a vector, P tokens of an image, W numbers in each.

from __future__ import annotations

import importlib
import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

HEADS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
QUEUE = 16  # vectors in a queue, which nobody reads here
SMALL = 10**6  # weights, at most, that are written to a file


def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that its name decides; no bias is 0 and no norm is 1."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    found = torch.randn(shape, generator=generator) * 0.04
    return found + 1 if "norm" in name.lower() and name.endswith("weight") else found


def redrawn(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same names; whole numbers stay as they are."""
    return {name: drawn(name, tuple(tensor.shape)) if tensor.is_floating_point() else tensor
            for name, tensor in state.items()}


def new_model(architecture: dict[str, Any]) -> torch.nn.Module:
    """LAVIS's towers, with what either fusion has: pooler and projections."""
    from transformers import BertConfig

    lavis = {name: importlib.import_module(f"lavis.models.{name}") for name in ("vit", "med")}
    vision, text = architecture["vision"], architecture["text"]
    settings: dict[str, Any] = {
        "vocab_size": text["vocabulary"], "hidden_size": text["width"], "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"], "intermediate_size": 4 * text["width"], "hidden_act": "gelu",
        "max_position_embeddings": text["positions"], "layer_norm_eps": 1e-12, "pad_token_id": 0,
        "add_type_embeddings": False, "add_cross_attention": True, "encoder_width": vision["width"]}
    config = BertConfig(**settings)
    model = torch.nn.Module()
    model.visual_encoder = lavis["vit"].VisionTransformerEncoder(
        img_size=architecture["image_size"], patch_size=architecture["patch_size"], embed_dim=vision["width"],
        depth=vision["layers"], num_heads=vision["heads"])
    model.text_encoder = lavis["med"].XBertEncoder(config, add_pooling_layer=True)
    model.vision_proj = torch.nn.Linear(vision["width"], architecture["embed_dim"])
    model.text_proj = torch.nn.Linear(text["width"], architecture["embed_dim"])
    return model.eval()


def checkpoint(state: Mapping[str, torch.Tensor], fusion: str, dimension: int) -> dict[str, torch.Tensor]:
    """UniIR's checkpoint of this fusion: the weights, their momentum twins, the queues, the temperature."""
    unused = "text_encoder.pooler." if fusion == "score" else ("vision_proj.", "text_proj.")
    online = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
    twins = {name.replace(".", "_m.", 1): tensor for name, tensor in online.items()}
    queues = {"query_queue": torch.zeros(dimension, QUEUE), "cand_queue": torch.zeros(dimension, QUEUE),
              "idx_queue": torch.full((1, QUEUE), -100), "new_ptr_queue": torch.zeros(1, dtype=torch.int64)}
    return {**online, **twins, **queues, "temp": torch.tensor(0.07)}


class Towers:
    """One item at a time, by UniIR's rules and LAVIS's own tokenizer and processor."""

    def __init__(self, folder: Path):
        from transformers import BertTokenizer

        self.folder = folder
        self.architecture: dict[str, Any] = json.loads((folder / "architecture.json").read_text())
        self.model: Any = new_model(self.architecture)
        self.model.load_state_dict(redrawn(self.model.state_dict()))
        self.tokenizer = BertTokenizer(str(folder / "vocab.txt"))
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        processors = importlib.import_module("lavis.processors.blip_processors")
        self.processor = processors.BlipImageEvalProcessor(self.architecture["image_size"])

    def text(self, text: str | None, image_PW: torch.Tensor | None = None) -> Any:
        asked = self.tokenizer(text or "", truncation=True, max_length=self.architecture["text"]["length"],
                               return_tensors="pt")
        if image_PW is None:
            return self.model.text_encoder(asked.input_ids, attention_mask=asked.attention_mask, return_dict=True,
                                           mode="text")
        return self.model.text_encoder(asked.input_ids, attention_mask=asked.attention_mask, return_dict=True,
                                       encoder_hidden_states=image_PW,
                                       encoder_attention_mask=torch.ones(image_PW.shape[:-1], dtype=torch.long))

    def image(self, name: str | None) -> torch.Tensor:
        from PIL import Image

        if name is None:
            size = self.architecture["image_size"]
            return self.model.visual_encoder.forward_features(torch.zeros(1, 3, size, size))
        return self.model.visual_encoder.forward_features(self.processor(Image.open(self.folder / name))[None])

    def score(self, text: str | None, image: str | None) -> torch.Tensor:
        vector_D = torch.zeros(self.architecture["embed_dim"])
        if text or image is None:
            vector_D = vector_D + self.model.text_proj(self.text(text).last_hidden_state[0, 0])
        return vector_D if image is None else vector_D + self.model.vision_proj(self.image(image)[0, 0])

    def feature(self, text: str | None, image: str | None) -> torch.Tensor:
        return self.text(text, self.image(image)).pooler_output[0]


def main(folder: Path) -> None:
    from safetensors.torch import save_file

    towers = Towers(folder)
    items = json.loads((folder / "items.json").read_text())
    with torch.inference_mode():
        save_file({fusion: torch.stack([getattr(towers, fusion)(*item) for item in items])
                   for fusion in ("score", "feature")}, folder / "vectors.safetensors")
    state = towers.model.state_dict()
    dimension = towers.architecture["embed_dim"]
    full = {fusion: checkpoint(state, fusion, dimension) for fusion in ("score", "feature")}
    (folder / "names.json").write_text(json.dumps(
        {fusion: {name: list(tensor.shape) for name, tensor in tensors.items()} for fusion, tensors in full.items()}))
    if sum(tensor.numel() for tensor in state.values()) <= SMALL:
        for fusion, tensors in full.items():
            torch.save({"model": tensors, "epoch": 1}, folder / f"{fusion}.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
