"""Dual encoders of transformers: CLIP (BGE-VL among them), SigLIP, ALIGN, BLIP, Chinese CLIP, AltCLIP, MetaCLIP 2.

A text and an image each have a tower that ends in one vector of the same space; both together are the sum of the two
(Zhou et al., "MegaPairs" (2024), for BGE-VL). Promises: any model of transformers with such towers is loaded from its
directory without code of its own; only the towers an item needs are run. The trade: nothing is drawn at random, so a
directory whose weights are not all there is refused, even if the missing ones would hardly matter.
"""

# Shapes: B items, D dimensions of a vector.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.encoders import Item
from pipeline.encoders.model_directories import directory_identity, model_directory
from pipeline.encoders.padded_texts import PaddedTexts
from pipeline.encoders.precision import arithmetic, check_precision
from pipeline.encoders.pretrained import load_config, load_image_processor, load_tokenizer, load_weights
from pipeline.encoders.processed_images import ProcessedImages
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FUSIONS = ("sum", "normalised_sum")
BLIP_RETRIEVAL = "BlipForImageTextRetrieval"  # what Salesforce published: other names than BlipModel's


@dataclass(frozen=True)
class Params:
    """All that may change the vectors.

    model:                      a directory, or a Hugging Face repository, which needs `revision`
    revision:                   commit (40 hex digits) of the repository
    fusion:                     "sum": a text's vector and an image's are added as the towers give them;
                                "normalised_sum": each is divided by its norm first (alone, too)
    max_text_tokens:            longer texts are cut; null: as many as the model's authors use
    max_text_tokens_with_image: the same beside an image; null: as max_text_tokens
    """

    model: str
    revision: str | None = None
    fusion: str = "sum"
    max_text_tokens: int | None = None
    max_text_tokens_with_image: int | None = None


class Prepared(NamedTuple):
    """One item, ready for the towers: tokens int64 [length], pixels by the names the image tower gives them."""

    tokens: np.ndarray | None
    pixels: dict[str, np.ndarray] | None


def identity(params: Params) -> dict[str, Any]:
    """What the fingerprint sees: the directory by content or commit, the fusion, the limits. No torch."""
    _check_fusion(params.fusion)
    return {**directory_identity(params.model, params.revision), "fusion": params.fusion,
            "max_text_tokens": params.max_text_tokens,
            "max_text_tokens_with_image": params.max_text_tokens_with_image}


def build(params: Params, device: str, precision: str) -> DualEncoder:
    """The encoder on `device` ("cpu", "cuda:1"); precision is fp32, bf16 or fp16."""
    import torch

    check_precision(precision)
    _check_fusion(params.fusion)
    directory = model_directory(params.model, params.revision)
    config = load_config(directory)
    kind = _model_class(config, directory)
    tokenizer, processor = load_tokenizer(directory, config), load_image_processor(directory, config)
    model = load_weights(kind, config, directory, torch.float32)
    texts, images = PaddedTexts(tokenizer, config, device), ProcessedImages(processor, device)
    try:
        return DualEncoder(model, texts, images, params, device, precision)
    except (AttributeError, TypeError, ValueError, NotADualEncoder) as error:  # each from the first try of a tower
        raise UserError(f"{kind.__name__} gives no vector of one size for a text and for an image: {error}",
                        str(directory), "a dual encoder like CLIP is needed, and the image processor that belongs "
                        "to it") from error


def _check_fusion(fusion: str) -> None:
    if fusion not in FUSIONS:
        raise UserError(f"fusion '{fusion}' is not known", None, f"one of: {', '.join(FUSIONS)}")


