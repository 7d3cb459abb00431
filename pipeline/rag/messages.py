"""Results as chat messages in OpenAI's format: a list of {"role", "content"}, texts and images in turn.

captioning     UniRAG's few-shot prompt: k pairs of image and caption, then the query's image and the task
image-prompt   UniRAG's sequence for image generators: k pairs of caption and image, then the query's caption
question       k candidates, numbered, as context; then the query, to be answered from them

Prompt strings of the first are UniRAG's (src/unirag/prompts and caption_generation_inference.py). Images travel inside
the messages as data URIs, which any server takes, at a third more than their bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from pipeline.rag.records import Pair, Picture, Result
from pipeline.support.errors import UserError

STYLES = ("captioning", "image-prompt", "question")
_CAPTIONER = ("You are an intelligent helpful assistant AI that is an expert in generating captions for provided "
              "images.")
_CAPTION_LAST = (
    "I have provided you {num} image(s) and their corresponding caption(s) as example(s) and one last image without a "
    "caption.\n\nGenerate the caption for the last remaining image based on your understanding of the last image and "
    "provided image-caption examples.\nOnly respond with the caption; do not say any other words or explain.")
_CAPTION_ONE = ("I have provided you an image. Generate the caption for this image based on your understanding of the "
                "image.\nOnly respond with the caption; do not say any other words or explain.")
_ANSWER = "Answer the question from the numbered context. Only respond with the answer; do not explain."

Content = list[dict[str, Any]]
Messages = list[dict[str, Any]]


def to_messages(result: Result, k: int, style: str = "captioning", prompt: str | None = None,
                longest_side: int | None = None) -> Messages:
    """Messages for one query with at most `k` examples or candidates, best first (0: none).

    `prompt` replaces the words of the task (in captioning, {num} in it is the number of examples; image-prompt has
    none of its own). `longest_side` makes images smaller. UserError: a style that is not one of STYLES, a query
    without what the style needs, a picture that cannot be read.
    """
    if style not in STYLES:
        raise UserError(f"there is no style '{style}'", do=f"styles: {', '.join(STYLES)}")
    if k < 0:
        raise UserError(f"k is {k}; it is the number of examples, 0 or more")
    if style == "question":
        return _question(result, k, prompt or _ANSWER, longest_side)
    pairs = list(islice(result.pairs(), k))
    if style == "captioning":
        return _captioning(result, pairs, prompt, longest_side)
    return _image_prompt(result, pairs, prompt, longest_side)


def message_lines(results: Iterable[Result], k: int, style: str = "captioning", prompt: str | None = None,
                  longest_side: int | None = None) -> Iterator[dict[str, Any]]:
    """{"query_id", "messages", "examples": ids of the candidates that were used} per query, ready for JSON Lines."""
    for result in results:
        used = (list(result.candidates[:k]) if style == "question"
                else [pair.candidate for pair in islice(result.pairs(), k)])
        yield {"query_id": result.query.query_id, "messages": to_messages(result, k, style, prompt, longest_side),
               "examples": [candidate.candidate_id for candidate in used]}


def _captioning(result: Result, pairs: list[Pair], prompt: str | None, longest_side: int | None) -> Messages:
    image = result.query.image
    if image is None:
        raise UserError("a query without an image cannot be captioned", f"query {result.query.query_id}",
                        "use the style question or image-prompt")
    content: Content = []
    for number, pair in enumerate(pairs, 1):
        content += [_image(pair.image, longest_side), _text(f"Caption [{number}]: {pair.text}")]
    words = prompt or (_CAPTION_LAST if pairs else _CAPTION_ONE)
    content += [_image(image, longest_side), _text(words.replace("{num}", str(len(pairs))))]
    return [{"role": "system", "content": _CAPTIONER}, {"role": "user", "content": content}]


def _image_prompt(result: Result, pairs: list[Pair], prompt: str | None, longest_side: int | None) -> Messages:
    if not result.query.text:
        raise UserError("a query without a text describes no image", f"query {result.query.query_id}",
                        "use the style captioning or question")
    content: Content = []
    for pair in pairs:
        content += [_text(pair.text), _image(pair.image, longest_side)]
    content.append(_text(result.query.text))
    system: Messages = [{"role": "system", "content": prompt}] if prompt else []
    return [*system, {"role": "user", "content": content}]


def _question(result: Result, k: int, prompt: str, longest_side: int | None) -> Messages:
    content: Content = []
    for number, candidate in enumerate(result.candidates[:k], 1):
        content.append(_text(f"[{number}] {candidate.text or ''}".rstrip()))
        if candidate.image is not None:
            content.append(_image(candidate.image, longest_side))
    content.append(_text(f"Question: {result.query.text or ''}".rstrip()))
    if result.query.image is not None:
        content.append(_image(result.query.image, longest_side))
    return [{"role": "system", "content": prompt}, {"role": "user", "content": content}]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(picture: Picture, longest_side: int | None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": picture.data_uri(longest_side)}}
