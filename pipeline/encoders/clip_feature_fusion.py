"""UniIR's CLIP with feature fusion (CLIP_FF): two transformer layers over all positions of both towers.

Definition: Wei et al., "UniIR: Training and Benchmarking Universal Multimodal Information Retrievers" (2023): the
text tower's states after its last norm and the image tower's projected tokens stand in one sequence, T5's encoder
layers mix them without a mask, and the vector is the mean over the sequence. A missing text is the empty text, a
missing image is zeros after normalisation, and both take part; so texts are never cut short. The trade: an item
costs both towers, but what stands in for a missing text or image is run once in a batch, not once for each item.
"""

# Shapes: B items, L tokens of a text, P tokens of an image, S = L + P, D dimensions of a vector.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.encoders import Item
from pipeline.encoders.clip_texts import text_positions
from pipeline.encoders.clip_towers import ClipEncoder, Prepared, new_model, without_gradients
from pipeline.encoders.precision import arithmetic
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_FUSION_WIDTH = 2048  # of T5's layers, between their two products

FOREIGN = {  # what open_clip can build beside OpenAI's CLIP: these towers have no such positions to fuse
    "": ("custom_text", "multimodal_cfg"),
    "vision_cfg": ("timm_model_name", "attentional_pool"),
    "text_cfg": ("hf_model_name", "embed_cls", "no_causal_mask"),
}


def check_architecture(architecture: Mapping[str, Any]) -> None:
    """UserError unless both towers are OpenAI's and the text's states have as many numbers as a vector. No torch."""
    parts = {part: architecture.get(part, {}) if part else architecture for part in FOREIGN}
    found = [key for part, keys in FOREIGN.items() for key in keys if parts[part].get(key)]
    if isinstance(parts["vision_cfg"].get("layers"), list):
        found.append("layers of a ResNet")
    if found:
        raise UserError(f"feature fusion needs CLIP's own two transformers, not {', '.join(found)}", None,
                        "an architecture like ViT-B-32-quickgelu, or `fusion: score`")
    width, dimension = parts["text_cfg"].get("width", 512), architecture["embed_dim"]
    if width != dimension:
        raise UserError("feature fusion needs a text tower as wide as the vector, "
                        f"not width {width} for embed_dim {dimension}", None,
                        f"\"width\": {dimension} in text_cfg, or `fusion: score`")


def fusion_heads(dimension: int) -> int:
    """UniIR's 12 heads of 64 numbers; below CLIP's own sizes as many as the vector has room for."""
    return 12 if dimension >= 512 else max(1, dimension // 64)


def new_fused_model(architecture: Mapping[str, Any], seed: int | None = None) -> Any:
    """Both towers and the layers above them, random, in eval mode; the towers are CLIP_SF's of the same seed."""
    import open_clip
    import torch
    from torch.utils.checkpoint import checkpoint

    class FusedClip(open_clip.CLIP):
        """UniIR's names: OpenAI's without text_projection, and `t5_layers`."""

        def __init__(self, **config: Any) -> None:
            super().__init__(**config)
            self.text_projection = None  # drawn with the rest, so that the towers equal CLIP_SF's; never used
            self.t5_layers = _fusion_layers(config["embed_dim"])

        def fuse(self, both_BSD: Tensor) -> Tensor:
            """Mean over the positions of both towers' states after the layers: [B, D]."""
            if self.transformer.grad_checkpointing and torch.is_grad_enabled():
                return checkpoint(self._fused, both_BSD, use_reentrant=False)
            return self._fused(both_BSD)

        def _fused(self, both_BSD: Tensor) -> Tensor:
            return self.t5_layers(inputs_embeds=both_BSD).last_hidden_state.float().mean(dim=1)

    return new_model(architecture, seed, FusedClip)


def _fusion_layers(dimension: int) -> Any:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Stack

    # Two layers over vectors that are there already: T5's vocabulary is never used, and goes.
    layers = T5Stack(T5Config(vocab_size=2, d_model=dimension, num_layers=2, num_heads=fusion_heads(dimension),
                              use_cache=False, is_encoder_decoder=False))
    layers.embed_tokens = None  # type: ignore[assignment]
    return layers


class FeatureFusionEncoder(ClipEncoder):
    """Texts, images, and both as float32 vectors of one space; every vector has seen both towers."""

    def __init__(self, architecture: Mapping[str, Any], model: Any, device: str, precision: str):
        import torch

        super().__init__(architecture, model, device, precision)
        self.no_text: Tensor = self.tokenizer([""]).to(device)
        self.no_image = torch.zeros(1, 3, *self.image_size, device=device)  # after normalisation

    def prepare(self, item: Item) -> Prepared:
        """Tokenise, resize and crop. A text of "" is no text; what is missing stays out, `embed` stands in for it."""
        tokens = self.tokenizer([item.text])[0].numpy() if item.text else None
        return Prepared(tokens, None if item.image is None else self.images.cut(item.image))

    def embed(self, batch: Sequence[Prepared]) -> Tensor:
        """float32 [B, D] on the device, with gradients where the caller's mode allows them (for training)."""
        import torch

        if not batch:
            return torch.zeros(0, self.dimension, device=self.device)
        with arithmetic(self.device, self.precision):
            texts_BLD = self._positions([each.tokens for each in batch], self.no_text, self._text_positions,
                                        lambda tokens_BL: tokens_BL.to(self.device, non_blocking=True))
            images_BPD = self._positions([each.pixels for each in batch], self.no_image, self._image_positions,
                                         self.images.normalised)
            both_BSD = torch.cat([texts_BLD, images_BPD], dim=1)
            return self._in_parts(self.model.fuse, both_BSD, both_BSD.shape[1], _FUSION_WIDTH)

    def _positions(self, inputs: Sequence[np.ndarray | None], blank: Tensor, tower: Callable[[Tensor], Tensor],
                   ready: Callable[[Tensor], Tensor]) -> Tensor:
        """The tower's states [B, positions, D]; the blank is run once, behind the others, for all that lack one."""
        import numpy as np
        import torch

        given = [each for each in inputs if each is not None]
        is_complete = len(given) == len(inputs)
        distinct = [ready(torch.from_numpy(np.stack(given)))] if given else []
        places = iter(range(len(given)))
        order = [len(given) if each is None else next(places) for each in inputs]
        states = tower(torch.cat([*distinct, *([] if is_complete else [blank])]))
        return states if is_complete else states.index_select(0, torch.tensor(order, device=self.device))

    def _text_positions(self, tokens_BL: Tensor) -> Tensor:
        return self._in_parts(lambda part: text_positions(self.model, part, without_gradients(self._text_blocks)),
                              tokens_BL, tokens_BL.shape[1], 4 * self._widths[0])

    def _image_positions(self, pixels_BCHW: Tensor) -> Tensor:
        return self._in_parts(self._states_of_images, pixels_BCHW, self._image_length, 4 * self._widths[1])

    def _states_of_images(self, pixels_BCHW: Tensor) -> Tensor:
        visual = self.model.visual
        blocks = without_gradients(self._image_blocks) or visual.transformer
        return visual.ln_post(blocks(visual._embeds(pixels_BCHW))) @ visual.proj
