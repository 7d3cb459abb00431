"""Any dense sentence-transformers model, from a directory or a pinned repository: text, images, or both in one input.

Promises: texts stay texts (the library takes one that looks like an image's path or address for the image); no
instruction is dropped in silence; a batch may mix what the model takes, because each kind is given to it apart; no code
from a directory runs unless asked. The trade: pictures are resized and texts tokenised in `encode`, where the library
does both for a whole batch, not in loader processes.
"""

# Shapes: B items, D dimensions.

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.encoders import Item
from pipeline.encoders.model_directories import directory_identity, find_directory, model_directory
from pipeline.encoders.precision import arithmetic, check_precision, weights_dtype
from pipeline.encoders.prompted import Prepared, probes, warn_unless_cosine
from pipeline.encoders.sentence_transformers_loading import (has_many_weights, load_model, refuse_if_used,
                                                             reserved_words)
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

ORDERS = ("text,image", "image,text")
_CHOICES = {"instruction_as": ("text", "prompt"), "fusion": ("native", "sum"), "content_order": ORDERS}


@dataclass(frozen=True)
class Params:
    """All that may change the vectors.

    model:                a directory that SentenceTransformer.save wrote, or a hub repository (`owner/name`)
    revision:             commit (40 hex digits) of the repository
    query_prompt:         the prompt of queries; null: the model's own named `query`, or its default
    candidate_prompt:     the prompt of candidates; null: the model's own (`document`, `passage`, `corpus`)
    instruction_as:       "text": the final text, instruction included, is the text; "prompt": a query's instruction
                          replaces `query_prompt`, and its bare text is the text
    instruction_template: what becomes of such an instruction, e.g. "Instruct: {instruction}\\nQuery: "
    fusion:               an item of text and image is one input ("native"), or the sum of two vectors ("sum")
    content_order:        of such an input in a chat template: "text,image" or "image,text"
    truncate_dim:         only the first so many dimensions
    max_length:           tokens kept of a text; null: the model's own
    trust_remote_code:    run the code that comes with the model; never without having read it
    """

    model: str
    revision: str | None = None
    query_prompt: str | None = None
    candidate_prompt: str | None = None
    instruction_as: str = "text"
    instruction_template: str = "{instruction}"
    fusion: str = "native"
    content_order: str = "text,image"
    truncate_dim: int | None = None
    max_length: int | None = None
    trust_remote_code: bool = False


def identity(params: Params) -> dict[str, Any]:
    """What the fingerprint sees: the model by content or commit, and how items are put to it. No torch.

    Not the library's version: like our own code, it is changed on purpose and seldom changes a vector.
    """
    _check(params)
    names = ("query_prompt", "candidate_prompt", "instruction_as", "instruction_template", "fusion", "content_order",
             "truncate_dim", "max_length")
    found = {**directory_identity(params.model, params.revision), **{name: getattr(params, name) for name in names}}
    directory = find_directory(params.model)
    if params.trust_remote_code and directory is not None:
        code = {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in directory.rglob("*.py")}
        found["code"] = "sha256:" + hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()
    return found


def build(params: Params, device: str, precision: str) -> SentenceTransformersEncoder:
    """The encoder on `device`; precision is fp32, bf16 or fp16."""
    _check(params)
    check_precision(precision)
    directory = model_directory(params.model, params.revision)
    # Without a type each file decides on its own: with bf16 weights fp32 would be a name without meaning.
    dtype = weights_dtype(precision if has_many_weights(directory) else "fp32")
    model, missing = load_model(directory, device, dtype, params.trust_remote_code, truncate_dim=params.truncate_dim)
    if params.max_length is not None:
        model.max_seq_length = params.max_length
    warn_unless_cosine(params.model, model.similarity_fn_name)
    encoder = SentenceTransformersEncoder(model, params, device, precision)
    refuse_if_used(missing, encoder.probe, directory)
    return encoder


