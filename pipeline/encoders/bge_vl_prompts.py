"""The prompts of BGE-VL-MLLM: what stands around a task's instruction, a text and an image.

Definition: the strings that the models' published code (BAAI/BGE-VL-MLLM-S1, modeling_llavanext_for_embedding.py)
puts together, to the last blank: the model has seen no others. Promises: a text that spells out the token of an image
does not become an image. The trade: such a text loses that word.
"""

from __future__ import annotations

from pipeline.encoders import Item

IMAGE = "<image>"  # stands for all tokens of the image


def prompt(item: Item) -> str:
    """What the model reads for an item: a query under its instruction, or a candidate, which never has one."""
    text = bare_text(item)
    words = [f"{text} \n"] if text or item.image is None else []
    return " ".join([_opening(item), *words, *([IMAGE] if item.image is not None else []), "[/INST]"])


def bare_text(item: Item) -> str:
    """What the item says itself. Beside an instruction, `text` has that within, and `bare_text` is the rest."""
    return _plain(item.bare_text if item.instruction else item.bare_text or item.text)


def _opening(item: Item) -> str:
    """One blank more than `join` adds, except for the query that has no instruction: so the authors have it."""
    if item.role == "candidate":
        return "[INST] "
    instruction = _plain(item.instruction)
    return f"[INST] \n <instruct> {instruction} <query> " if instruction else "[INST] \n <instruct>  <query>"


def _plain(text: str | None) -> str:
    """Without the image's token, and without half a character pair, which no tokenizer takes."""
    return (text or "").encode(errors="replace").decode().replace(IMAGE, " ")
