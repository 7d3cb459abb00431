"""UniIR's CLIP with score fusion (CLIP_SF): OpenAI's CLIP towers, both vectors added as they are.

Definition: Wei et al., "UniIR: Training and Benchmarking Universal Multimodal Information Retrievers" (2023):
the vector is encode_text * text_mask + encode_image * image_mask. A masked tower adds exactly nothing, so it
is not run. Promises: UniIR's published checkpoints load as they are, without running code from them, name by
name or not at all. The trade: only architectures with QuickGELU are accepted, since the weights are
meaningless under another activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.encoders.checkpoints import find_file, load_state, load_strictly, source_identity
from pipeline.encoders.clip_towers import ClipEncoder, architecture_hash, new_model, read_architecture
from pipeline.support.errors import UserError

PREFIX = "clip_model."  # UniIR's module keeps OpenAI's CLIP under this name; names below it are OpenAI's
FUSIONS = ("score",)


@dataclass(frozen=True)
class Params:
    """All that may change the vectors.

    architecture: "ViT-B-32-quickgelu", "ViT-L-14-quickgelu", or a JSON file (also relative to configs/)
    weights:      UniIR's checkpoint, or safetensors of the same names; the prefix `clip_model.` may be absent
    seed:         random weights, instead of `weights`
    fusion:       "score": the vectors of text and image are added
    """

    architecture: str
    weights: str | None = None
    seed: int | None = None
    fusion: str = "score"


def identity(params: Params) -> dict[str, Any]:
    """What the fingerprint sees: architecture and weights by content (or the seed), the fusion. No torch."""
    return {"architecture": architecture_hash(_architecture(params)), "fusion": params.fusion,
            **source_identity(params.weights, params.seed)}


def build(params: Params, device: str, precision: str) -> ClipEncoder:
    """The encoder on `device` ("cpu", "cuda:1"); precision is fp32, bf16 or fp16 (UniIR's own)."""
    architecture = _architecture(params)
    source_identity(params.weights, params.seed)  # the same mistakes are refused with or without a plan
    model = new_model(architecture, params.seed)
    if params.weights is not None:
        path = find_file(params.weights, "weights file")
        state = {name.removeprefix(PREFIX): tensor for name, tensor in load_state(path).items()}
        load_strictly(model, state, path)
    return ClipEncoder(architecture, model, device, precision)


def _architecture(params: Params) -> dict[str, Any]:
    if params.fusion not in FUSIONS:
        raise UserError(f"fusion '{params.fusion}' is not known", None, f"one of: {', '.join(FUSIONS)}")
    architecture = read_architecture(params.architecture)
    if not architecture["quick_gelu"]:
        raise UserError(f"architecture '{params.architecture}' lacks QuickGELU, which UniIR uses", None,
                        "ViT-B-32-quickgelu, ViT-L-14-quickgelu, or `\"quick_gelu\": true` in the JSON file")
    return architecture
