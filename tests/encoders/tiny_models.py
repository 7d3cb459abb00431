"""Tiny models of transformers in directories of their own: random weights, vocabularies made on the spot."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (BertTokenizer, BlipConfig, BlipForImageTextRetrieval, ChineseCLIPConfig, ChineseCLIPModel,
                          CLIPConfig, CLIPModel, CLIPTokenizer, LlavaNextConfig, LlavaNextForConditionalGeneration,
                          PreTrainedTokenizerFast, SiglipConfig, SiglipModel)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pipeline.encoders import Item

SQUARE = {"height": 32, "width": 32}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 16}
LETTERS = [chr(code) for code in range(33, 127)]


def perturbed(model: Any, seed: int = 0) -> Any:
    """The model with every parameter random: no bias is 0 and no norm's weight is 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_norm else (0.3 if parameter.ndim < 2 else 0.12) * noise)
    return model.eval()


def picture(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    """Coarse colourful noise: enlarged, so that resizing again changes it."""
    small = np.random.RandomState(seed).randint(0, 256, (8, 10, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def encoded(encoder: Any, items: list[Item]) -> np.ndarray:
    """float32 [B, D]; prepared items travel between processes."""
    found = encoder.encode([pickle.loads(pickle.dumps(encoder.prepare(item))) for item in items])
    assert found.dtype == np.float32 and found.shape == (len(items), encoder.dimension)
    return np.asarray(found)


def write_weights(directory: Path, state: Mapping[str, torch.Tensor | None]) -> None:
    """In place of the directory's own; what is None is left out."""
    kept = {name: tensor.contiguous() for name, tensor in state.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})


def cut_weights_short(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def bring_code(directory: Path, module: str, **config: Any) -> None:
    """As many published directories do; and what else changes in config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    (directory / f"{module}.py").write_text("raise SystemExit('this must not run')\n")


def with_biases(linears: Mapping[str, tuple[int, int]], norms: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of weights and biases, of matrices by their shapes and of norms by their widths."""
    shapes = {**linears, **{name: (width,) for name, width in norms.items()}}
    return {f"{name}.{part}": shape if part == "weight" else shape[:1]
            for name, shape in shapes.items() for part in ("weight", "bias")}


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own class over single bytes and a few merges; the end of text has the highest number, as in CLIP."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("ci", "r"), ("t", "h"), ("th", "e</w>")]
    merged = ["".join(merge) for merge in merges]
    names = [*letters, *(f"{letter}</w>" for letter in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({name: number for number, name in enumerate(names)}, merges,  # type: ignore[arg-type]
                         model_max_length=20)


def bert_tokenizer(special: tuple[str, ...] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")) -> BertTokenizer:
    names = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return BertTokenizer({name: number for number, name in enumerate(names)}, model_max_length=512)


def letter_tokenizer(added: tuple[str, ...], first: str | None, last: str | None,
                     **options: Any) -> PreTrainedTokenizerFast:
    """One token per letter; `first` and `last` (of `added`) stand around every text."""
    names = ["<unk>", *added, " ", "\n", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.normalizer = normalizers.NFC()
    pattern = " ".join(part for part in (first, "$A", last) if part)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=pattern, special_tokens=[(name, names.index(name)) for name in (first, last) if name])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **options)


def saved(directory: Path, model: Any, tokenizer: Any, processor: Any) -> Path:
    """The directory, with all that a published model has; its weights in half precision would lose digits."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def clip(directory: Path, seed: int = 0, eos_token_id: int = 2) -> Path:
    """BGE-VL-base in small. Its eos_token_id is 2, which old releases wrote and which means: the highest token."""
    tokenizer = clip_tokenizer()
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": eos_token_id,
            "bos_token_id": 0, "pad_token_id": 1}
    config = CLIPConfig(text_config={**text, "projection_dim": 24}, vision_config={**VISION, "projection_dim": 24},
                        projection_dim=24)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)
    return saved(directory, perturbed(CLIPModel(config), seed), tokenizer, processor)


def siglip(directory: Path) -> Path:
    tokenizer = letter_tokenizer(("</s>",), None, "</s>", pad_token="</s>", eos_token="</s>", model_max_length=16)
    text = {**TEXT, "hidden_size": 48, "vocab_size": len(tokenizer), "max_position_embeddings": 16,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "projection_size": 48}
    config = SiglipConfig(text_config=text, vision_config=VISION)
    processor = SiglipImageProcessorPil(size=SQUARE)
    return saved(directory, perturbed(SiglipModel(config)), tokenizer, processor)


def chinese_clip(directory: Path) -> Path:
    tokenizer = bert_tokenizer()
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    config = ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    processor = ChineseCLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE)
    return saved(directory, perturbed(ChineseCLIPModel(config)), tokenizer, processor)


def blip_retrieval(directory: Path) -> Path:
    tokenizer = bert_tokenizer()
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 40, "encoder_hidden_size": 48,
            "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=24)
    processor = BlipImageProcessorPil(size=SQUARE)
    return saved(directory, perturbed(BlipForImageTextRetrieval(config)), tokenizer, processor)


def llava_tokenizer(side: str = "left") -> PreTrainedTokenizerFast:
    """Mistral's layout in small: a beginning, no end, an image token added behind the vocabulary."""
    tokenizer = letter_tokenizer(("<s>", "</s>"), "<s>", None, bos_token="<s>", eos_token="</s>", pad_token="</s>",
                                 padding_side=side, model_max_length=32768)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def llava(directory: Path, seed: int = 0) -> Path:
    """BGE-VL-MLLM in small: tiles of 28 x 28 pixels with four patches each."""
    tokenizer = llava_tokenizer()
    text = {"model_type": "mistral", **TEXT, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer),
            "max_position_embeddings": 600, "sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
            "bos_token_id": 1, "eos_token_id": 2}
    vision = {"model_type": "clip_vision_model", **VISION, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14,
              "projection_dim": 16}
    grid = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(text_config=text, vision_config=vision, image_grid_pinpoints=grid,
                             image_token_index=len(tokenizer) - 1, image_seq_length=4)
    processor = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
                                           image_grid_pinpoints=grid)
    return saved(directory, perturbed(LlavaNextForConditionalGeneration(config), seed), tokenizer, processor)
