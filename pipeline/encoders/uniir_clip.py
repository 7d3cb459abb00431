"""UniIR's CLIP: OpenAI's towers with score fusion (CLIP_SF) or with feature fusion (CLIP_FF).

Definition: Wei et al., "UniIR: Training and Benchmarking Universal Multimodal Information Retrievers" (2023). CLIP_SF
is encode_text * text_mask + encode_image * image_mask; a masked tower adds exactly nothing, so it is not run. CLIP_FF
is in clip_feature_fusion.py. Promises: UniIR's checkpoints load as they are, without running code from them, name by
name or not at all. The trade: only architectures with QuickGELU are accepted, since the weights are meaningless under
another activation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pipeline.encoders.checkpoints import find_file, load_state, load_strictly, source_identity
from pipeline.encoders.clip_feature_fusion import FeatureFusionEncoder, check_architecture, new_fused_model
from pipeline.encoders.clip_towers import ClipEncoder, architecture_hash, new_model, read_architecture
from pipeline.support.errors import UserError

PREFIX = "clip_model."  # UniIR's module keeps OpenAI's CLIP under this name; names below it are OpenAI's
FUSION_LAYERS = "t5_layers."
UNUSED = f"{FUSION_LAYERS}embed_tokens.weight"  # some releases of transformers make one; nothing reads it
FUSIONS = ("score", "feature")

T = TypeVar("T")


@dataclass(frozen=True)
class Params:
    """All that may change the vectors.

    architecture: "ViT-B-32-quickgelu", "ViT-L-14-quickgelu", or a JSON file (also relative to configs/)
    weights:      UniIR's checkpoint, or safetensors of the same names; the prefix `clip_model.` may be absent
    seed:         random weights, instead of `weights`
    fusion:       "score": the vectors of text and image are added (CLIP_SF);
                  "feature": layers over all positions of both towers (CLIP_FF)
    """

    architecture: str
    weights: str | None = None
    seed: int | None = None
    fusion: str = "score"


def identity(params: Params) -> dict[str, Any]:
    """What the fingerprint sees: architecture and weights by content (or the seed), the fusion. No torch."""
    found = {"architecture": architecture_hash(checked_architecture(params)), "fusion": params.fusion,
             **source_identity(params.weights, params.seed)}
    if params.fusion == "feature" and params.seed is not None:
        found["transformers"] = version("transformers")  # which draws the fusion layers' weights
    return found


def build(params: Params, device: str, precision: str) -> ClipEncoder:
    """The encoder on `device` ("cpu", "cuda:1"); precision is fp32, bf16 or fp16 (UniIR's own)."""
    architecture = checked_architecture(params)
    source_identity(params.weights, params.seed)  # the same mistakes are refused with or without a plan
    model = new_uniir_model(architecture, params.fusion, params.seed)
    if params.weights is not None:
        path = find_file(params.weights, "weights file")
        state = own_names(load_state(path))
        _check_fusion(state, params.fusion, path)
        load_strictly(model, state, path)
    encoder = FeatureFusionEncoder if params.fusion == "feature" else ClipEncoder
    return encoder(architecture, model, device, precision)


def with_weights(params: Params, weights: str) -> Params:
    """The same encoder with trained weights."""
    return replace(params, weights=weights, seed=None)


def new_uniir_model(architecture: Mapping[str, Any], fusion: str, seed: int | None = None) -> Any:
    """The torch module of this fusion in eval mode, its weights random."""
    return (new_fused_model if fusion == "feature" else new_model)(architecture, seed)


def own_names(state: Mapping[str, T]) -> dict[str, T]:
    """UniIR's names without `clip_model.`, and without the vocabulary that the fusion layers never read.

    A name that is there with and without the prefix keeps it, and so fits no model.
    """
    return {name if (short := name.removeprefix(PREFIX)) in state else short: tensor
            for name, tensor in state.items() if name != UNUSED}


def fusion_of(names: Iterable[str]) -> str | None:
    """The fusion whose own weights these names hold; None if they hold those of both or of neither."""
    names = set(names)
    has_layers, has_projection = any(name.startswith(FUSION_LAYERS) for name in names), "text_projection" in names
    if has_layers == has_projection:
        return None
    return "feature" if has_layers else "score"


def _check_fusion(names: Iterable[str], fusion: str, path: Path) -> None:
    found = fusion_of(names)
    if found not in (None, fusion):
        raise UserError(f"the weights are those of {found} fusion, not of {fusion} fusion", str(path),
                        f"fusion: {found}")


def checked_architecture(params: Params) -> dict[str, Any]:
    """The open_clip model config; UserError unless UniIR's model of this fusion can be made of it. No torch."""
    if params.fusion not in FUSIONS:
        raise UserError(f"fusion '{params.fusion}' is not known", None, f"one of: {', '.join(FUSIONS)}")
    architecture = read_architecture(params.architecture)
    if not architecture["quick_gelu"]:
        raise UserError(f"architecture '{params.architecture}' lacks QuickGELU, which UniIR uses", None,
                        "ViT-B-32-quickgelu, ViT-L-14-quickgelu, or `\"quick_gelu\": true` in the JSON file")
    if params.fusion == "feature":
        check_architecture(architecture)
    return architecture
