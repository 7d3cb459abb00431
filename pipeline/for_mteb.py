"""An encoder of ours as a model object of mteb: `mteb.evaluate(as_mteb_model("clip_sf_large"), tasks)`.

Promises: mteb is given the same vectors that a pipeline stores (before any rounding to float16) and compares them by
cosine, in float64 as our search does; its results are filed under the fingerprint of the encoder, so that other weights
never pass for these. The trade: mteb's own loader reads the images, in one process unless it is told otherwise.
"""

# Shapes: B items, D dimensions.

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pipeline.encoders import Encoder, Item, load_encoder
from pipeline.encoding import Encoding, require_modalities
from pipeline.pieces import load_encoder_choice
from pipeline.support.errors import UserError

INSTRUCTIONS = ("none", "task")


def as_mteb_model(encoder: str | Encoder, device: str = "cpu", precision: str = "fp32", instructions: str = "none",
                  name: str | None = None, revision: str | None = None) -> MtebModel:
    """What `mteb.evaluate` and everything else that takes an mteb model takes.

    encoder       a name in configs/encoders, a path to such a file, a dotted path to a module; or an encoder itself,
                  which then needs `name` and `revision`: mteb files results under them
    device        "cpu", "cuda:1"
    precision     fp32, bf16 or fp16
    instructions  "none": texts as the task has them; "task": the prompt of the task, if it has one, before each text
    name          of the model in mteb's results; default plumbline/<name of the configuration>
    revision      of the model in mteb's results; default: fingerprint of encoder and precision, 12 hex digits
    """
    if instructions not in INSTRUCTIONS:
        raise UserError(f"instructions '{instructions}' are not known", None, f"one of: {', '.join(INSTRUCTIONS)}")
    if not isinstance(encoder, str):
        if name is None or revision is None:
            raise UserError("an encoder object needs `name` and `revision`", None,
                            "mteb files its results under them, and takes them up again")
        return MtebModel(encoder, name, revision, instructions)
    choice = load_encoder_choice(encoder)
    built = load_encoder(choice.module).build(choice.params, device, precision)
    facts = {**choice.identity(), "precision": precision, "instructions": instructions}
    known = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return MtebModel(built, name or f"plumbline/{choice.name}", revision or known, instructions)


class MtebModel:
    """An object with all that mteb's EncoderProtocol asks for. `encoder` is ours."""

    def __init__(self, encoder: Encoder, name: str, revision: str, instructions: str = "none"):
        self.encoder, self.instructions = encoder, instructions
        self.mteb_model_meta = _meta(encoder, name, revision, instructions)

    def encode(self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, hf_split: str, hf_subset: str,
               prompt_type: Any = None, batch_size: int = 32, **_: Any) -> np.ndarray:
        """float32 [B, D]: one row per row of the batches that mteb's loader gives, in order, not normalised."""
        side = None if prompt_type is None else str(getattr(prompt_type, "value", prompt_type))
        prompt = _prompt(task_metadata, side) if self.instructions == "task" else None
        encoding = Encoding(self.encoder, self.mteb_model_meta.name, batch_size)
        parts = [np.zeros((0, self.encoder.dimension), np.float32)]
        for batch in inputs:
            items = list(_items(batch, prompt, "query" if side == "query" else "candidate"))
            require_modalities(self.encoder, self.mteb_model_meta.name, map(_kind, items), f"task {task_metadata.name}")
            parts.append(encoding.vectors([self.encoder.prepare(item) for item in items], [None] * len(items)))
        return np.concatenate(parts)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """float64 tensor [B, B]: cosines of every vector of the first with every one of the second."""
        return _units(embeddings1) @ _units(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """float64 tensor [B]: cosines of the vectors that stand beside each other."""
        return (_units(embeddings1) * _units(embeddings2)).sum(-1)


def _items(batch: Mapping[str, Any], prompt: str | None, role: Literal["query", "candidate"]) -> Iterable[Item]:
    """mteb's columns: text (of a query, with the instruction of its row behind it), query (without it), image."""
    columns = {name: batch[name] for name in ("id", "text", "query", "instruction", "image") if name in batch}
    if not columns.keys() & {"text", "image"}:
        raise UserError(f"nothing that can be encoded among mteb's columns: {', '.join(batch)}", None,
                        "choose tasks of texts and images")
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values))
        text, image, said = row.get("text"), row.get("image"), prompt or row.get("instruction") or None
        yield Item(" ".join(part for part in (prompt, text) if part) if prompt else text, _rgb(image), said,
                   text if prompt else row.get("query", text), role, str(row["id"]) if "id" in row else None)


def _kind(item: Item) -> str:
    """mteb lets a task run on a model that takes a part of it; a score of half a query means little."""
    return "text" if item.image is None else "image,text" if item.text else "image"


def _rgb(image: Any) -> Any:
    """mteb hands images over in the mode they were stored in."""
    return image if image is None or image.mode == "RGB" else image.convert("RGB")


def _prompt(task_metadata: Any, side: str | None) -> str | None:
    """The prompt of the task for this side; a prompt that names no side is for queries, and for tasks without sides."""
    prompt = task_metadata.prompt
    if isinstance(prompt, Mapping):
        return prompt.get(side) or None
    return prompt or None if side != "document" else None


def _units(vectors_BD: Any) -> Any:
    import torch

    return torch.nn.functional.normalize(torch.as_tensor(vectors_BD).double(), dim=-1)


def _meta(encoder: Encoder, name: str, revision: str, instructions: str) -> Any:
    try:
        from mteb.models.model_meta import ModelMeta, ScoringFunction
    except ImportError as error:
        raise UserError("mteb is not installed", None, "pip install 'plumbline[mteb]'") from error
    kinds: Sequence[str] = [kind for kind in ("text", "image") if kind in encoder.modalities]
    return ModelMeta.create_empty({
        "name": name, "revision": revision, "modalities": kinds, "embed_dim": encoder.dimension,
        "similarity_fn_name": ScoringFunction.COSINE, "use_instructions": instructions == "task",
        "framework": ["PyTorch"]})