class SentenceTransformersEncoder:
    """A SentenceTransformer behind the contract. `model` is the library's own object."""

    def __init__(self, model: Any, params: Params, device: str, precision: str):
        self.model, self.params, self.device, self.precision = model, params, device, precision
        self.has_messages = "message" in model.modalities  # a chat template: prompts then reach images too
        self.takes_images = model.supports("image")
        self.reserved = reserved_words(model)
        kinds = {kind for kind in ("text", "image") if model.supports(kind)}
        is_joined = any(model.supports(pair) for pair in (("text", "image"), ("image", "text")))
        if is_joined or (params.fusion == "sum" and len(kinds) == 2):
            kinds.add("image,text")
        if params.fusion == "sum" and len(kinds) < 3:
            raise UserError(f"this model takes {' and '.join(sorted(kinds))} only: there is nothing to sum",
                            params.model, "fusion: native")
        self.modalities = frozenset(kinds)
        probe = self.prepare(self._probes()[0])
        self.dimension = int(self._vectors([probe], probe.text is not None, probe.image is not None).shape[1])

    def _probes(self) -> list[Item]:
        """One item of each kind that the model takes."""
        return [item for kind, item in probes().items() if kind in self.modalities]

    def probe(self) -> np.ndarray:
        """float32 [B, D], B from 1 to 3: vectors of one item of each kind."""
        return self.encode([self.prepare(item) for item in self._probes()])

    def prepare(self, item: Item) -> Prepared:
        """What the model is given: text and prompt chosen, the image as uint8 [H, W, 3]."""
        text, prompt = (words and self.reserved.sub(" ", words) for words in self._wording(item))
        return Prepared.of(item, text, prompt)

    def _wording(self, item: Item) -> tuple[str | None, str | None]:
        """Text and prompt. An instruction that cannot reach the model as a prompt stays in the text."""
        if self.params.instruction_as == "prompt" and item.instruction:
            if self.has_messages or item.image is None or (self.params.fusion == "sum" and item.bare_text):
                return item.bare_text, self.params.instruction_template.replace("{instruction}", item.instruction)
            return item.text, ""
        return item.text, self.params.query_prompt if item.role == "query" else self.params.candidate_prompt

    def encode(self, batch: Sequence[Prepared]) -> np.ndarray:
        """float32 [B, D]; the library normalises if the model's own last module does. A text is 0 to an image model."""
        vectors_BD = np.zeros((len(batch), self.dimension), np.float32)
        for has_text, has_image, rows in self._groups(batch):
            items = [batch[row] for row in rows]
            if has_text and not (has_image or items[0].text):
                vectors_BD[rows] += self._empty_text(items[0])
            else:
                vectors_BD[rows] += self._vectors(items, has_text, has_image)
        return vectors_BD

    def _groups(self, batch: Sequence[Prepared]) -> Iterator[tuple[bool, bool, list[int]]]:
        """Rows that can be given to the model in one call: of one kind, role and prompt; empty texts apart."""
        groups: defaultdict[tuple[bool, bool, bool, str, str | None], list[int]] = defaultdict(list)
        for row, item in enumerate(batch):
            has_text, has_image = item.text is not None and "text" in self.modalities, item.image is not None
            parts = {(has_text, False), (False, has_image)} if self.params.fusion == "sum" else {(has_text, has_image)}
            for part in parts - {(False, False)}:
                groups[*part, not item.text, item.role, item.prompt].append(row)
        for (has_text, has_image, *_), rows in groups.items():
            yield has_text, has_image, rows

    def _empty_text(self, item: Prepared) -> np.ndarray:
        """float32 [1, D]: 0 if the tokenizer makes nothing of it, which no model takes."""
        import torch

        try:
            return self._vectors([item], True, False)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError):
            return np.zeros((1, self.dimension), np.float32)

    def _vectors(self, items: Sequence[Prepared], has_text: bool, has_image: bool) -> np.ndarray:
        """float32 [B, D] of items of one role and prompt, of which the text, the image or both are given."""
        inputs = [self._input(item, has_text, has_image) for item in items]
        try:
            return self._called(inputs, items[0])
        except ValueError:  # a text so long that what is cut off is the place of the image
            if not (has_text and has_image):
                raise
            return self._called([self._fitting(each, items[0]) for each in inputs], items[0])

    def _called(self, inputs: Sequence[Any], like: Prepared) -> np.ndarray:
        encode = self.model.encode_query if like.role == "query" else self.model.encode_document
        with arithmetic(self.device, self.precision):
            vectors_BD = encode(list(inputs), prompt=like.prompt, batch_size=len(inputs), show_progress_bar=False,
                                convert_to_tensor=True)
        return np.asarray(vectors_BD.float().cpu().numpy(), np.float32)

    def _fitting(self, given: Mapping[str, Any], like: Prepared) -> dict[str, Any]:
        """The input with as much of its text as the model takes beside the image."""
        names = ("query",) if like.role == "query" else ("document", "passage", "corpus")
        own = next((name for name in names if name in self.model.prompts), self.model.default_prompt_name)
        prompt = like.prompt if like.prompt is not None else self.model.prompts.get(own)

        def is_too_long(length: int) -> bool:
            whole = self.model.preprocess([{**given, "text": given["text"][:length]}], prompt=prompt,
                                          processing_kwargs={"text": {"truncation": False}})
            return bool(whole["input_ids"].shape[1] > self.model.max_seq_length)

        length = bisect_left(range(1, len(given["text"]) + 1), True, key=is_too_long)
        return {**given, "text": given["text"][:length]}

    def _input(self, item: Prepared, has_text: bool, has_image: bool) -> Any:
        if not self.takes_images:
            return item.text  # the library takes a text for an image's path only if the model takes images
        found: dict[str, str | Image] = {}
        for name in self.params.content_order.split(","):
            if name == "text" and has_text and item.text is not None:
                found["text"] = item.text
            if name == "image" and has_image and item.image is not None:
                found["image"] = item.picture
        return found


def _check(params: Params) -> None:
    for name, choices in _CHOICES.items():
        if (value := getattr(params, name)) not in choices:
            raise UserError(f"{name} '{value}' is not known", None, f"one of: {', '.join(choices)}")
    if "{instruction}" not in params.instruction_template:
        raise UserError("instruction_template has no {instruction}", None, 'e.g. "Instruct: {instruction}\\nQuery: "')
