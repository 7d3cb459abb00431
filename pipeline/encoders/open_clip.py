"""OpenCLIP: every architecture that open_clip knows, or a JSON file of the same form.

Weights are a local file, a pretrained tag pinned to a commit, or random from a seed. Promises: the
fingerprint sees contents, never names; weights fit name by name and shape by shape or are refused (open_clip
would stretch position embeddings in silence); a tag is not run with the wrong activation (open_clip only
warns). The trade: a tag needs its commit spelled out. How vectors are made: clip_towers.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.encoders.checkpoints import find_file, load_state, load_strictly, source_identity
from pipeline.encoders.clip_towers import ClipEncoder, architecture_hash, new_model, read_architecture
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_PREPARED = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711),
             "interpolation": "bicubic", "resize_mode": "shortest"}  # open_clip's default, OpenAI's

FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Params:
    """All that may change the vectors.

    architecture: an open_clip name ("ViT-B-32"), or a JSON model config (a path, also relative to configs/)
    weights:      a checkpoint file, or an open_clip tag ("openai"), which needs `revision`
    revision:     commit (40 hex digits) of the tag's Hugging Face repository
    seed:         random weights, instead of `weights`
    quick_gelu:   overrides the activation that the architecture names
    """

    architecture: str
    weights: str | None = None
    revision: str | None = None
    seed: int | None = None
    quick_gelu: bool | None = None


def identity(params: Params) -> dict[str, Any]:
    """What the fingerprint sees: architecture by content; weights by content, commit or seed. No torch."""
    return {"architecture": architecture_hash(read_architecture(params.architecture, params.quick_gelu)),
            **_weights_identity(params)}


def build(params: Params, device: str, precision: str) -> ClipEncoder:
    """The encoder on `device` ("cpu", "cuda:1"); precision is fp32, bf16 or fp16."""
    architecture = read_architecture(params.architecture, params.quick_gelu)
    _weights_identity(params)  # the same mistakes are refused with or without a plan
    preprocess: dict[str, Any] = {}
    if params.weights is None:
        model = new_model(architecture, params.seed)
    else:
        path, preprocess = _resolve(params, params.weights, architecture)
        model = new_model(architecture)
        load_strictly(model, _as_open_clip(model, load_state(path)), path)
    return ClipEncoder(architecture, model, device, precision, preprocess)


def with_weights(params: Params, weights: str) -> Params:
    """The same encoder with trained weights; UserError if its images are prepared as only a tag's file tells."""
    if params.revision is not None:
        told = {key: tuple(value) if isinstance(value, list) else value
                for key, value in _pretrained_tag(params, str(params.weights)).items() if key in _PREPARED}
        if any(value != _PREPARED[key] for key, value in told.items()):
            raise UserError(f"tag '{params.weights}' prepares images in its own way, which a file cannot say", None,
                            f"train from another one, whose preparation is {_PREPARED}")
    return replace(params, weights=weights, seed=None, revision=None)


def _weights_identity(params: Params) -> dict[str, Any]:
    if params.weights is None or params.seed is not None or _is_file(params.weights):
        source = source_identity(params.weights, params.seed)
        if params.revision is not None:
            raise UserError("`revision` goes with a pretrained tag, not a file or seed", None, "remove it")
        return source
    if not re.fullmatch("[0-9a-f]{40}", params.revision or ""):
        raise UserError(f"pretrained tag '{params.weights}' needs `revision`: its content may change", None,
                        "revision: <the 40-digit commit of its Hugging Face repository>,\n"
                        "or download the file and give its path as `weights`")
    return {"tag": params.weights, "revision": params.revision}


def _is_file(weights: str) -> bool:
    return "/" in weights or weights.endswith(FILE_SUFFIXES)


def _resolve(params: Params, weights: str, architecture: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The weights file, and what its tag says about preprocessing (mean, std, interpolation, ...)."""
    if _is_file(weights):
        return find_file(weights, "weights file"), {}
    tag = _pretrained_tag(params, weights)
    trained_with = bool(tag.get("quick_gelu", False))
    if params.quick_gelu is None and trained_with != architecture["quick_gelu"]:
        raise UserError(f"tag '{weights}' was trained with quick_gelu={trained_with}, "
                        f"architecture '{params.architecture}' has {architecture['quick_gelu']}", None,
                        "choose the architecture with or without '-quickgelu', or set `quick_gelu`")
    return _fetch(str(tag["hf_hub"]), str(params.revision)), tag


def _pretrained_tag(params: Params, weights: str) -> dict[str, Any]:
    from open_clip import get_pretrained_cfg, list_pretrained_tags_by_model

    tag = get_pretrained_cfg(params.architecture, weights)
    if not tag.get("hf_hub"):
        known = ", ".join(list_pretrained_tags_by_model(params.architecture))
        raise UserError(f"architecture '{params.architecture}' has no pretrained tag '{weights}'", None,
                        f"tags: {known or 'none'}; a file is given with its suffix or a '/'")
    return dict(tag)


def _fetch(hub_name: str, revision: str) -> Path:
    from open_clip.pretrained import download_pretrained_from_hf

    repository, _, file_name = hub_name.rpartition("/")
    try:
        return Path(download_pretrained_from_hf(repository, file_name or None, revision=revision))
    except OSError as error:
        raise UserError(f"cannot fetch {repository} at {revision}", str(error),
                        "run once with network access,\n"
                        "or download the file and give its path as `weights`") from error


def _as_open_clip(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Foreign and older layouts renamed by open_clip's own rules; what neither tower reads made to fit."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = dict(convert_state_dict(model, state))
    if not hasattr(model, "positional_embedding"):
        state = dict(convert_to_custom_text_state_dict(state))
    own = model.state_dict()
    for name in ("logit_scale", "logit_bias", "text.transformer.embeddings.position_ids",
                 "input_resolution", "context_length", "vocab_size"):
        found = state.pop(name, None)
        if name in own:  # one number, with or without a dimension: only a training goes on from it
            if found is None or found.numel() != own[name].numel():
                found = own[name]
            state[name] = found.reshape(own[name].shape)
    return state
