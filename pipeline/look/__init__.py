"""Look at one query: what it was, what it should have found, what it found.

`View` is what every view of it is made from: a terminal's text (text.py), a page with pictures (page.py), JSON. A
query may be one of a task (showing.py) or one that somebody has just typed (searching.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.images import Flaw, ImageStore


@dataclass(frozen=True)
class Picture:
    """An image by reference: width and height in pixels and the size of its file, or what is wrong with it."""

    reference: str
    width: int = 0
    height: int = 0
    bytes: int = 0
    flaw: str = ""

    @classmethod
    def of(cls, images: ImageStore, reference: str | None) -> Picture | None:
        if reference is None:
            return None
        try:
            image = images.open(reference)
        except Flaw as flaw:
            return cls(reference, flaw=str(flaw))
        return cls(reference, image.width, image.height, images.size(reference) or 0)


@dataclass(frozen=True)
class Query:
    """`encoded` are the texts that the encoder was given, one per prompt; `query_id` is None for a typed query."""

    query_id: str | None
    modality: str
    text: str | None
    picture: Picture | None
    instructions: tuple[str, ...]
    encoded: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """rank and score are None beyond what was retrieved; relevance is None where the pair was not judged; what is
    not `in_pool` has neither content nor rank."""

    candidate_id: str
    rank: int | None
    score: float | None
    relevance: int | None
    in_pool: bool = True
    modality: str = ""
    text: str | None = None
    image: str | None = None

    @property
    def is_hit(self) -> bool:
        return (self.relevance or 0) > 0


@dataclass(frozen=True)
class View:
    """One query in one pool. `relevant` by rank; `hits` are the first of `depth` that were retrieved."""

    encoder: str
    task: str
    pool: str
    candidates: int
    query: Query
    relevant: tuple[Candidate, ...]
    hits: tuple[Candidate, ...]
    metrics: Mapping[str, float]
    depth: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