def _model_class(config: Any, directory: Path) -> Any:
    """The class of transformers that has both towers; UserError if the config is that of another kind of model."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if BLIP_RETRIEVAL in (config.architectures or ()):
        return transformers.BlipForImageTextRetrieval
    kind = MODEL_MAPPING.get(type(config), None)
    if not all(hasattr(kind, name) for name in ("get_text_features", "get_image_features")):
        raise UserError(f"model_type '{config.model_type}' is no dual encoder: it has no tower of its own for texts "
                        "or for images", str(directory), "see which encoder is made for it in docs/encoders")
    return kind


class NotADualEncoder(Exception):
    """The towers of this model do not end in vectors of one space."""


class DualEncoder:
    """Texts, images, and both (the sum of their vectors) as float32 vectors of one space."""

    modalities = frozenset({"text", "image", "image,text"})
    image_size: tuple[int, int]  # only where the image processor resizes to a known size

    def __init__(self, model: Any, texts: PaddedTexts, images: ProcessedImages, params: Params, device: str,
                 precision: str):
        self.model = model.to(device)
        self.texts, self.images = texts, images
        self.device, self.precision = device, precision
        self.is_normalised = params.fusion == "normalised_sum"
        self.limit = texts.limit(params.max_text_tokens, "max_text_tokens")
        beside = params.max_text_tokens_with_image
        self.limit_with_image = self.limit if beside is None else texts.limit(beside, "max_text_tokens_with_image")
        if images.size is not None:
            self.image_size = images.size
        self.dimension = self._tried_out()

    def prepare(self, item: Item) -> Prepared:
        """Tokenise, resize and crop. A text of "" beside an image is no text; with no image either, it is encoded."""
        has_text = bool(item.text) or item.image is None
        limit = self.limit if item.image is None else self.limit_with_image
        return Prepared(self.texts.tokens(item.text or "", limit) if has_text else None,
                        None if item.image is None else self.images.cut(item.image))

    def encode(self, batch: Sequence[Prepared]) -> np.ndarray:
        """float32 [B, D], one row per prepared item in order."""
        import torch

        vectors_BD = torch.zeros(len(batch), self.dimension, device=self.device)
        with torch.inference_mode(), arithmetic(self.device, self.precision):
            for field, tower in enumerate((self._encode_texts, self._encode_images)):
                rows = [row for row, prepared in enumerate(batch) if prepared[field] is not None]
                if rows:
                    found = tower([batch[row][field] for row in rows])
                    vectors_BD.index_add_(0, torch.tensor(rows, device=self.device), found)
        return vectors_BD.cpu().numpy()

    def _encode_texts(self, texts: Sequence[Any]) -> Tensor:
        return self._vectors(_text_tower(self.model), self.texts.padded(texts))

    def _encode_images(self, images: Sequence[Any]) -> Tensor:
        return self._vectors(_image_tower(self.model), self.images.ready(images))

    def _vectors(self, tower: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Tensor:
        import torch

        vectors_BD = tower(**inputs).float()
        return torch.nn.functional.normalize(vectors_BD, dim=-1) if self.is_normalised else vectors_BD

    def _tried_out(self) -> int:
        """The dimension of a text's vector, which must be that of an image's."""
        import torch
        from PIL import Image

        prepared = self.prepare(Item("a", Image.new("RGB", (32, 32))))
        with torch.inference_mode(), arithmetic(self.device, self.precision):
            shapes = [tuple(self._encode_texts([prepared.tokens]).shape),
                      tuple(self._encode_images([prepared.pixels]).shape)]
        if len(shapes[0]) != 2 or shapes[0] != shapes[1]:
            raise NotADualEncoder(f"shapes {shapes[0]} and {shapes[1]}")
        return shapes[0][1]


def _text_tower(model: Any) -> Callable[..., Tensor]:
    if hasattr(model, "text_proj"):  # BLIP for retrieval: the first token's state, projected
        return lambda **inputs: model.text_proj(model.text_encoder(**inputs).last_hidden_state[:, 0])
    return lambda **inputs: _pooled(model.get_text_features(**inputs))


def _image_tower(model: Any) -> Callable[..., Tensor]:
    if hasattr(model, "vision_proj"):
        return lambda **inputs: model.vision_proj(model.vision_model(**inputs).last_hidden_state[:, 0])
    return lambda **inputs: _pooled(model.get_image_features(**inputs))


def _pooled(features: Any) -> Tensor:
    """The vectors, which transformers 4 returned themselves and 5 returns within an object."""
    return features if hasattr(features, "shape") else features.pooler_output
