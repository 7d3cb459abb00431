"""A view as lines of text for a terminal. What data hold is printed as letters: a control sequence would be obeyed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.look import Candidate, Picture, View

_ROW = "  {:>6}  {:>9}  {:<4}  {:<10}  {}"
_HEAD = "{:<12} {}"


@dataclass(frozen=True)
class TextView:
    """`width`: columns of the terminal; lines of candidates end there, None shows them whole."""

    view: View
    width: int | None = None

    def lines(self) -> Iterator[str]:
        yield from self._query()
        if self.view.metrics:
            values = "  ".join(f"{name} {value:.3f}" for name, value in self.view.metrics.items())
            yield _HEAD.format("scores", values)
        if self.view.relevant:
            yield ""
            yield from self._table("relevant", self.view.relevant)
        yield ""
        yield from self._table(f"first {len(self.view.hits)}", self.view.hits)

    def _query(self) -> Iterator[str]:
        view, query = self.view, self.view.query
        yield _HEAD.format("query", f"{plain(query.query_id or '(typed)')}  of {view.task}, {query.modality}")
        yield _HEAD.format("text", "(none)" if query.text is None else plain(query.text))
        if query.picture:
            yield _HEAD.format("image", picture_text(query.picture))
        for instruction in query.instructions or ("(none)",):
            yield _HEAD.format("instruction", plain(instruction))
        for encoded in query.encoded if query.instructions else ():
            yield _HEAD.format("encoded", plain(encoded))
        yield _HEAD.format("searched", f"{view.pool}, {view.candidates:,} candidates, with {view.encoder}")

    def _table(self, title: str, candidates: tuple[Candidate, ...]) -> Iterator[str]:
        yield title
        yield _ROW.format("rank", "score", "hit", "modality", "candidate")
        for candidate in candidates:
            line = _ROW.format(self._rank(candidate), _score(candidate), _mark(candidate), candidate.modality,
                               _content(candidate))
            yield line if self.width is None or len(line) <= self.width else line[:max(self.width - 3, 40)] + "..."

    def _rank(self, candidate: Candidate) -> str:
        if candidate.rank is not None:
            return str(candidate.rank)
        return f">{self.view.depth}" if candidate.in_pool else "-"


def _score(candidate: Candidate) -> str:
    return "" if candidate.score is None else f"{candidate.score:.5f}"


def _mark(candidate: Candidate) -> str:
    if candidate.relevance is None:
        return ""
    return "no" if not candidate.is_hit else "*" if candidate.relevance == 1 else f"*{candidate.relevance}"


def _content(candidate: Candidate) -> str:
    if not candidate.in_pool:
        return f"{plain(candidate.candidate_id)}  is not in this pool"
    parts = (candidate.candidate_id, candidate.image, candidate.text)
    return "  ".join(plain(part) for part in parts if part)


def picture_text(picture: Picture) -> str:
    if picture.flaw:
        return plain(picture.flaw)
    size = f"{picture.bytes / 1000:,.0f} kB" if picture.bytes >= 1000 else f"{picture.bytes} bytes"
    return f"{plain(picture.reference)}  {picture.width} x {picture.height} pixels, {size}"


def plain(text: str) -> str:
    """On one line, with nothing that a terminal would obey or that turns the direction of what follows."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
