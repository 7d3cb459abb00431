"""What a line of retrieval results says, as typed records. A picture is a reference until it is opened."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pipeline.images import Flaw, ImageStore, decode
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_KINDS = ((b"\xff\xd8\xff", "jpeg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"GIF8", "gif"))  # and webp: what services take


@dataclass(frozen=True)
class Picture:
    """An image by its reference. UserError from every method if it is missing, broken or outside the root."""

    reference: str
    store: Callable[[], ImageStore] = field(repr=False, compare=False)

    def read(self) -> bytes:
        """The encoded image, as it is stored."""
        try:
            return self.store().read(self.reference)
        except Flaw as flaw:
            raise _unreadable(flaw) from None

    def open(self) -> Image:
        """The pixels, RGB."""
        return self._decoded(self.read())

    def data_uri(self, longest_side: int | None = None) -> str:
        """The image inside a URI: as it is stored, if services know its format and no side is longer than that; else
        made smaller, photographs as JPEG and all others as PNG."""
        data = self.read()
        kind = next((name for start, name in _KINDS if data.startswith(start)), "")
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            kind = "webp"
        if longest_side is not None or not kind:
            image = self._decoded(data)
            side = max(image.size) if longest_side is None else longest_side
            if not kind or max(image.size) > side:
                image.thumbnail((side, side))
                data, kind = _encoded(image, "jpeg" if kind in ("jpeg", "webp") else "png")
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

    def _decoded(self, data: bytes) -> Image:
        try:
            return decode(data, self.reference)
        except Flaw as flaw:
            raise _unreadable(flaw) from None


def _encoded(image: Image, kind: str) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    image.save(buffer, kind.upper(), **({"quality": 90} if kind == "jpeg" else {}))
    return buffer.getvalue(), kind


def _unreadable(flaw: Flaw) -> UserError:
    return UserError("a picture of these results cannot be used", flaw.detail,
                     "mend it, or say where pictures are: load_results(path, images=FOLDER)")


@dataclass(frozen=True)
class Query:
    """`instructions` are the prompts it was encoded with: none, one, or all under embed.instruction=all."""

    query_id: str
    text: str | None
    image: Picture | None
    modality: str
    instructions: tuple[str, ...]


@dataclass(frozen=True)
class Complement:
    """The partner of a candidate; rank and score are those of the search for it (None in files of UniIR)."""

    candidate_id: str
    rank: int | None
    score: float | None
    text: str | None
    image: Picture | None
    modality: str


@dataclass(frozen=True)
class Candidate:
    """`score` is None in files of UniIR; `relevance` is None where the pair was not judged."""

    candidate_id: str
    rank: int
    score: float | None
    relevance: int | None
    text: str | None
    image: Picture | None
    modality: str
    complement: Complement | None = None


class Pair(NamedTuple):
    """An image and a text that belong together: a candidate of both, or one with its complement."""

    candidate: Candidate
    text: str
    image: Picture


@dataclass(frozen=True)
class Result:
    """A query and its candidates, best first."""

    query: Query
    candidates: tuple[Candidate, ...]

    def pairs(self) -> Iterator[Pair]:
        """Candidates as pairs of image and text, best first, without those that have no partner and those that show
        the query's own image or text (UniRAG, src/unirag/incontext_example_provider.py, `get_candidates`)."""
        for candidate in self.candidates:
            partner = candidate.complement
            text = candidate.text or (partner.text if partner else None)
            image = candidate.image or (partner.image if partner else None)
            if text and image and text != self.query.text and image != self.query.image:
                yield Pair(candidate, text, image)
