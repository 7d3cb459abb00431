"""The examples of a report as cards: a query, what is relevant to it, and what was found, within a budget of bytes.

Cards are drawn in the order in which examples were chosen (first turns first), until the next one does not fit: what
is left out is counted, and a page never exceeds its size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.loading import choose_prompts
from pipeline.report.cells import Cell, Cells, Key
from pipeline.report.contents import SHOWN_RELEVANT, Contents, Hit
from pipeline.report.examples import TOPICS, Example
from pipeline.report.survey import KINDS, RELEVANT
from pipeline.report.thumbnails import Picture, Thumbnails

_QUERY_LETTERS = 600
_TILE_LETTERS = 170


class Tile(NamedTuple):
    """A candidate as it is shown; `remark` stands where there is nothing to show."""

    candidate_id: str
    text: str
    picture: Picture | None
    remark: str
    hit: Hit | None


class Shown(NamedTuple):
    """A ranking: whose it is, what became of the query, and its tiles; `is_later`: the last stands further down."""

    encoder: str
    pool: str
    verdict: str
    is_hit: bool
    tiles: list[Tile]
    is_later: bool


class Card(NamedTuple):
    """All that a card shows; texts are plain, the template escapes them."""

    topic: str
    title: str
    task: str
    encoders: str
    query_id: str
    text: str
    picture: Picture | None
    instruction: str
    relevant: list[Tile]
    more_relevant: int
    rankings: list[Shown]


class Drawn(NamedTuple):
    """A card as HTML."""

    topic: str
    task: str
    html: Markup


@dataclass(frozen=True)
class Gallery:
    """`cards` in the order of tasks and topics."""

    cards: Sequence[Drawn]
    left_out: int

    def of_task(self, task: str) -> list[Drawn]:
        return [card for card in self.cards if card.task == task]


def draw(examples: Sequence[Example], make: Callable[[Example], Card], render: Callable[[Card], Markup],
         budget: int) -> Gallery:
    """Cards of at most `budget` bytes together; the rest is counted."""
    cards: list[tuple[Example, Drawn]] = []
    for example in examples:
        html = render(make(example))
        budget -= len(html.encode())
        if budget < 0:
            break
        cards.append((example, Drawn(example.topic, example.task, html)))
    tasks, topics = list(dict.fromkeys(example.task for example in examples)), list(TOPICS)
    cards.sort(key=lambda card: (tasks.index(card[0].task), topics.index(card[0].topic)))
    return Gallery([drawn for _, drawn in cards], len(examples) - len(cards))


@dataclass(frozen=True)
class CardMaker:
    """Example -> card. `rule`: by which queries were given their instructions."""

    cells: Cells
    contents: Contents
    thumbnails: Thumbnails
    rule: str

    def __call__(self, example: Example) -> Card:
        query = self.contents.queries[example.task, example.query]
        relevant = self.contents.relevant[example.task, example.query]
        first = self.cells.by_key[example.shown[0]]
        return Card(
            topic=example.topic, title=self._title(example), task=example.task,
            encoders=" ".join(dict.fromkeys(key[0] for key in example.shown)), query_id=query["query_id"],
            text=_shortened(query["text"] or "", _QUERY_LETTERS), picture=self._picture(query["image"]),
            instruction=_instruction(query, self.rule),
            relevant=[self._tile(first, candidate_id, None) for candidate_id in relevant[:SHOWN_RELEVANT]],
            more_relevant=max(len(relevant) - SHOWN_RELEVANT, 0),
            rankings=[self._ranking(key, example.query) for key in example.shown])

    def _title(self, example: Example) -> str:
        (encoder, _, pool), *others = example.shown
        if example.topic == "lost":
            return f"{encoder}: found in the local pool, lost in {pool}"
        if example.topic == "win":
            return f"{encoder} finds it, {others[0][0]} does not"
        if example.topic == "loss":
            return f"{others[0][0]} finds it, {encoder} does not"
        return f"{encoder}: {TOPICS[example.topic].lower().removesuffix('es')}"

    def _ranking(self, key: Key, query: int) -> Shown:
        cell, hits = self.cells.by_key[key], self.contents.hits[key, query]
        first = int(cell.survey.first_Q[query])
        depth = len(cell.survey.count_KT)
        verdict = f"first relevant candidate at rank {first}" if first else f"nothing relevant among the first {depth}"
        is_later = len(hits) > 1 and hits[-1].rank > hits[-2].rank + 1
        return Shown(key[0], key[2], verdict, 0 < first <= cell.k,
                     [self._tile(cell, hit.candidate_id, hit) for hit in hits], is_later)

    def _tile(self, cell: Cell, candidate_id: str, hit: Hit | None) -> Tile:
        row = self.contents.candidate(cell, candidate_id)
        if row is None:
            return Tile(candidate_id, "", None, "not in the pool", hit)
        picture, text = self._picture(row["image"]), _shortened(row["text"] or "", _TILE_LETTERS)
        return Tile(candidate_id, text, picture, "" if picture or text else "empty", hit)

    def _picture(self, reference: str | None) -> Picture | None:
        return self.thumbnails.of(reference) if reference else None


def is_relevant(tile: Tile) -> bool:
    """For the frame around a hit."""
    return tile.hit is not None and tile.hit.kind == KINDS[RELEVANT]


def _instruction(query: Mapping[str, Any], rule: str) -> str:
    """What was put before the query; of several, the first."""
    prompts = [number for number in choose_prompts(rule, query["query_id"], len(query["instructions"]))
               if number is not None]
    if not prompts:
        return ""
    more = f" (and {len(prompts) - 1} more)" if len(prompts) > 1 else ""
    return _shortened(query["instructions"][prompts[0]], _QUERY_LETTERS) + more


def _shortened(text: str, most: int) -> str:
    """At most so many letters, cut at a word where there is one."""
    if len(text) <= most:
        return text
    head, _, _ = text[:most].rpartition(" ")
    return (head if len(head) > most // 2 else text[:most]) + "..."
