"""The model of Visualized BGE: transformers' BERT or XLM-R, timm's EVA-02 and a projection, under published names.

Promises: `state_dict` and `load_state_dict` speak the names of the published files, all of them, so that a file fits
name by name and shape by shape. The trade: what those files hold and no vector needs (BERT's pooler, the image
tower's last norm and head, CLIP's scale) is kept beside the rest, in less than a hundredth of the memory.
"""

# Shapes: P patches of an image, R numbers of a rotary table for one patch.

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.encoders.checkpoints import find_file, load_state, load_strictly
from pipeline.support.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

# EVA-02-CLIP's image towers as timm names them, with the numbers that the unused head of each makes
TOWERS = {"eva02_base_patch16_clip_224": 512, "eva02_large_patch14_clip_224": 768}
_SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes")

TEXT_MODELS = ("bert", "xlm-roberta")

_TABLE = "visual.rope.pos_embed"  # timm's one table, [P, 2 R]: sines beside cosines; files hold each, once per block
_BUFFERS = {"text.embeddings.position_ids", "text.embeddings.token_type_ids", "visual.rope.bands", _TABLE}
_UNREAD = "bge_embeddings.position_ids"  # which old releases of transformers write: 0, 1, 2, ...

_OWN_PARTS = {"text.embeddings.": "bge_embeddings.", "text.encoder.": "bge_encoder.", "text.pooler.": "bge_pooler.",
              "visual.": "model_visual.visual.", "logit_scale": "model_visual.logit_scale"}
_OWN_NAMES_IN_BLOCKS = {".attn.q_proj.bias": ".attn.q_bias", ".attn.v_proj.bias": ".attn.v_bias",
                        ".attn.norm.": ".attn.inner_attn_ln.", ".mlp.norm.": ".mlp.ffn_ln.",
                        ".mlp.fc1_g.": ".mlp.w1.", ".mlp.fc1_x.": ".mlp.w2.", ".mlp.fc2.": ".mlp.w3."}


def read_vision(name: str) -> dict[str, Any]:
    """The image tower: a name of TOWERS, or a JSON file that changes the sizes of one. No torch."""
    if not name.endswith(".json"):
        vision: dict[str, Any] = {"architecture": name}
        where = None
    else:
        path = find_file(name, "vision architecture")
        where = str(path)
        try:
            vision = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"vision architecture is not a JSON object: {error}", where) from error
    known = str(vision.get("architecture"))
    if known not in TOWERS:
        raise UserError(f"image tower '{known}' is not one of Visualized BGE", where,
                        nearest(known, TOWERS) or f"one of: {', '.join(TOWERS)}")
    foreign = sorted(set(vision) - {"architecture", *_SIZES})
    if foreign:
        raise UserError(f"'{foreign[0]}' is not a size of an image tower", where, f"sizes: {', '.join(_SIZES)}")
    return {"num_classes": TOWERS[known], **vision}


def new_model(config: Mapping[str, Any], vision: Mapping[str, Any], seed: int) -> Any:
    """Random weights, drawn on the CPU: a seed means the same everywhere. `config`: the text model's config.json."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _assembled(config, vision).eval()


def load_model(config: Mapping[str, Any], vision: Mapping[str, Any], path: Path) -> Any:
    """The weights of a published file (.pth, or safetensors of the same names), in fp32 on the CPU.

    UserError naming the first name or shape in which file and architecture differ.
    """
    import torch

    with torch.device("meta"):  # nothing is drawn that the file is about to replace
        model = _assembled(config, vision)
    model.to_empty(device="cpu")
    _fill_buffers(model)
    state = load_state(path)
    load_strictly(model, {name: state[name] for name in state if name != _UNREAD}, path)
    return model.eval()


def _assembled(config: Mapping[str, Any], vision: Mapping[str, Any]) -> Any:
    import timm
    import torch
    from torch import nn

    model: Any = nn.Module()
    model.text = _text_model(config)
    sizes = {name: vision[name] for name in vision if name != "architecture"}
    try:
        model.visual = timm.create_model(vision["architecture"], use_naflex=False, **sizes)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"timm cannot make this image tower: {error}", str(dict(vision))) from error
    width, seen = model.text.config.hidden_size, model.visual.embed_dim
    if seen != width:
        raise UserError(f"the image tower is {seen} wide, the text model {width}", str(vision["architecture"]),
                        "the base tower goes with bge-base-en-v1.5, the large one with bge-m3")
    model.visual_proj = nn.Linear(width, width)
    model.logit_scale = nn.Parameter(torch.zeros(()))
    table = model.visual.rope.pos_embed
    model.visual.rope.register_buffer("pos_embed", table.half().to(table.dtype))  # as published; now a part of states
    model.register_state_dict_post_hook(_publish)
    model.register_load_state_dict_pre_hook(_adopt)
    assert {name for name, _ in model.named_buffers()} == _BUFFERS  # all of which _fill_buffers knows
    return model


def _text_model(config: Mapping[str, Any]) -> Any:
    from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

    kind = config.get("model_type")
    if kind not in TEXT_MODELS:
        raise UserError(f"'{kind}' is not the text model of a Visualized BGE", "config.json: model_type",
                        "text_model: bge-base-en-v1.5 (bert) or bge-m3 (xlm-roberta)")
    of_config: Any = BertConfig if kind == "bert" else XLMRobertaConfig
    of_model: Any = BertModel if kind == "bert" else XLMRobertaModel
    try:
        return of_model(of_config.from_dict(dict(config), attn_implementation="sdpa"))
    except Exception as error:  # the values decide which: ValueError, KeyError, RuntimeError, or one of the hub's
        raise UserError(f"transformers cannot make this text model: {error}", "config.json") from error


def _fill_buffers(model: Any) -> None:
    """What is computed and in no file, or as good as: a model made without memory has none of it."""
    import torch

    embeddings = model.text.embeddings
    embeddings.position_ids.copy_(torch.arange(embeddings.position_ids.shape[1])[None])
    embeddings.token_type_ids.zero_()
    model.visual.rope.init_non_persistent_buffers()


def published_name(own: str) -> str:
    """Of one of our parameters: its name in the published files."""
    if own.startswith("visual."):
        for part, published in _OWN_NAMES_IN_BLOCKS.items():
            own = own.replace(part, published)
    for part, published in _OWN_PARTS.items():
        if own.startswith(part):
            return published + own.removeprefix(part)
    return own


def _table_names(model: Any) -> list[tuple[str, str]]:
    """Names of the sines and the cosines, the tower's own first, then those of each block."""
    places = ("", *(f"blocks.{number}.attn." for number in range(len(model.visual.blocks))))
    return [(f"model_visual.visual.{place}rope.freqs_sin", f"model_visual.visual.{place}rope.freqs_cos")
            for place in places]


def _publish(model: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """After `state_dict`: published names instead of ours, in place."""
    sines_PR, cosines_PR = state.pop(_TABLE).chunk(2, dim=-1)
    for own in list(state):
        state[published_name(own)] = state.pop(own)
    for sines, cosines in _table_names(model):
        state[sines], state[cosines] = sines_PR, cosines_PR


def _adopt(model: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """Before `load_state_dict`: our names instead of the published ones, in place. All blocks share one table."""
    import torch

    tables = [(state.pop(sines), state.pop(cosines)) for sines, cosines in _table_names(model)]
    for own, _parameter in model.named_parameters():
        state[own] = state.pop(published_name(own))
    state[_TABLE] = torch.cat(tables[0], dim=-1)
