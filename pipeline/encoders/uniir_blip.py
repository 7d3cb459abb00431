"""UniIR's BLIP with score fusion (BLIP_SF) or feature fusion (BLIP_FF): its parameters and its checkpoints.

How vectors are made: blip_fusion.py. Promises: UniIR's checkpoints load as they are, without running code from them,
name by name or not at all; the momentum twins and queues of its training are left aside, and made up again for those
who want a file that UniIR's own code loads. The trade: the vocabulary is BERT's, which no checkpoint brings along.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.encoders.blip_fusion import BlipEncoder, FeatureFusionEncoder, ScoreFusionEncoder
from pipeline.encoders.blip_texts import new_tokenizer, vocabulary_identity
from pipeline.encoders.blip_towers import architecture_hash, empty_model, new_model, read_architecture
from pipeline.encoders.checkpoints import find_file, load_state, load_strictly, source_identity
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

FUSIONS = ("score", "feature")
POSITIONS = "text_encoder.embeddings.position_ids"  # 0, 1, 2, ...
HEADS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
# What training alone needs: twins that follow the weights slowly, queues of vectors, the temperature.
TRAINING_ONLY = re.compile(rf"({'|'.join(HEADS)})_m\..+|temp|(query|cand|idx|new_ptr)_queue")
QUEUES = {"base": 57600, "large": 57960}  # vectors in a queue, in UniIR's own configurations

T = TypeVar("T")


@dataclass(frozen=True)
class Params:
    """All that may change the vectors.

    architecture: "base", "large", or a JSON file like them (also relative to configs/)
    weights:      UniIR's checkpoint, or safetensors of the same names
    seed:         random weights, instead of `weights`
    fusion:       "score": the vectors of text and image are added (BLIP_SF);
                  "feature": the text attends to the image's tokens (BLIP_FF)
    tokenizer:    BERT's vocab.txt, or a directory with one; without, that of bert-base-uncased from its hub
    """

    architecture: str
    weights: str | None = None
    seed: int | None = None
    fusion: str = "score"
    tokenizer: str | None = None


def identity(params: Params) -> dict[str, Any]:
    """What the fingerprint sees: architecture, vocabulary and weights by content (or the seed), fusion. No torch."""
    architecture = checked_architecture(params)
    found = {"architecture": architecture_hash(architecture), "fusion": params.fusion,
             "vocabulary": vocabulary_identity(params.tokenizer, architecture["text"]["vocabulary"]),
             **source_identity(params.weights, params.seed)}
    if params.seed is not None:
        found["transformers"] = version("transformers")  # which draws the towers' weights
    return found


def build(params: Params, device: str, precision: str) -> BlipEncoder:
    """The encoder on `device` ("cpu", "cuda:1"); precision is fp32, bf16 or fp16 (UniIR's own)."""
    identity(params)  # the same mistakes are refused with or without a plan
    architecture = checked_architecture(params)
    tokenizer = new_tokenizer(params.tokenizer, architecture["text"]["length"])
    if params.weights is None:
        model = new_uniir_model(architecture, params.fusion, params.seed)
    else:
        path = find_file(params.weights, "weights file")
        state = own_names(load_state(path))
        _check_fusion(state, params.fusion, path)
        model = empty_model(architecture, params.fusion)
        load_strictly(model, state, path)
    kind = FeatureFusionEncoder if params.fusion == "feature" else ScoreFusionEncoder
    return kind(architecture, model, tokenizer, device, precision)


def checked_architecture(params: Params) -> dict[str, Any]:
    """The architecture; UserError unless UniIR's model of this fusion can be made of it. No torch."""
    if params.fusion not in FUSIONS:
        raise UserError(f"fusion '{params.fusion}' is not known", None, f"one of: {', '.join(FUSIONS)}")
    architecture = read_architecture(params.architecture)
    width, dimension = architecture["text"]["width"], architecture["embed_dim"]
    if params.fusion == "feature" and width != dimension:
        raise UserError(f"feature fusion makes vectors as wide as its text tower, {width}, not embed_dim {dimension}",
                        params.architecture, f"\"embed_dim\": {width}, or `fusion: score`")
    return architecture


def new_uniir_model(architecture: Mapping[str, Any], fusion: str, seed: int | None = None) -> Any:
    """The torch module of this fusion in eval mode, its weights random, its names UniIR's."""
    return new_model(architecture, fusion, seed)


def own_names(state: Mapping[str, T]) -> dict[str, T]:
    """What inference needs of a checkpoint: without what only training reads, and without the positions' numbers."""
    return {name: tensor for name, tensor in state.items()
            if name != POSITIONS and not TRAINING_ONLY.fullmatch(name)}


def fusion_of(names: Iterable[str]) -> str | None:
    """The fusion whose own weights these names hold; None if they hold those of both or of neither."""
    found = {name.rsplit(".", 1)[0] for name in names}
    has_pooler, has_projection = "text_encoder.pooler.dense" in found, "text_proj" in found
    if has_pooler == has_projection:
        return None
    return "feature" if has_pooler else "score"


def _check_fusion(names: Iterable[str], fusion: str, path: Path) -> None:
    found = fusion_of(names)
    if found not in (None, fusion):
        raise UserError(f"the weights are those of {found} fusion, not of {fusion} fusion", str(path),
                        f"fusion: {found}")


def training_state(state: Mapping[str, Tensor], params: Params) -> dict[str, Tensor]:
    """All names that UniIR's own model has, so that it loads them strictly; the twins take no memory of their own.

    The queues hold zeros and the temperature is UniIR's first: its evaluation reads neither.
    """
    import torch

    architecture = checked_architecture(params)
    size, texts = QUEUES.get(params.architecture, QUEUES["base"]), architecture["text"]
    positions_1L = torch.arange(texts["positions"])[None]
    vectors_DQ = torch.zeros(()).expand(architecture["embed_dim"], size)
    online = {**state, POSITIONS: positions_1L}
    twins = {re.sub(r"^(\w+)", r"\1_m", name): tensor for name, tensor in online.items()}
    return {**online, **twins, "temp": torch.tensor(0.07), "query_queue": vectors_DQ, "cand_queue": vectors_DQ,
            "idx_queue": torch.tensor(-100).expand(1, size), "new_ptr_queue": torch.zeros(1, dtype=torch.int64)}
