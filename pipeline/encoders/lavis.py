"""The feature extractors of salesforce-lavis 1.0.2: BLIP, ALBEF, BLIP-2 (Q-Former) and CLIP, run by LAVIS's own code.

LAVIS ends at transformers 4.55, so it lives in an environment of its own, .venv-lavis (`bash environment.sh lavis`);
Params and identity work without it, and say the same in both environments. Promises: a text and an image are what
LAVIS's `extract_features` gives for them, of length 1; nothing is fetched; no code of a checkpoint runs. The trade:
what LAVIS scores with more than one vector (maxima over query tokens, the matching head) is not here.
"""

# Shapes: B items, T of them with a text, I with an image, L tokens, C colours, H x W pixels, D dimensions of a vector.

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.encoders import Item
from pipeline.encoders.checkpoints import find_file, weights_hash
from pipeline.encoders.clip_images import ImageInput
from pipeline.encoders.clip_towers import read_architecture
from pipeline.encoders.lavis_models import BLIP2, CLIP, KINDS, lavis, load_weights, new_extractor, new_texts
from pipeline.encoders.precision import arithmetic, check_precision
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

ENVIRONMENT = "make it with `bash environment.sh lavis`"  # where this encoder runs, if it is missing
VERSION = "1.0.2"  # of salesforce-lavis: what `seed` draws, and what "blip_caption" means
SUM, MULTIMODAL = "sum", "multimodal"
CAPTION, PLAIN = "blip_caption", "none"
_PARTS = {"vision": dict, "text": dict, "embed_dim": int}


@dataclass(frozen=True)
class Params:
    """All that may change the vectors.

    kind:           blip_feature_extractor, albef_feature_extractor, blip2_feature_extractor or clip_feature_extractor
    architecture:   JSON file (also relative to configs/) with `vision`, `text` and `embed_dim`;
                    for CLIP an open_clip name or JSON file
    weights:        a checkpoint as published, or safetensors of the same names
    vision_weights: BLIP-2 whose `weights` lack the image tower: the file that has it
    seed:           random weights, instead of `weights`
    tokenizer:      BERT's vocabulary, vocab.txt or the directory that has it (not for CLIP, which has its own)
    joined:         "sum": text and image are projected features, both together are their sum;
                    "multimodal": the first token of the multimodal encoder, for texts with images and nothing else
    text_processor: "blip_caption" (LAVIS's choice for all but CLIP: lower case, no punctuation, 50 words) or "none"
    max_words:      how many words blip_caption keeps
    text_length:    tokens that are kept, [CLS] and [SEP] included; without it as many as there are positions
    """

    kind: str
    architecture: str
    weights: str | None = None
    vision_weights: str | None = None
    seed: int | None = None
    tokenizer: str | None = None
    joined: str = SUM
    text_processor: str | None = None
    max_words: int = 50
    text_length: int | None = None


def identity(params: Params) -> dict[str, Any]:
    """What the fingerprint sees: contents, and no version that differs between two environments. No torch."""
    architecture, vocabulary, files = _checked(params)
    found: dict[str, Any] = {"kind": params.kind, "architecture": _hash(architecture), "joined": params.joined,
                             "text_processor": _processor(params)}
    if found["text_processor"] == CAPTION:
        found["max_words"] = params.max_words
    if params.text_length is not None:
        found["text_length"] = params.text_length
    if vocabulary is not None:
        found["tokenizer"] = weights_hash(vocabulary)
    found |= {name: weights_hash(path) for name, path in files.items()}
    return found if files else {**found, "seed": params.seed, "lavis": VERSION}


def build(params: Params, device: str, precision: str) -> LavisEncoder:
    """The encoder on `device`; UserError where salesforce-lavis cannot be imported, with the way to get it."""
    check_precision(precision)
    architecture, vocabulary, files = _checked(params)
    lavis("models")  # first of all: what is missing without it is missing everywhere
    texts = new_texts(params.kind, architecture, vocabulary, params.text_length)
    model = new_extractor(params.kind, architecture, texts, params.seed)
    if files:
        load_weights(model, files["weights"], files.get("vision_weights"))
    return LavisEncoder(params, architecture, model, device, precision)


class Prepared(NamedTuple):
    """One item: tokens int64 [L], pixels uint8 [H, W, C]."""

    tokens: np.ndarray | None
    pixels: np.ndarray | None


