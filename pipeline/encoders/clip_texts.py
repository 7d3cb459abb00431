"""Texts for CLIP towers: open_clip's tokenizers, and no longer a batch than its vectors need.

Texts are cut behind the last end marker of their batch where the tower is causal and reads its result at that marker,
so that what follows cannot matter; elsewhere they keep their full length.
"""

# Shapes: B items, L tokens, W width of the text tower.

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.encoders.clip_blocks import Blocks, projected
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
    tower, pool, _ = _text_tower(model)
    is_causal = getattr(tower, "attn_mask", None) is not None and getattr(tower, "cls_emb", None) is None
    if not is_causal or pool not in ("argmax", "eos"):
        return tokens_BL.shape[1]
    return int(_read_at(model, tokens_BL).max()) + 1


def _text_tower(model: Any) -> tuple[Any, str | None, int | None]:
    """The module that holds the text tower, how its result is read, and the end marker it may be read at."""
    if hasattr(model, "text"):
        return model.text, getattr(model.text, "pool_type", None), getattr(model.text, "eos_id", None)
    return model, model.text_pool_type, model.text_eos_id


def text_transformer(model: Any) -> Any:
    """The text tower's transformer if the result is the state of one position; else None."""
    tower, pool, _ = _text_tower(model)
    return getattr(tower, "transformer", None) if pool in ("first", "last", "argmax", "eos") else None


def _read_at(model: Any, tokens_BL: Tensor) -> Tensor:
    """The position of each text at which open_clip reads the result: [B]."""
    tower, pool, end_of_text = _text_tower(model)
    length = tokens_BL.shape[1]
    if getattr(tower, "cls_emb", None) is not None:  # stands behind the text, and is read whatever `pool` says
        return tokens_BL.new_full(tokens_BL.shape[:1], length)
    if pool in ("first", "last"):
        return tokens_BL.new_full(tokens_BL.shape[:1], 0 if pool == "first" else length - 1)
    return (tokens_BL if pool == "argmax" else tokens_BL.eq(end_of_text or 0).int()).argmax(dim=-1)


def _embedded(tower: Any, tokens_BL: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the transformer takes: states [B, L, W], and what is added in its attention."""
    if hasattr(tower, "_embeds"):
        hidden_BLW, mask = tower._embeds(tokens_BL)
    else:  # the parts of a text tower, in a model that holds them itself
        hidden_BLW = tower.token_embedding(tokens_BL) + tower.positional_embedding[:tokens_BL.shape[1]]
        mask = tower.attn_mask
    length = hidden_BLW.shape[1]
    return hidden_BLW, None if mask is None else mask[..., :length, :length]


def text_positions(model: Any, tokens_BL: Tensor, blocks: Blocks | None = None) -> Tensor:
    """The text tower's state at every position, after its last norm: [B, L, W]. Causal towers only, any L it holds."""
    tower = _text_tower(model)[0]
    return tower.ln_final((blocks or tower.transformer)(*_embedded(tower, tokens_BL)))


def encode_texts(model: Any, tokens_BL: Tensor, blocks: Blocks | None = None) -> Tensor:
    """open_clip's encode_text, also for fewer tokens than its causal mask, which that method insists on.

    With `blocks`, they do the work of the tower's `text_transformer`, at the position that is read only.
    """
    import torch

    tower, read_at_B = _text_tower(model)[0], _read_at(model, tokens_BL)
    if blocks is None:
        rows_B = torch.arange(len(tokens_BL), device=tokens_BL.device)
        ends_BW = text_positions(model, tokens_BL)[rows_B, read_at_B]
    else:
        ends_BW = tower.ln_final(blocks(*_embedded(tower, tokens_BL), read_at_B))[:, 0]
    projection = tower.text_projection
    if projection is None:
        return ends_BW
    if callable(projection):
        return projection(ends_BW)
    return ends_BW @ projection if blocks is None else projected(ends_BW, projection)
