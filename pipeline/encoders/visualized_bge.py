"""Visualized BGE: a text encoder that reads the patches of an image as further tokens of its own sequence.

Definition: Zhou et al., "VISTA: Visualized Text Embedding For Universal Multi-Modal Retrieval" (2024), and what its
published code computes in eval mode: [CLS], the image's projected patches, the rest of the text; the vector is the
state at [CLS], of length 1. Patches have positions from 1 and no token type; an image alone is one with the empty
text; a text alone is plain BGE. Promises: the published files load as they are, name by name or not at all. The
trade: positions that patches take are lost to the text, which is cut where the authors' code would fail.
"""

# Shapes: B items, L tokens of a text, P patches of an image, S = L + P, D dimensions of a vector.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.encoders import Item
from pipeline.encoders.checkpoints import find_file, source_identity
from pipeline.encoders.clip_images import ImageInput
from pipeline.encoders.clip_towers import architecture_hash
from pipeline.encoders.model_directories import directory_identity, model_directory, read_config
from pipeline.encoders.precision import arithmetic, check_precision
from pipeline.encoders.visualized_bge_towers import load_model, new_model, read_vision
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_FEWEST_TOKENS = 3  # the two markers and one of the text


@dataclass(frozen=True)
class Params:
    """All that may change the vectors.

    text_model:             directory with config.json and the tokenizer of bge-base-en-v1.5 or bge-m3 (its weights
                            are not read), or a Hugging Face repository, which needs `revision`
    vision:                 eva02_base_patch16_clip_224 (base), eva02_large_patch14_clip_224 (m3), or a JSON file:
                            {"architecture": one of the two, "depth": 2, ...}
    revision:               commit (40 hex digits) of the text model's repository
    weights:                Visualized_base_en_v1.5.pth, Visualized_m3.pth, or safetensors of the same names
    seed:                   random weights, instead of `weights`
    text_tokens:            the most tokens of a text without image, its two markers among them; null: as many as the
                            model has positions (512 for base, 8192 for m3)
    text_tokens_with_image: the same beside an image; null: as many as its patches leave (316 for base, 7936 for m3)
    """

    text_model: str
    vision: str
    revision: str | None = None
    weights: str | None = None
    seed: int | None = None
    text_tokens: int | None = None
    text_tokens_with_image: int | None = None


class Prepared(NamedTuple):
    """One item: tokens int64 [L] with both markers, cut to what fits; pixels uint8 [height, width, 3]."""

    tokens: np.ndarray
    pixels: np.ndarray | None


def identity(params: Params) -> dict[str, Any]:
    """What the fingerprint sees: text model, image tower and weights by content (or commit, or seed). No torch."""
    found = {"text_model": directory_identity(params.text_model, params.revision, with_weights=False),
             "architecture": architecture_hash(read_vision(params.vision)),
             "text_tokens": [params.text_tokens, params.text_tokens_with_image],
             **source_identity(params.weights, params.seed)}
    if params.seed is not None:
        found |= {package: version(package) for package in ("timm", "transformers")}  # which draw the weights
    return found


def build(params: Params, device: str, precision: str) -> VisualizedBge:
    """The encoder on `device` ("cpu", "cuda:1"); precision is fp32 (the authors' default), bf16 or fp16."""
    check_precision(precision)
    source_identity(params.weights, params.seed)  # the same mistakes are refused with or without a plan
    vision, directory = read_vision(params.vision), model_directory(params.text_model, params.revision, False)
    config = read_config(directory)
    tokenizer = _new_tokenizer(directory, config)
    if params.weights is None:
        model = new_model(config, vision, params.seed or 0)
    else:
        model = load_model(config, vision, find_file(params.weights, "weights file"))
    limits = _text_limits(params, model)
    return VisualizedBge(model, tokenizer, limits, device, precision)