class LavisEncoder:
    """Texts and images as vectors of length 1, both as their sum; or ("multimodal") only both, as one."""

    def __init__(self, params: Params, architecture: dict[str, Any], model: Any, device: str, precision: str):
        self.kind, self.joined, self.device, self.precision = params.kind, params.joined, device, precision
        self.model = model.to(device)
        self.modalities = frozenset({"image,text"} if self._is_multimodal else {"text", "image", "image,text"})
        self.dimension: int = architecture["text"]["hidden_size"] if self._is_multimodal else architecture["embed_dim"]
        self.image_size = _image_size(params.kind, architecture)
        # all but CLIP's are squeezed into a square, which open_clip's transform does bit for bit as LAVIS's
        self.images = ImageInput(self.image_size, None if self.kind == CLIP else {"resize_mode": "squash"}, device)
        processor = lavis("processors.blip_processors").BlipCaptionProcessor
        self._processed = processor(max_words=params.max_words) if _processor(params) == CAPTION else str

    @property
    def _is_multimodal(self) -> bool:
        return self.joined == MULTIMODAL

    def prepare(self, item: Item) -> Prepared:
        """Process and tokenise, resize. A text of "" beside an image is no text."""
        has_text = self._is_multimodal or bool(item.text) or item.image is None
        tokens = self.model.tokenizer.tokens(self._processed(item.text or "")) if has_text else None
        return Prepared(tokens, None if item.image is None else self.images.cut(item.image))

    def encode(self, batch: Sequence[Prepared]) -> np.ndarray:
        """float32 [B, D], one row per prepared item in order."""
        import torch

        vectors_BD = torch.zeros(len(batch), self.dimension, device=self.device)
        with torch.inference_mode(), arithmetic(self.device, self.precision):
            if self._is_multimodal:
                vectors_BD += self._multimodal(batch)
                return vectors_BD.cpu().numpy()
            if texts := [number for number, item in enumerate(batch) if item.tokens is not None]:
                vectors_BD[texts] += self._texts([batch[number].tokens for number in texts])
            if images := [number for number, item in enumerate(batch) if item.pixels is not None]:
                vectors_BD[images] += self._images([batch[number].pixels for number in images])
            return vectors_BD.cpu().numpy()

    def _texts(self, tokens: Sequence[Any]) -> Tensor:
        """float32 [T, D]: the projected first token; for CLIP the projected last one."""
        import torch

        if self.kind == CLIP:
            raw_TD = self.model.extract_features({"text_input": tokens})
            return torch.nn.functional.normalize(raw_TD.float(), dim=-1)
        found = self.model.extract_features({"image": None, "text_input": tokens}, mode="text")
        return found.text_embeds_proj[:, 0].float()

    def _images(self, pixels: Sequence[Any]) -> Tensor:
        """float32 [I, D]: the projected first token; for BLIP-2 the mean over its query tokens, of length 1 again."""
        import torch

        images_ICHW = self._normalised(pixels)
        if self.kind == CLIP:
            raw_ID = self.model.extract_features({"image": images_ICHW})
            return torch.nn.functional.normalize(raw_ID.float(), dim=-1)
        found = self.model.extract_features({"image": images_ICHW, "text_input": None}, mode="image")
        if self.kind == BLIP2:
            return torch.nn.functional.normalize(found.image_embeds_proj.float().mean(1), dim=-1)
        return found.image_embeds_proj[:, 0].float()

    def _multimodal(self, batch: Sequence[Prepared]) -> Tensor:
        """float32 [B, D]. An image that could not be read is one of the mean colour, as a text is encoded alone."""
        import torch

        images_BCHW = torch.zeros(len(batch), 3, *self.image_size, device=self.device)
        if images := [number for number, item in enumerate(batch) if item.pixels is not None]:
            images_BCHW[images] = self._normalised([batch[number].pixels for number in images])
        found = self.model.extract_features({"image": images_BCHW, "text_input": [item.tokens for item in batch]})
        return found.multimodal_embeds[:, 0].float()

    def _normalised(self, pixels: Sequence[Any]) -> Tensor:
        import numpy as np
        import torch

        return self.images.normalised(torch.from_numpy(np.stack(pixels)))


def _checked(params: Params) -> tuple[dict[str, Any], Path | None, dict[str, Path]]:
    """Architecture, vocabulary (None for CLIP) and weights files; UserError for what does not go together."""
    _one_of("kind", params.kind, KINDS)
    _one_of("joined", params.joined, (SUM, MULTIMODAL))
    _one_of("text_processor", _processor(params), (CAPTION, PLAIN))
    if (params.weights is None) == (params.seed is None):
        raise UserError("an encoder needs `weights` or `seed`, exactly one of the two", None,
                        "weights: <file> for a trained model, seed: 0 for random weights")
    if params.vision_weights is not None and (params.kind != BLIP2 or params.weights is None):
        raise UserError("`vision_weights` goes with the `weights` of a BLIP-2", None, "remove it")
    files = {name: find_file(path, "weights file") for name in ("weights", "vision_weights")
             if (path := getattr(params, name)) is not None}
    if params.kind != CLIP:
        return _read_architecture(params.architecture), _vocabulary(params), files
    if params.joined == MULTIMODAL or params.tokenizer is not None or params.text_length is not None:
        raise UserError("CLIP has neither a multimodal encoder nor a choice of tokenizer and text_length", None,
                        "remove `joined`, `tokenizer` and `text_length`")
    return read_architecture(params.architecture), None, files


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name} '{value}' is not known", None, f"one of: {', '.join(known)}")


def _processor(params: Params) -> str:
    return params.text_processor or (PLAIN if params.kind == CLIP else CAPTION)


def _vocabulary(params: Params) -> Path:
    if params.tokenizer is None:
        raise UserError("this kind needs `tokenizer`, BERT's vocabulary", None,
                        "tokenizer: <vocab.txt of bert-base-uncased, or its directory>")
    inside = Path(params.tokenizer).expanduser() / "vocab.txt"
    return find_file(str(inside) if inside.is_file() else params.tokenizer, "vocabulary")


def _read_architecture(name: str) -> dict[str, Any]:
    path = find_file(name, "architecture")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"architecture is not JSON: {error}", str(path)) from error
    parts = found if isinstance(found, dict) else {}
    if wrong := [part for part, kind in _PARTS.items() if not isinstance(parts.get(part), kind)]:
        raise UserError(f"architecture lacks {', '.join(wrong)}", str(path),
                        "write it like configs/encoders/architectures/lavis_blip_base.json")
    return parts


def _hash(architecture: dict[str, Any]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest()


def _image_size(kind: str, architecture: dict[str, Any]) -> tuple[int, int]:
    vision = architecture["vision_cfg" if kind == CLIP else "vision"]
    side = next((int(vision[name]) for name in ("img_size", "input_resolution", "image_size") if name in vision), 224)
    return side, side
