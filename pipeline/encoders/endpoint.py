"""Models behind an embeddings service: a URL that takes texts and images as JSON and gives vectors.

Three shapes of request cover most services: OpenAI's (texts), Jina's (texts and images) and Voyage's (both in one
input). Promises: every item gets the vector that the service gave for it, whatever fails in between (support/http.py).
The trade: nobody here can see the weights. The fingerprint knows a model by what the user says of it, and a service
that changes its model under the same name is noticed only if `version` is changed too.
"""

# Shapes: B items, P inputs of requests (one item may have two), D dimensions.

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Dict, NamedTuple

import numpy as np

from pipeline.encoders import Item
from pipeline.support.errors import UserError
from pipeline.support.http import JsonService, Patience, Unusable, service_of

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 8 * 2**20  # of the inputs of one request: services refuse bodies of some tens of megabytes
_IMAGE_FORMATS = ("png", "jpeg")


@dataclass(frozen=True)
class Params:
    """What may change the vectors, and below it what changes only speed.

    style:         "openai" (texts; also vLLM, TEI, Ollama, ...), "jina" (texts, images; an item with both is the sum of
                   its two vectors) or "voyage" (texts, images, both in one input)
    url:           of the service, whole: https://api.openai.com/v1/embeddings
    model:         its name, as the service knows it
    dimension:     of the vectors that come; to ask for one of several, add the service's own field to `request`
    version:       your own label for the state of a model that may change under its name, such as a date
    service:       what the fingerprint knows the service by; null: host and port of `url`
    key_variable:  the environment variable that holds the key; never the key itself. null: no key
    request:       more fields for every request, such as {dimensions: 256} or {truncate: true}
    query_request, candidate_request: more fields for those of queries, or of candidates: {input_type: query}
    max_text_bytes: texts are cut to so many bytes of UTF-8; for services that refuse a text that is too long
    image_max_side: pixels; larger images are scaled down
    image_format:  "png" (exact) or "jpeg" (smaller)
    jpeg_quality:  1 to 95

    items_per_request, concurrency (requests at a time), requests_per_minute (null: no bound), retries,
    timeout (seconds without a word): none of these is in the fingerprint
    """

    style: str
    url: str
    model: str
    dimension: int
    version: str = ""
    service: str | None = None
    key_variable: str | None = None
    request: Dict[str, Any] = field(default_factory=dict)
    query_request: Dict[str, Any] = field(default_factory=dict)
    candidate_request: Dict[str, Any] = field(default_factory=dict)
    max_text_bytes: int | None = None
    image_max_side: int = 1024
    image_format: str = "png"
    jpeg_quality: int = 90
    items_per_request: int = 16
    concurrency: int = 4
    requests_per_minute: int | None = None
    retries: int = 6
    timeout: float = 120.0


class _Style(NamedTuple):
    """Name of the field that holds a request's inputs, and what an item may hold."""

    field: str
    modalities: frozenset[str]


_ALL = frozenset({"text", "image", "image,text"})
STYLES = {"openai": _Style("input", frozenset({"text"})), "jina": _Style("input", _ALL),
          "voyage": _Style("inputs", _ALL)}


class Prepared(NamedTuple):
    """An item as it is sent: its role and its inputs, each with its size as JSON; their vectors are added."""

    role: str
    inputs: list[tuple[Any, int]]


def identity(params: Params) -> dict[str, Any]:
    """What the fingerprint sees of a model that only its owner has: what identifies it, by the user's word."""
    _check(params)
    found: dict[str, Any] = {
        "style": params.style, "service": params.service or service_of(params.url), "model": params.model,
        "version": params.version, "dimension": params.dimension,
        "requests": [dict(each) for each in (params.request, params.query_request, params.candidate_request)],
        "max_text_bytes": params.max_text_bytes}
    if "image" in STYLES[params.style].modalities:
        quality = params.jpeg_quality if params.image_format == "jpeg" else None
        found["images"] = [params.image_max_side, params.image_format, quality]
    return found


def build(params: Params, device: str, precision: str) -> EndpointEncoder:
    """The encoder; device and precision change nothing. UserError if the key is not there."""
    _check(params)
    patience = Patience(params.concurrency, params.retries, params.timeout, params.requests_per_minute)
    return EndpointEncoder(params, JsonService(params.url, params.key_variable, patience))


def _check(params: Params) -> None:
    """UserError for the first option whose value cannot be meant."""
    for name, known in (("style", tuple(STYLES)), ("image_format", _IMAGE_FORMATS)):
        if (value := getattr(params, name)) not in known:
            raise UserError(f"{name} '{value}' is not known", None, f"one of: {', '.join(known)}")
    values = asdict(params)
    for name in ("dimension", "items_per_request", "concurrency", "image_max_side", "max_text_bytes",
                 "requests_per_minute", "jpeg_quality"):
        if values[name] is not None and values[name] < 1:
            raise UserError(f"{name} is {values[name]}; it must be at least 1")
    if params.retries < 0 or params.timeout <= 0:
        raise UserError(f"retries is {params.retries}, timeout {params.timeout}", None,
                        "no fewer than 0 retries, and a timeout of more than 0 seconds")
    service_of(params.url)


