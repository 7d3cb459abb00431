"""BGE-VL-MLLM (S1, S2, v1.5): a LLaVA-NeXT whose last token's state is the vector of what its prompt holds.

Definition: Zhou et al., "MegaPairs: Massive Data Synthesis for Universal Multimodal Retrieval" (2024), and the code
published with the models, which runs on one old release of transformers only; here the stock LlavaNextModel reads the
same files. The language model's head is not loaded. The trade: precision bf16 and fp16 hold the weights in that type,
unlike smaller encoders, since fp32 takes 30 GB.
"""

# Shapes: B items, L tokens of a prompt, T tiles of an image, D dimensions of a vector.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.encoders import Item
from pipeline.encoders.bge_vl_prompts import IMAGE, bare_text, prompt
from pipeline.encoders.model_directories import directory_identity, model_directory, read_config
from pipeline.encoders.precision import arithmetic, check_precision, weights_dtype
from pipeline.encoders.pretrained import load_config, load_image_processor, load_tokenizer, load_weights
from pipeline.encoders.processed_images import PIXELS, ProcessedImages
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SIDE = 512  # every image is stretched to this square before it is cut into tiles, in training and evaluation
HEAD = ("lm_head.", "language_model.lm_head.")  # weights of the language model's head: in the files, and not needed
FEWEST_TOKENS, END_TOKENS = 64, 32  # room for the prompt around a text, and for what comes after it


@dataclass(frozen=True)
class Params:
    """All that may change the vectors.

    model:           a directory, or a Hugging Face repository, which needs `revision`
    revision:        commit (40 hex digits) of the repository
    max_text_tokens: longer prompts, the tokens of an image not counted, lose the end of their text; null: what the
                     language model has positions for (32768, less those of an image), as the authors do
    """

    model: str
    revision: str | None = None
    max_text_tokens: int | None = None


class Prepared(NamedTuple):
    """One item: tokens int64 [L], the image's being a single one yet; pixels uint8 [T, 3, height, width] and sizes."""

    tokens: np.ndarray
    pixels: dict[str, np.ndarray] | None


def identity(params: Params) -> dict[str, Any]:
    """What the fingerprint sees: the directory by content or commit, the limit. No torch."""
    return {**directory_identity(params.model, params.revision), "max_text_tokens": params.max_text_tokens}


def build(params: Params, device: str, precision: str) -> BgeVlMllm:
    """The encoder on `device` ("cpu", "cuda:1"); precision is fp32, bf16 or fp16, the weights' too."""
    check_precision(precision)
    directory = model_directory(params.model, params.revision)
    kind = read_config(directory).get("model_type")
    if kind != "llava_next":
        raise UserError(f"model_type {kind!r} is not 'llava_next'", str(directory),
                        "BGE-VL-base and -large are loaded by `encoder: dual_encoder`" if kind == "clip" else None)
    from transformers import LlavaNextModel

    config = load_config(directory)
    processor = _processor(config, directory)
    images = ProcessedImages(processor.image_processor, device)
    model = load_weights(LlavaNextModel, config, directory, weights_dtype(precision), HEAD)
    return BgeVlMllm(model, processor, images, params.max_text_tokens, device, precision)


def _processor(config: Any, directory: Path) -> Any:
    """Tokenizer and image processor, which know from the model's config what older directories do not tell them."""
    from transformers import LlavaNextProcessor

    tokenizer = load_tokenizer(directory, config)
    vision = config.vision_config
    found = LlavaNextProcessor(
        load_image_processor(directory, config), tokenizer, patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy, image_token=IMAGE,
        num_additional_image_tokens=1)  # CLIP's class token, which the strategy "default" takes off again
    if found.image_token_id != config.image_token_id or found.image_token != IMAGE:
        raise UserError(f"the tokenizer's {IMAGE} is token {found.image_token_id}, the config's image token is "
                        f"{config.image_token_id}", str(directory), "both files must be those of the same model")
    tokens = tokenizer("[/INST]")["input_ids"]
    if tokens[0] != tokenizer.bos_token_id or tokens[-1] == tokenizer.eos_token_id:
        raise UserError("the tokenizer must put <s> before a prompt and nothing behind it", str(directory),
                        "download its tokenizer.json and tokenizer_config.json again")
    return found


