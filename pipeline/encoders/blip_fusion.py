"""How UniIR joins BLIP's two towers: the sum of two vectors (BLIP_SF), or a text that attends to an image (BLIP_FF).

Definition: Wei et al., "UniIR: Training and Benchmarking Universal Multimodal Information Retrievers" (2023). BLIP_SF
adds two projected vectors, of the text's first state and of the image's class token. BLIP_FF pools the first state of
a text that attends to the image's tokens in every layer; without an image these are the zero image's, run once; a
missing text is the empty one. The trade: texts are padded to the longest of a batch, not to 100 tokens, which leaves
rounding alone between the two.
"""

# Shapes: B items, L tokens of a text, P tokens of an image, W numbers in each, D dimensions of a vector.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pipeline.encoders import Item
from pipeline.encoders.blip_texts import padded
from pipeline.encoders.clip_images import ImageInput
from pipeline.encoders.precision import arithmetic, check_precision

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_IMAGES_AT_ONCE = 16  # on a CPU: more only move their states, which no cache holds, through the memory


class Prepared(NamedTuple):
    """One item, ready for the towers: tokens int64 [its length], pixels uint8 [height, width, 3]."""

    tokens: np.ndarray | None
    pixels: np.ndarray | None


# A choice of items, and what makes their vectors [items, D], which are added to what they have.
Run = tuple[Callable[[Prepared], bool], Callable[[Sequence[Prepared]], "Tensor"]]


class BlipEncoder(ABC):
    """What both fusions share: how items are prepared, and how the towers are run."""

    modalities = frozenset({"text", "image", "image,text"})

    def __init__(self, architecture: Mapping[str, Any], model: Any, tokenizer: Any, device: str, precision: str):
        check_precision(precision)
        self.dimension: int = architecture["embed_dim"]
        self.device, self.precision, self.tokenizer = device, precision, tokenizer
        self.model = model.to(device).eval()
        # UniIR's transform is open_clip's with the whole image squashed into the square
        size = architecture["image_size"]
        self.images = ImageInput((size, size), {"resize_mode": "squash"}, device)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what the image tower sees: decoders need not give much more."""
        return self.images.size

    def prepare(self, item: Item) -> Prepared:
        """Tokenise and resize. A text of "" beside an image is no text, as in UniIR; with no image it is encoded."""
        tokens = self._tokens(item.text or "") if item.text or item.image is None else None
        return Prepared(tokens, None if item.image is None else self.images.cut(item.image))

    def encode(self, batch: Sequence[Prepared]) -> np.ndarray:
        """float32 [B, D], not normalised, one row per prepared item in order."""
        import torch

        vectors_BD = torch.zeros(len(batch), self.dimension, device=self.device)
        with torch.inference_mode(), arithmetic(self.device, self.precision):
            for has_part, run in self._runs():
                rows = [row for row, item in enumerate(batch) if has_part(item)]
                if rows:
                    vectors = run([batch[row] for row in rows]).float()
                    vectors_BD.index_add_(0, torch.tensor(rows, device=self.device), vectors)
        return vectors_BD.cpu().numpy()

    @abstractmethod
    def _runs(self) -> Iterator[Run]:
        """What makes vectors of items, and of which items."""

    def _tokens(self, text: str) -> np.ndarray:
        import numpy as np

        return np.array(self.tokenizer.encode(text).ids, dtype=np.int64)

    def _text_states(self, texts: Sequence[np.ndarray], images_BPW: Tensor | None = None) -> Any:
        """transformers' output of the text tower. One image, [1, P, W], may stand for all texts."""
        tokens_BL, mask_BL = (each.to(self.device, non_blocking=True) for each in padded(texts))
        return self.model.text_encoder(input_ids=tokens_BL, attention_mask=mask_BL, is_decoder=False,
                                       encoder_hidden_states=images_BPW)

    def _image_states(self, items: Sequence[Prepared]) -> Tensor:
        """[B, P, W], after the last norm."""
        import numpy as np
        import torch

        pixels_BHWC = torch.from_numpy(np.stack([cast("np.ndarray", item.pixels) for item in items]))
        at_once = _IMAGES_AT_ONCE if torch.device(self.device).type == "cpu" else len(items)
        parts = [self._tokens_of(self.images.normalised(part)) for part in pixels_BHWC.split(at_once)]
        return torch.cat(parts)

    def _tokens_of(self, pixels_BCHW: Tensor) -> Tensor:
        states: Tensor = self.model.visual_encoder(pixel_values=pixels_BCHW).last_hidden_state
        return states


class ScoreFusionEncoder(BlipEncoder):
    """BLIP_SF: both towers' projected vectors, added; a tower that an item does not need is not run."""

    def _runs(self) -> Iterator[Run]:
        yield lambda item: item.tokens is not None, self._text_vectors
        yield lambda item: item.pixels is not None, self._image_vectors

    def _text_vectors(self, items: Sequence[Prepared]) -> Tensor:
        states = self._text_states([cast("np.ndarray", item.tokens) for item in items])
        vectors: Tensor = self.model.text_proj(states.last_hidden_state[:, 0])
        return vectors

    def _image_vectors(self, items: Sequence[Prepared]) -> Tensor:
        vectors: Tensor = self.model.vision_proj(self._image_states(items)[:, 0])
        return vectors


class FeatureFusionEncoder(BlipEncoder):
    """BLIP_FF: the pooled state of a text that attends to an image; every vector has seen both."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._no_text = self._tokens("")
        self._no_image_1PW: Tensor | None = None  # its states, the same for all items

    def _runs(self) -> Iterator[Run]:
        yield lambda item: item.pixels is None, self._without_image
        yield lambda item: item.pixels is not None, self._with_image

    def _without_image(self, items: Sequence[Prepared]) -> Tensor:
        if self._no_image_1PW is None:
            self._no_image_1PW = self._zero_image()
        return self._pooled(items, self._no_image_1PW)

    def _with_image(self, items: Sequence[Prepared]) -> Tensor:
        return self._pooled(items, self._image_states(items))

    def _pooled(self, items: Sequence[Prepared], images_BPW: Tensor) -> Tensor:
        texts = [self._no_text if item.tokens is None else item.tokens for item in items]
        pooled: Tensor = self._text_states(texts, images_BPW).pooler_output
        return pooled

    def _zero_image(self) -> Tensor:
        import torch

        return self._tokens_of(torch.zeros(1, 3, *self.image_size, device=self.device))  # after normalisation