class EndpointEncoder:
    """Items -> requests -> vectors as the service gives them; an item without any content is the zero vector."""

    uses_device = False

    def __init__(self, params: Params, service: JsonService):
        self._params, self._service = params, service
        self.dimension = params.dimension
        self.modalities = STYLES[params.style].modalities

    def prepare(self, item: Item) -> Prepared:
        """The item's inputs as they are sent; none for an empty text, which services refuse."""
        text = self._cut(item.text or "")
        image = self._packed(item.image) if item.image is not None and "image" in self.modalities else None
        if self._params.style == "voyage":
            inputs = _one_input(text, image, self._params.image_format)
        elif self._params.style == "jina":
            inputs = [*([{"text": text}] if text else []), *([{"image": image}] if image else [])]
        else:
            inputs = [text] if text else []
        return Prepared(item.role, [(each, len(json.dumps(each))) for each in inputs])

    def _cut(self, text: str) -> str:
        kept = text.encode("utf-8", "replace")[:self._params.max_text_bytes].decode("utf-8", "ignore")
        return kept if kept.strip() else ""

    def _packed(self, image: Image) -> str:
        """The image file in base64, its longer side at most `image_max_side`."""
        from PIL.Image import Resampling

        if (longest := max(image.size)) > (most := self._params.image_max_side):
            width, height = (max(1, round(side * most / longest)) for side in image.size)
            image = image.resize((width, height), Resampling.LANCZOS)
        file = io.BytesIO()
        image.convert("RGB").save(file, self._params.image_format, quality=self._params.jpeg_quality)
        return base64.b64encode(file.getvalue()).decode()

    def encode(self, batch: Sequence[Prepared]) -> np.ndarray:
        """float32 [B, D], one row per prepared item in order, as the service gave them; UserError if it does not."""
        vectors_BD = np.zeros((len(batch), self.dimension), np.float32)
        requests = [(role, part) for role in ("query", "candidate") for part in self._parts(batch, role)]
        bodies = [self._body(role, [sent for _, sent in part]) for role, part in requests]
        answers = self._service.answers(bodies, lambda answer, number: self._read(answer, len(requests[number][1])))
        for (_, part), vectors_PD in zip(requests, answers):
            np.add.at(vectors_BD, [row for row, _ in part], vectors_PD)
        return vectors_BD

    def _parts(self, batch: Sequence[Prepared], role: str) -> Iterator[list[tuple[int, Any]]]:
        """The inputs of each request, each with its item's position in the batch."""
        part: list[tuple[int, Any]] = []
        filled = 0
        for row, item in enumerate(batch):
            for sent, size in item.inputs if item.role == role else ():
                if part and (len(part) == self._params.items_per_request or filled + size > MAX_BYTES):
                    yield part
                    part, filled = [], 0
                part.append((row, sent))
                filled += size
        if part:
            yield part

    def _body(self, role: str, inputs: list[Any]) -> dict[str, Any]:
        own = self._params.query_request if role == "query" else self._params.candidate_request
        return {"model": self._params.model, STYLES[self._params.style].field: inputs,
                **self._params.request, **own}

    def _read(self, answer: Any, count: int) -> np.ndarray:
        """float32 [P, D] in the order of the inputs; Unusable if it is not an answer, UserError if it does not fit."""
        rows = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise Unusable("it has no list `data`")
        if len(rows) != count:
            raise UserError(f"the service returned {len(rows)} vectors for {count} inputs", self._service.where,
                            "check that url and style belong together; or set items_per_request=1")
        vectors = [_numbers(row.get("embedding")) for row in _in_order(rows)]
        for length in sorted({len(vector_D) for vector_D in vectors} - {self.dimension}):
            raise UserError(f"the service returned {length} dimensions, not {self.dimension}", self._service.where,
                            f"set dimension: {length}; or ask for {self.dimension} in `request`, if it can")
        return np.stack(vectors)


def _one_input(text: str, image: str | None, image_format: str) -> list[Any]:
    """Voyage's input, text before image; none of nothing."""
    content = [{"type": "text", "text": text}] if text else []
    if image:
        content.append({"type": "image_base64", "image_base64": f"data:image/{image_format};base64,{image}"})
    return [{"content": content}] if content else []


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By their `index`, if they have one: the order of the answer is not promised."""
    if not any("index" in row for row in rows):
        return rows
    by_index = {row["index"]: row for row in rows if isinstance(row.get("index"), int)}
    if set(by_index) != set(range(len(rows))):
        raise Unusable("its indices are not those of the inputs")
    return [by_index[number] for number in range(len(rows))]


def _numbers(embedding: Any) -> np.ndarray:
    """float32 [D] of a list of numbers, or of the base64 of little-endian float32."""
    try:
        found_D = (np.frombuffer(base64.b64decode(embedding, validate=True), "<f4") if isinstance(embedding, str)
                   else np.asarray(embedding, np.float32))
    except (ValueError, TypeError, binascii.Error):
        raise Unusable("an `embedding` is not a list of numbers") from None
    if found_D.ndim != 1 or not np.isfinite(found_D).all():
        raise Unusable("an `embedding` is no list, or holds NaN or infinity")
    return found_D
