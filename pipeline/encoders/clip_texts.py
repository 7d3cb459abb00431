"""Texts for CLIP towers: open_clip's tokenizers, and no longer a batch than its vectors need.

Texts are cut behind the last end marker of their batch where the tower is causal and reads its result at that marker,
so that what follows cannot matter; elsewhere they keep their full length.
"""

# Shapes: B items, L tokens, W width of the text tower.

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.support.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def new_tokenizer(architecture: Mapping[str, Any]) -> Any:
    """The architecture's tokenizer: a list of texts in, int64 [texts, context length] out."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    config = architecture["text_cfg"]
    options = {"context_length": config.get("context_length", 77), **(config.get("tokenizer_kwargs") or {})}
    name, mode = config.get("hf_tokenizer_name"), config.get("tokenizer_mode")
    if name:
        try:
            return HFTokenizer(name, tokenizer_mode=mode, **options)
        except OSError as error:
            raise UserError(f"tokenizer '{name}' cannot be fetched", str(error),
                            "run once with network access") from error
    tokenizer = SimpleTokenizer(**options)
    if config.get("vocab_size", tokenizer.vocab_size) < tokenizer.vocab_size:
        _cut_vocabulary(tokenizer, config["vocab_size"])
    return tokenizer


def _cut_vocabulary(tokenizer: Any, size: int) -> None:
    """CLIP's own vocabulary, only smaller: 512 byte tokens, the first merges, the start and the end marker.

    Byte pair merges apply in order, so the first ones alone are a complete tokenizer; rarer words take more
    tokens. The end marker stays the largest number, which is where CLIP reads its result.
    """
    merges = size - 512 - 2
    if merges < 0:
        raise UserError(f"vocab_size {size} cannot hold CLIP's byte tokens", None, "vocab_size: 514 or more")
    words = list(tokenizer.encoder)  # in the order of their numbers
    tokenizer.encoder = {word: number for number, word in enumerate(words[:512 + merges] + words[-2:])}
    tokenizer.decoder = {number: word for word, number in tokenizer.encoder.items()}
    tokenizer.bpe_ranks = {pair: rank for pair, rank in tokenizer.bpe_ranks.items() if rank < merges}
    tokenizer.all_special_ids = [size - 2, size - 1]
    tokenizer.sot_token_id, tokenizer.eot_token_id = tokenizer.all_special_ids
    tokenizer.vocab_size = size


def needed_length(model: Any, tokens_BL: Tensor) -> int:
    """How many leading tokens of the batch decide its vectors: all, unless what follows provably cannot.

    It cannot in a causal tower that is read at the end marker (the first largest number, or `eos_id`).
    """
    tower, pool, end_of_text = _text_tower(model)
    is_causal = getattr(tower, "attn_mask", None) is not None and getattr(tower, "cls_emb", None) is None
    if not is_causal or pool not in ("argmax", "eos"):
        return tokens_BL.shape[1]
    marked_BL = tokens_BL if pool == "argmax" else tokens_BL.eq(end_of_text or 0).int()
    return int(marked_BL.argmax(dim=-1).max()) + 1


def _text_tower(model: Any) -> tuple[Any, str | None, int | None]:
    """The module that holds the text tower, how its result is read, and the end marker it may be read at."""
    if hasattr(model, "text"):
        return model.text, getattr(model.text, "pool_type", None), getattr(model.text, "eos_id", None)
    return model, model.text_pool_type, model.text_eos_id


def text_positions(model: Any, tokens_BL: Tensor) -> Tensor:
    """The text tower's state at every position, after its last norm: [B, L, W]. Causal towers only, any L it holds."""
    tower, length = _text_tower(model)[0], tokens_BL.shape[1]
    hidden_BLW = tower.token_embedding(tokens_BL) + tower.positional_embedding[:length]
    return tower.ln_final(tower.transformer(hidden_BLW, attn_mask=tower.attn_mask[:length, :length]))


def encode_short_texts(model: Any, tokens_BL: Tensor) -> Tensor:
    """open_clip's encode_text for fewer tokens than its causal mask, which that method insists on."""
    from open_clip.transformer import text_global_pool

    tower, pool, end_of_text = _text_tower(model)
    ends_BW = text_global_pool(text_positions(model, tokens_BL), tokens_BL, pool, end_of_text)
    projection = tower.text_projection
    if projection is None:
        return ends_BW
    return projection(ends_BW) if callable(projection) else ends_BW @ projection