class BgeVlMllm:
    """Texts, images, and both as float32 vectors of one space, each of length 1."""

    modalities = frozenset({"text", "image", "image,text"})
    image_size = (SIDE, SIDE)

    def __init__(self, model: Any, processor: Any, images: ProcessedImages, max_text_tokens: int | None, device: str,
                 precision: str):
        self.model, self.images = model.to(device), images
        self.device, self.precision = device, precision
        self.tokenizer = processor.tokenizer
        self.dimension: int = model.config.text_config.hidden_size
        self.image_token: int = model.config.image_token_id
        self.image_tokens = _count_image_tokens(processor)
        self.limit = _limit(max_text_tokens, model.config.text_config.max_position_embeddings - self.image_tokens)

    def prepare(self, item: Item) -> Prepared:
        """Put the prompt together and tokenise it; stretch the image to 512 x 512 and cut it into tiles."""
        if item.image is None:
            return Prepared(self._tokens(item), None)
        return Prepared(self._tokens(item), self.images.cut(item.image.resize((SIDE, SIDE))))

    def encode(self, batch: Sequence[Prepared]) -> np.ndarray:
        """float32 [B, D] of length 1, one row per prepared item in order."""
        import numpy as np
        import torch

        vectors_BD = np.zeros((len(batch), self.dimension), np.float32)
        for has_image in (False, True):  # apart, so that a short text is not padded to the length of an image
            rows = [row for row, prepared in enumerate(batch) if (prepared.pixels is not None) == has_image]
            if rows:
                with torch.inference_mode(), arithmetic(self.device, "fp32"):  # the weights have the precision
                    vectors_BD[rows] = self._encode_alike([batch[row] for row in rows]).cpu().numpy()
        return vectors_BD

    def _encode_alike(self, batch: Sequence[Prepared]) -> Tensor:
        """The last token's state after the last norm, divided by its length: all of the batch have an image, or none.

        Padding stands on the left, so that the last token is at the end; positions begin behind it.
        """
        import torch

        tokens_BL, mask_BL = self._padded([self._expanded(prepared.tokens) for prepared in batch])
        positions_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
        images = self.images.ready([prepared.pixels for prepared in batch if prepared.pixels is not None]) \
            if batch[0].pixels is not None else {}
        if images:
            images[PIXELS] = images[PIXELS].to(self.model.dtype)
        found = self.model(input_ids=tokens_BL, attention_mask=mask_BL, position_ids=positions_BL, use_cache=False,
                           **images)
        return torch.nn.functional.normalize(found.last_hidden_state[:, -1].float(), dim=-1)

    def _expanded(self, tokens_L: np.ndarray) -> np.ndarray:
        """The token of the image as often as the image has tokens."""
        import numpy as np

        return np.repeat(tokens_L, np.where(tokens_L == self.image_token, self.image_tokens, 1))

    def _padded(self, prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Tokens and mask, int64 [B, L] on the device, each prompt at the end of its row."""
        import torch

        length = max(len(tokens) for tokens in prompts)
        tokens_BL = torch.full((len(prompts), length), self.tokenizer.pad_token_id or 0)
        mask_BL = torch.zeros_like(tokens_BL)
        for row, tokens in enumerate(prompts):
            tokens_BL[row, length - len(tokens):] = torch.from_numpy(tokens)
            mask_BL[row, length - len(tokens):] = 1
        return tokens_BL.to(self.device), mask_BL.to(self.device)

    def _tokens(self, item: Item) -> np.ndarray:
        """int64 [L]; if they are too many, the text ends earlier, and what stands around it stays as it is."""
        import numpy as np

        tokens = self.tokenizer(prompt(item))["input_ids"]
        text = bare_text(item)
        while len(tokens) > self.limit and text:
            text = self._shortened(text, len(tokens) - self.limit)
            tokens = self.tokenizer(prompt(replace(item, bare_text=text, text=text)))["input_ids"]
        if len(tokens) > self.limit:  # an instruction that is too long by itself: what ends the prompt stays
            tokens = tokens[:self.limit - END_TOKENS] + tokens[-END_TOKENS:]
        return np.asarray(tokens, np.int64)

    def _shortened(self, text: str, excess: int) -> str:
        """The text without (about) that many tokens at its end."""
        ends = [end for _, end in self.tokenizer(text, add_special_tokens=False,
                                                 return_offsets_mapping=True)["offset_mapping"]]
        keep = len(ends) - excess
        cut = ends[keep - 1] if keep > 0 else 0
        return text[:min(cut, len(text) - 1)]


def _count_image_tokens(processor: Any) -> int:
    """How many tokens an image has: all are of one size, and so have as many as this one."""
    from PIL import Image

    found = processor(text=IMAGE, images=Image.new("RGB", (SIDE, SIDE)))
    return int(found["input_ids"][0].count(processor.image_token_id))


def _limit(asked: int | None, most: int) -> int:
    if asked is not None and not FEWEST_TOKENS <= asked <= most:
        raise UserError(f"max_text_tokens={asked} does not fit: this model takes {FEWEST_TOKENS} to {most}", None,
                        f"leave it out for {most}")
    return most if asked is None else asked
