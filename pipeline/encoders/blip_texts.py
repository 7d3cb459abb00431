"""Texts for BLIP's text tower: BERT's uncased word pieces, with BLIP's two markers behind them.

Promises: the vocabulary is known by its content, wherever it lies; nothing is fetched that is not pinned and then
compared with that content. The trade: the tokenizer is that of the `tokenizers` library, as in every recent release
of transformers; BERT's first one, in Python, may part a rare character differently.
"""

# Shapes: B items, L tokens.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.encoders.checkpoints import find_file, weights_hash
from pipeline.encoders.model_directories import find_directory
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

REPOSITORY, REVISION = "google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594"
CONTENT = "sha256:07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"  # of its vocab.txt
ENTRIES = 30522  # in it
MARKERS = ("[DEC]", "[ENC]")  # BLIP appends both; a text that spells one out is read as that marker, as in UniIR
_NEEDED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def vocabulary_identity(tokenizer: str | None, vocabulary: int) -> str:
    """`sha256:<64 hex>` of the vocabulary; UserError if it has not as many entries as the text tower. No torch."""
    if tokenizer is None:
        _check_size(ENTRIES, vocabulary, f"{REPOSITORY}, vocab.txt")
        return CONTENT
    path = _find(tokenizer)
    _check_size(len(_read(path)), vocabulary, str(path))
    return weights_hash(path)


def new_tokenizer(tokenizer: str | None, length: int) -> Any:
    """A tokenizer that cuts texts at `length` tokens, [CLS] and [SEP] among them: `.encode(text).ids`."""
    from tokenizers.implementations import BertWordPieceTokenizer

    found = BertWordPieceTokenizer(_read(_fetch() if tokenizer is None else _find(tokenizer)), lowercase=True)
    found.add_special_tokens(list(MARKERS))
    found.enable_truncation(length)
    return found


def padded(texts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Token numbers and mask, both int64 [B, L], L the longest of the batch: what is masked changes no vector."""
    import torch

    longest = max(len(text) for text in texts)
    tokens_BL = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask_BL = torch.zeros_like(tokens_BL)
    for row, text in enumerate(texts):
        tokens_BL[row, :len(text)] = torch.from_numpy(text)
        mask_BL[row, :len(text)] = 1
    return tokens_BL, mask_BL


def _find(tokenizer: str) -> Path:
    directory = find_directory(tokenizer)
    return find_file(tokenizer if directory is None else str(directory / "vocab.txt"), "tokenizer's vocabulary")


def _fetch() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(REPOSITORY, "vocab.txt", revision=REVISION))
    except (OSError, ValueError) as error:  # no network, or no such file: all are one of these
        raise UserError(f"cannot fetch BERT's vocabulary from {REPOSITORY}", str(error).splitlines()[0],
                        "run once with network access,\n"
                        "or name a vocab.txt, or a directory with one, as `tokenizer`") from error
    if weights_hash(path) != CONTENT:
        raise UserError(f"this is not the vocabulary of {REPOSITORY}", str(path), "remove it: it is fetched again")
    return path


def _read(path: Path) -> dict[str, int]:
    """Entry -> number: one entry in a line. (Some entries are characters that str.splitlines would split at.)"""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except ValueError as error:
        raise UserError("not a vocabulary: no text in UTF-8", str(path), "name BERT's vocab.txt") from error
    entries = {entry: number for number, entry in enumerate(lines)}
    missing = [entry for entry in _NEEDED if entry not in entries]
    if missing or len(entries) != len(lines):
        what = f"lacks {', '.join(missing)}" if missing else "has the same line twice"
        raise UserError(f"not a vocabulary of BERT's: it {what}", str(path), "name BERT's vocab.txt")
    if set(MARKERS) & set(entries):
        raise UserError(f"this vocabulary holds {' or '.join(MARKERS)} already", str(path),
                        "name BERT's own vocab.txt: the markers are appended here")
    return entries


def _check_size(entries: int, vocabulary: int, where: str) -> None:
    if entries + len(MARKERS) != vocabulary:
        raise UserError(f"{entries} entries and {len(MARKERS)} markers are not the {vocabulary} of the text tower",
                        where, "tokenizer: the vocab.txt that the weights were trained with")