def _new_tokenizer(directory: Path, config: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    where, do = str(directory), "name the directory with all files of bge-base-en-v1.5 or bge-m3 (or copy them anew)"
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt", "sentencepiece.bpe.model")):
        raise UserError("this directory holds no tokenizer", where, do)  # transformers would make an empty one
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the files decide which: OSError, ValueError, KeyError, or one of Rust's
        raise UserError(f"the tokenizer cannot be read: {error}", where, do) from error
    held = config.get("vocab_size", 0)
    if len(tokenizer) > held:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the text model {held}", where, do)
    if tokenizer("")["input_ids"] != [tokenizer.cls_token_id, tokenizer.sep_token_id]:
        raise UserError("the tokenizer does not put a text between two markers, as BGE needs", where, do)
    return tokenizer


def _text_limits(params: Params, model: Any) -> tuple[int, int]:
    """The most tokens of a text without and with an image; UserError if more are asked for than there are positions."""
    config, num_patches = model.text.config, model.visual.patch_embed.num_patches
    # XLM-R counts a text's positions from the one after the padding token's
    skipped = config.pad_token_id + 1 if config.model_type == "xlm-roberta" else 0
    positions = config.max_position_embeddings - skipped
    found = []
    for name, most in (("text_tokens", positions), ("text_tokens_with_image", positions - num_patches)):
        asked = getattr(params, name)
        limit = most if asked is None else asked
        if not _FEWEST_TOKENS <= limit <= most:
            raise UserError(f"{name} is {limit}, this model can have {_FEWEST_TOKENS} to {most}", None,
                            f"{name}: {most}" if most >= _FEWEST_TOKENS else "another image tower, with fewer patches")
        found.append(limit)
    return found[0], found[1]


class VisualizedBge:
    """Texts, images, and both as float32 vectors of length 1."""

    modalities = frozenset({"text", "image", "image,text"})

    def __init__(self, model: Any, tokenizer: Any, limits: tuple[int, int], device: str, precision: str):
        """`limits`: the most tokens of a text without and with an image."""
        self.device, self.precision = device, precision
        self.model = model.to(device).eval()  # in train mode it would drop what it should read
        self.tokenizer, self.limits = tokenizer, limits
        self.dimension: int = model.text.config.hidden_size
        self.images = ImageInput(model.visual.patch_embed.img_size, None, device)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what the image tower sees: decoders need not give much more."""
        return self.images.size

    def prepare(self, item: Item) -> Prepared:
        """Tokenise, resize and crop. No text is the empty text: the two markers alone."""
        import numpy as np

        limit = self.limits[item.image is not None]
        tokens = self.tokenizer(item.text or "", truncation=True, max_length=limit)["input_ids"]
        return Prepared(np.array(tokens, np.int64), None if item.image is None else self.images.cut(item.image))

    def encode(self, batch: Sequence[Prepared]) -> np.ndarray:
        """float32 [B, D], each of length 1, one row per prepared item in order."""
        import torch

        with torch.inference_mode():
            return self.embed(batch).cpu().numpy()

    def embed(self, batch: Sequence[Prepared]) -> Tensor:
        """float32 [B, D] on the device, with gradients where the caller's mode allows them."""
        import torch
        from torch.nn.functional import normalize

        vectors_BD = torch.zeros(len(batch), self.dimension, device=self.device)
        with arithmetic(self.device, self.precision):
            for has_image, tower in ((False, self._texts), (True, self._both)):
                rows = [row for row, prepared in enumerate(batch) if (prepared.pixels is not None) == has_image]
                if rows:
                    states = tower([batch[row] for row in rows])[:, 0].float()
                    vectors_BD = vectors_BD.index_add(0, torch.tensor(rows, device=self.device), states)
        return normalize(vectors_BD, dim=-1)

    def _texts(self, batch: Sequence[Prepared]) -> Tensor:
        """The text model's states [B, L, D], as of any BGE."""
        tokens_BL, mask_BL = self._padded(batch)
        found: Tensor = self.model.text(input_ids=tokens_BL, attention_mask=mask_BL).last_hidden_state
        return found

    def _both(self, batch: Sequence[Prepared]) -> Tensor:
        """The states [B, S, D] of [CLS], the patches of an image, and the rest of the text."""
        import torch

        tokens_BL, mask_BL = self._padded(batch)
        patches_BPD = self._patches(batch)
        embeddings = self.model.text.embeddings
        words_BLD = embeddings.word_embeddings(tokens_BL)
        # The model adds the type to all that it is given, the authors to words only: here it is taken away beforehand.
        typeless_BPD = patches_BPD - embeddings.token_type_embeddings.weight[0]
        both_BSD = torch.cat([words_BLD[:, :1], typeless_BPD, words_BLD[:, 1:]], dim=1)
        mask_BS = torch.cat([mask_BL.new_ones(patches_BPD.shape[:2]), mask_BL], dim=1)  # [CLS] and patches are all 1
        # From 0 and without a gap: for m3 too, though its texts alone start at 2.
        positions_1S = torch.arange(both_BSD.shape[1], device=self.device)[None]
        found: Tensor = self.model.text(inputs_embeds=both_BSD, attention_mask=mask_BS, position_ids=positions_1S,
                                        token_type_ids=torch.zeros_like(positions_1S)).last_hidden_state
        return found

    def _patches(self, batch: Sequence[Prepared]) -> Tensor:
        """Projected states [B, P, D] of the patches after the last block, before the tower's last norm."""
        import numpy as np
        import torch

        pixels_BHWC = torch.from_numpy(np.stack([prepared.pixels for prepared in batch if prepared.pixels is not None]))
        states_BPD, = self.model.visual.forward_intermediates(
            self.images.normalised(pixels_BHWC), indices=1, norm=False, output_fmt="NLC", intermediates_only=True)
        found: Tensor = self.model.visual_proj(states_BPD)
        return found

    def _padded(self, batch: Sequence[Prepared]) -> tuple[Tensor, Tensor]:
        """Tokens and mask, int64 [B, L], of the longest text of the batch."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        texts = [torch.from_numpy(prepared.tokens) for prepared in batch]
        tokens_BL = pad_sequence(texts, batch_first=True, padding_value=self.model.text.config.pad_token_id)
        mask_BL = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        return tokens_BL.to(self.device, non_blocking=True), mask_BL.to(self.device, non_blocking=True)
