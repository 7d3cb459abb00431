"""Texts for the towers of transformers' dual encoders: cut as their authors cut them, padded as they were trained.

Promises: an over-long text keeps the tokens that end it (CLIP reads its vector off the last one); padding never
changes a vector, since it is masked, and where a family was trained without a mask (SigLIP) it always is the same.
The trade: the limits of a few families stand here, since no file of theirs tells them.
"""

# Shapes: B texts, L tokens.

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.support.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# Lengths that the authors train and evaluate with, where the position table is longer: ALIGN's and AltCLIP's model
# cards; Chinese CLIP's own tokenize().
AUTHORS_LENGTHS = {"align": 64, "altclip": 77, "chinese_clip": 52}
# Trained on lower-case texts padded to their full length, without a mask: big_vision's SigLIP and SigLIP 2.
UNMASKED = ("siglip", "siglip2")
# Their first positions belong to padding: the table has as many more rows as its padding index says, and one.
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "altclip_text_model")
FEWEST_TOKENS = 3  # a beginning, an end, and one between them


class PaddedTexts:
    """From a text to tokens, and from tokens to what a text tower takes."""

    def __init__(self, tokenizer: Any, config: Any, device: str):
        """`config`: the whole model's, as transformers reads it."""
        self.tokenizer, self.device = tokenizer, device
        self.positions = _positions(config)
        self.is_unmasked = config.model_type in UNMASKED
        self.longest = AUTHORS_LENGTHS.get(config.model_type) or min(self.positions, tokenizer.model_max_length)

    def limit(self, asked: int | None, option: str) -> int:
        """The most tokens of a text: as asked, or the model's own. UserError if the model has no such positions."""
        if asked is not None and not FEWEST_TOKENS <= asked <= self.positions:
            raise UserError(f"{option}={asked} does not fit: this model takes {FEWEST_TOKENS} to {self.positions}",
                            None, f"leave it out for the model's own {self.longest}")
        return self.longest if asked is None else asked

    def tokens(self, text: str, limit: int) -> np.ndarray:
        """int64 [L], the tokens that begin and end it included; L is at most `limit`."""
        import numpy as np

        text = text.lower() if self.is_unmasked and _lowers(self.tokenizer) else text
        text = text.encode(errors="replace").decode()  # half a character pair, which no tokenizer takes
        return np.asarray(self.tokenizer(text, truncation=True, max_length=limit)["input_ids"], np.int64)

    def padded(self, texts: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """input_ids and, unless the family goes without, attention_mask: int64 [B, L] on the device."""
        import torch

        length = self.positions if self.is_unmasked else max(len(tokens) for tokens in texts)
        tokens_BL = torch.full((len(texts), length), self.tokenizer.pad_token_id or 0)
        mask_BL = torch.zeros_like(tokens_BL)
        for row, tokens in enumerate(texts):
            tokens_BL[row, :len(tokens)] = torch.from_numpy(tokens)
            mask_BL[row, :len(tokens)] = 1
        found = {"input_ids": tokens_BL} if self.is_unmasked else {"input_ids": tokens_BL, "attention_mask": mask_BL}
        return {name: values.to(self.device, non_blocking=True) for name, values in found.items()}


def _positions(config: Any) -> int:
    """How many tokens the text tower has positions for."""
    text = config.get_text_config()
    found = int(text.max_position_embeddings)
    return found - text.pad_token_id - 1 if text.model_type in OFFSET_POSITIONS else found


def _lowers(tokenizer: Any) -> bool:
    """SigLIP's tokenizers say so; the one of SigLIP 2's fixed sizes is Gemma's, which says so and does not do it."""
    return bool(tokenizer.init_kwargs.get("do_lower_case", True))
