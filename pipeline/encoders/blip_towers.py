"""Two BLIP towers as UniIR joins them, on transformers' classes, under the names of the published checkpoints.

Definition: Li et al., "BLIP" (2022): a vision transformer, and a BERT whose every layer can attend to the image's
tokens. Promises: state_dict and load_state_dict speak the published names (visual_encoder.blocks.0.attn.qkv.weight),
so a misfit is told in the words of the file. The trade: transformers' settings are spelled out below, as most of its
defaults fit no published weights and differ in silence.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from pipeline.encoders.checkpoints import find_file
from pipeline.support.errors import UserError, nearest

_TEXT = {"width": 768, "layers": 12, "heads": 12, "vocabulary": 30524, "positions": 512, "length": 100}
STOCK: dict[str, dict[str, Any]] = {
    "base": {"image_size": 224, "patch_size": 16, "embed_dim": 768,
             "vision": {"width": 768, "layers": 12, "heads": 12}, "text": _TEXT},
    "large": {"image_size": 224, "patch_size": 16, "embed_dim": 768,
              "vision": {"width": 1024, "layers": 24, "heads": 16}, "text": _TEXT},
}

_PUBLISHED = (  # transformers' names below visual_encoder -> the published ones, which are timm's; in this order
    (r"\.encoder\.layers\.", ".blocks."), (r"\.layer_norm([12])\.", r".norm\1."), (r"\.self_attn\.", ".attn."),
    (r"\.attn\.projection\.", ".attn.proj."), (r"\.post_layernorm\.", ".norm."),
    (r"\.embeddings\.patch_embedding\.", ".patch_embed.proj."), (r"\.embeddings\.position_embedding$", ".pos_embed"),
    (r"\.embeddings\.class_embedding$", ".cls_token"))


def read_architecture(name: str) -> dict[str, Any]:
    """`base`, `large`, or a JSON file of the same keys: text.length is where texts are cut, in tokens. No torch."""
    if name in STOCK:
        return STOCK[name]
    if not name.endswith(".json"):
        raise UserError(f"architecture '{name}' is not one of UniIR's BLIP", None, "base, large, or a .json file")
    path = find_file(name, "architecture")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"architecture is not JSON: {error}", str(path)) from error
    problem = _key_problem(found, STOCK["base"], "") or _size_problem(found)
    if problem:
        raise UserError(problem, str(path), f"write it like `base`: {json.dumps(STOCK['base'])}")
    return dict(found)


def _key_problem(found: Any, wanted: Mapping[str, Any], prefix: str) -> str | None:
    if not isinstance(found, dict):
        return f"'{prefix.rstrip('.') or 'architecture'}' is not a mapping"
    for key in [*wanted, *found]:
        if key not in found:
            return f"architecture lacks '{prefix}{key}'"
        if key not in wanted:
            return f"'{prefix}{key}' is not part of an architecture {nearest(key, wanted)}".rstrip()
        if isinstance(wanted[key], dict):
            if problem := _key_problem(found[key], wanted[key], f"{key}."):
                return problem
        elif type(found[key]) is not int or found[key] < 1:
            return f"'{prefix}{key}' is not a whole number above 0: {found[key]!r}"
    return None


def _size_problem(found: Mapping[str, Any]) -> str | None:
    text = found["text"]
    for part in ("vision", "text"):
        if found[part]["width"] % found[part]["heads"]:
            return f"{part}.width {found[part]['width']} is no multiple of its {found[part]['heads']} heads"
    if found["image_size"] % found["patch_size"]:
        return f"image_size {found['image_size']} is no multiple of patch_size {found['patch_size']}"
    if not 3 <= text["length"] <= text["positions"]:
        return f"text.length {text['length']} is not between 3 and text.positions ({text['positions']})"
    return None


def architecture_hash(architecture: Mapping[str, Any]) -> str:
    """sha256 of the architecture's canonical JSON: neither its name nor its layout on disk matters."""
    return "sha256:" + hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest()


def new_model(architecture: Mapping[str, Any], fusion: str, seed: int | None = None) -> Any:
    """A torch module in eval mode, its weights random. On the CPU: a seed means the same everywhere.

    visual_encoder and text_encoder are transformers' towers; with score fusion vision_proj and text_proj follow them,
    with feature fusion the text tower has a pooler.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        model = torch.nn.Module()
        model.visual_encoder = _vision_tower(architecture)
        model.text_encoder = _text_tower(architecture, has_pooler=fusion == "feature")
        if fusion == "score":
            for name, part in (("vision_proj", "vision"), ("text_proj", "text")):
                model.add_module(name, torch.nn.Linear(architecture[part]["width"], architecture["embed_dim"]))
    model.register_state_dict_post_hook(_published_names)
    model.register_load_state_dict_pre_hook(_own_names)
    return model.eval()


def empty_model(architecture: Mapping[str, Any], fusion: str) -> Any:
    """The same on the CPU, its weights not yet set to anything: for those who load all of them."""
    import torch

    with torch.device("meta"):
        model = new_model(architecture, fusion)
    model = model.to_empty(device="cpu")
    positions = torch.arange(architecture["text"]["positions"])
    model.text_encoder.embeddings.position_ids = positions.expand(1, -1)  # in no checkpoint, so nobody else sets it
    return model


def _vision_tower(architecture: Mapping[str, Any]) -> Any:
    from transformers import BlipVisionConfig, BlipVisionModel

    vision = architecture["vision"]
    return BlipVisionModel(BlipVisionConfig(
        hidden_size=vision["width"], intermediate_size=4 * vision["width"], num_hidden_layers=vision["layers"],
        num_attention_heads=vision["heads"], image_size=architecture["image_size"],
        patch_size=architecture["patch_size"], hidden_act="gelu",
        layer_norm_eps=1e-6))  # transformers: 1e-5, and nobody would notice


def _text_tower(architecture: Mapping[str, Any], has_pooler: bool) -> Any:
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    text = architecture["text"]
    config = BlipTextConfig(
        vocab_size=text["vocabulary"], hidden_size=text["width"], intermediate_size=4 * text["width"],
        num_hidden_layers=text["layers"], max_position_embeddings=text["positions"], hidden_act="gelu",
        layer_norm_eps=1e-12, encoder_hidden_size=architecture["vision"]["width"],
        num_attention_heads=text["heads"],  # transformers: 8 where 12 were trained; the shapes are the same
        bos_token_id=None, sep_token_id=None,  # for generating, which nobody does here
        is_decoder=True,  # what makes the cross-attention; only a call with is_decoder=True would be causal
        attn_implementation="eager")  # type: ignore[call-arg]  # it adds its mask, which must be numbers
    return BlipTextModel(config, add_pooling_layer=has_pooler)


def published_name(name: str) -> str:
    """The name in a published checkpoint of one of the model's own weights."""
    if name.startswith("visual_encoder."):
        for pattern, published in _PUBLISHED:
            name = re.sub(pattern, published, name)
    return name


def _published_names(module: Any, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """For the whole model only, whose prefix is empty."""
    renamed = {published_name(name): tensor for name, tensor in state.items()}
    state.clear()
    state.update(renamed)


def _own_names(module: Any, state: dict[str, Any], *_: Any) -> None:
    own = {published_name(name): name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    renamed = {own.get(name, name): tensor for name, tensor in state.items()}
    state.clear()
    state.update(renamed)
