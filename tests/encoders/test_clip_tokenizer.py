"""CLIP's tokenizer with a cut vocabulary, against open_clip's own over a vocabulary file cut short."""

from __future__ import annotations

import functools
import gzip
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.encoders.clip_texts import new_tokenizer
from pipeline.support.errors import UserError

ALPHABET = "abcdefghijklmnopqrstuvwxyz ETAO0123456789.,'!?&<>_\t\n\u00e9\u00df\u4e2d\u0301\U0001f600"
SOME_TEXT = st.text(ALPHABET, max_size=60) | st.sampled_from(["<end_of_text>", "a <end_of_text> b"])


@settings(max_examples=60, deadline=None)
@given(SOME_TEXT, st.sampled_from([514, 1000, 4096]))
def test_a_cut_vocabulary_is_the_one_of_the_first_merges(text: str, size: int) -> None:
    cut, whole = cut_tokenizer(size), merged_tokenizer(size)
    assert cut.encode(text) == whole.encode(text)
    tokens = cut([text])
    assert torch.equal(tokens, whole([text])) and int(tokens.max()) == size - 1


@functools.cache
def cut_tokenizer(size: int) -> Any:
    return new_tokenizer({"text_cfg": {"context_length": 24, "vocab_size": size}})


@functools.cache
def merged_tokenizer(size: int) -> Any:
    """open_clip's tokenizer over a vocabulary file that ends after the first merges."""
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    with tempfile.NamedTemporaryFile(suffix=".txt.gz") as file:
        file.write(gzip.compress("\n".join(lines[:1 + size - 514]).encode()))
        file.flush()
        return SimpleTokenizer(file.name, context_length=24)


def test_the_full_vocabulary_is_left_alone() -> None:
    tokens_BL = new_tokenizer({"text_cfg": {"context_length": 24}})(["hello world"])
    assert tokens_BL[0, :5].tolist() == [49406, 3306, 1002, 49407, 0]


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="vocab_size 500"):
        cut_tokenizer(500)
