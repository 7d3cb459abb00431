"""A tiny instance of every family of encoders that runs without network: random weights in files of the published form.

Each is made as a user would have it: a configuration, read like those of configs/encoders, and beside it what it names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from pipeline.pieces import EncoderChoice, load_encoder_choice
from tests.encoders import test_clip_feature_fusion, test_uniir_blip, test_visualized_bge, tiny_models

TINY_CLIP = "encoders/architectures/tiny_clip.json"
CHAT = ("[INST] {% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %} {{ c.text }}"
        "{% else %} <image>{% endif %}{% endfor %}{% endfor %} [/INST]")


class Family(NamedTuple):
    """`write`: puts files into a folder, returns the configuration. `joined`: what text and image together are."""

    module: str
    joined: str
    write: Callable[[Path], dict[str, Any]]


def choice(name: str, folder: Path) -> EncoderChoice:
    """The encoder `tiny_<name>`, whose files are made in this folder."""
    return load_encoder_choice(str(configuration(name, folder)))


def configuration(name: str, folder: Path) -> Path:
    """The file `tiny_<name>.yaml`, made with what belongs to it below this folder."""
    family, own = FAMILIES[name], folder / name
    own.mkdir(parents=True)
    path = own / f"tiny_{name}.yaml"
    path.write_text("# Random weights.\n" + yaml.safe_dump({"encoder": family.module, **family.write(own)}))
    return path


def _drawn(**options: Any) -> Callable[[Path], dict[str, Any]]:
    """Nothing to write: the module draws its weights itself."""
    return lambda folder: options


def _clip_ff(folder: Path) -> dict[str, Any]:
    """Feature fusion wants a text tower as wide as the vector."""
    (folder / "clip.json").write_text(json.dumps(test_clip_feature_fusion.ARCHITECTURE))
    return {"architecture": "./clip.json", "seed": 0, "fusion": "feature"}


def _blip(fusion: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        architecture = test_uniir_blip.ARCHITECTURE
        (folder / "vocab.txt").write_text("\n".join(test_uniir_blip.VOCABULARY) + "\n", encoding="utf-8")
        (folder / "blip.json").write_text(json.dumps(architecture))
        torch.save({"model": test_uniir_blip.published(architecture, fusion)}, folder / "blip.pth")
        return {"architecture": "./blip.json", "weights": "./blip.pth", "tokenizer": "./vocab.txt", "fusion": fusion}
    return write


def _visualized_bge(variant: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        test_visualized_bge.write_model(variant, folder / "model")
        return {"text_model": "./model/text", "vision": "./model/vision.json", "weights": "./model/weights.pth"}
    return write


def _directory(make: Callable[[Path], Path], **options: Any) -> Callable[[Path], dict[str, Any]]:
    """A directory of transformers."""
    def write(folder: Path) -> dict[str, Any]:
        make(folder / "model")
        return {"model": "./model", **options}
    return write


def _sentence_transformers(make: Callable[[Path], Path], complete: Callable[[Path], list[Any]],
                           **options: Any) -> Callable[[Path], dict[str, Any]]:
    """A directory of transformers as one of sentence-transformers; `complete` gives it its processor and its parts."""
    def write(folder: Path) -> dict[str, Any]:
        from sentence_transformers import SentenceTransformer

        parts = complete(make(folder / "transformers"))
        SentenceTransformer(modules=parts, device="cpu").save(str(folder / "model"))
        return {"model": "./model", **options}
    return write


def _whole_clip(directory: Path) -> list[Any]:
    from sentence_transformers.base.modules import Transformer
    from transformers import CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil.from_pretrained(directory)
    CLIPProcessor(images, tiny_models.clip_tokenizer()).save_pretrained(directory)
    return [Transformer(str(directory))]


def _whole_llava(directory: Path) -> list[Any]:
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    LlavaNextForConditionalGeneration.from_pretrained(directory).model.save_pretrained(directory)
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil.from_pretrained(directory), tiny_models.llava_tokenizer(), patch_size=14,
        vision_feature_select_strategy="default", chat_template=CHAT, num_additional_image_tokens=1)
    processor.save_pretrained(directory)
    return [Transformer(str(directory)), Pooling(tiny_models.TEXT["hidden_size"], "lasttoken"), Normalize()]


FAMILIES = {
    "open_clip": Family("open_clip", "sum", _drawn(architecture=TINY_CLIP, seed=0)),
    "uniir_clip_sf": Family("uniir_clip", "sum", _drawn(architecture=TINY_CLIP, seed=0)),
    "uniir_clip_ff": Family("uniir_clip", "two T5 layers over all tokens of both, mean", _clip_ff),
    "uniir_blip_sf": Family("uniir_blip", "sum", _blip("score")),
    "uniir_blip_ff": Family("uniir_blip", "the text attends to the image in each layer", _blip("feature")),
    "visualized_bge_base": Family("visualized_bge", "patches are tokens of the text", _visualized_bge("base")),
    "visualized_bge_m3": Family("visualized_bge", "patches are tokens of the text", _visualized_bge("m3")),
    "dual_encoder_clip": Family("dual_encoder", "sum", _directory(tiny_models.clip)),
    "dual_encoder_siglip": Family("dual_encoder", "sum", _directory(tiny_models.siglip)),
    "bge_vl_mllm": Family("bge_vl_mllm", "one prompt, the state of its last token", _directory(tiny_models.llava)),
    "sentence_transformers_clip": Family(
        "sentence_transformers", "sum", _sentence_transformers(tiny_models.clip, _whole_clip, fusion="sum")),
    "sentence_transformers_llava": Family(
        "sentence_transformers", "one message of the model's chat template",
        _sentence_transformers(tiny_models.llava, _whole_llava)),
    "mteb_random": Family("mteb", "as the model does it", _drawn(model="mteb/baseline-random-encoder", revision="2")),
    "random_vectors": Family("random_vectors", "a content of its own", _drawn(dimension=256, seed=0)),
}

# Modules with no instance here, and why.
ELSEWHERE = {
    "endpoint": "a service computes: its speed is that of the service and of the way there",
    "lavis": "runs in an environment of its own (run_tests.sh --lavis)",
    "precomputed": "looks vectors up by id and encodes nothing",
}
