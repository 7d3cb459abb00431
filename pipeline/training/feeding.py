"""Loader processes: each step arrives as chunks of items that are decoded, tokenised and grouped by what they contain.

An item that a step needs twice (a positive of two queries) is prepared and encoded once. Items are sorted by content
and length, so that a chunk runs only the towers it needs and pads little. A broken image is replaced by no image and
counted; more of them than tolerated end the training, which can be resumed when they are mended.

Shapes: B queries of this process, H hard negatives per query.
"""

from __future__ import annotations

import logging
import pickle
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.encoders import Encoder, Item
from pipeline.images import Flaw, ImageStore
from pipeline.support.errors import UserError
from pipeline.support.loaders import as_bytes, one_deaf_thread
from pipeline.training.draws import Course, Draw
from pipeline.training.examples import Examples

log = logging.getLogger("pipeline")
_PIECE, _AHEAD = 64, 512  # items: prepared by one loader process at a time, and by all of them ahead of the step


class Key(NamedTuple):
    """One item: a query under a prompt (-1: none), or a candidate."""

    is_query: bool
    row: int
    prompt: int


@dataclass(frozen=True)
class Layout:
    """Which items a step encodes, in chunks, and at which place each query, positive and negative stands among them.

    queries, positives [B]; negatives [B * H], -1 where there is none; rows of candidates are in `draw`.
    """

    draw: Draw
    chunks: list[list[Key]]
    queries: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray


class PreparedStep(NamedTuple):
    """A step, ready to be encoded."""

    layout: Layout
    chunks: list[list[Any]]


@dataclass(frozen=True)
class Feeder:
    """Steps for process `rank` of `world`, prepared by `loaders` processes (0: by this one)."""

    course: Course
    images: ImageStore
    encoder: Encoder
    chunk_size: int
    loaders: int
    max_flawed: int
    rank: int = 0
    world: int = 1

    def steps(self, start: int) -> Iterator[PreparedStep]:
        """Steps from number `start` to the last; UserError if more images are broken than tolerated."""
        import torch
        planned: deque[Layout] = deque()  # filled by the sampler, which runs ahead in this process
        loader: torch.utils.data.DataLoader[bytes] = torch.utils.data.DataLoader(
            _Items(self.course.examples, self.images, self.encoder),  # type: ignore[arg-type]
            batch_sampler=self._schedule(start, planned), collate_fn=as_bytes, num_workers=self.loaders,
            prefetch_factor=max(1, _AHEAD // (_PIECE * self.loaders)) if self.loaders else None,
            worker_init_fn=one_deaf_thread if self.loaders else None,
            generator=torch.Generator())  # a loader draws a seed: from torch's own, a resumed dropout would differ
        flawed: set[str] = set()
        arriving = iter(loader)
        try:
            for _ in range(start, self.course.num_steps):
                pieces = [self._unpacked(next(arriving), flawed)]  # the first one: by now its layout is planned
                layout = planned.popleft()
                counts = [len(list(_pieces(chunk))) for chunk in layout.chunks]
                pieces += [self._unpacked(next(arriving), flawed) for _ in range(sum(counts) - 1)]
                rest = iter(pieces)
                chunks = [[item for piece in islice(rest, count) for item in piece] for count in counts]
                yield PreparedStep(layout, chunks)
        finally:
            del arriving  # ends its processes now: an error would keep it, and a collector's end of it takes seconds

    def _schedule(self, start: int, planned: deque[Layout]) -> Iterator[list[Key]]:
        for number in range(start, self.course.num_steps):
            layout = self.layout(number)
            planned.append(layout)
            for chunk in layout.chunks:
                yield from _pieces(chunk)

    def layout(self, number: int) -> Layout:
        size = self.course.params.batch_size // self.world
        return lay_out(self.course.step(number).part(self.rank * size, (self.rank + 1) * size), self._lengths,
                       self.chunk_size)

    @cached_property
    def _lengths(self) -> _Lengths:
        return _Lengths(self.course.examples)

    def _unpacked(self, packed: bytes, flawed: set[str]) -> list[Any]:
        prepared, flaws = zip(*pickle.loads(packed))
        for flaw in flaws:
            if isinstance(flaw, UserError):
                raise flaw
            if flaw is not None and flaw not in flawed:
                flawed.add(flaw)
                log.warning("broken image, learned from without it: %s", flaw)
        if len(flawed) > self.max_flawed:
            listed = "\n".join(sorted(flawed)[:10])
            raise UserError(f"{len(flawed)} images are broken, {self.max_flawed} tolerated", do=(
                f"{listed}\nmend them, or tolerate more with training.max_flawed; the same command then resumes"))
        return list(prepared)


def _pieces(chunk: list[Key]) -> Iterator[list[Key]]:
    """What one loader process prepares at a time: no more than fits well into memory, however large a chunk is."""
    yield from (chunk[start:start + _PIECE] for start in range(0, len(chunk), _PIECE))


class _Lengths:
    """How an item is grouped and sorted: has it an image, how long is its text (in bytes)?"""

    def __init__(self, examples: Examples):
        self._prompts = examples.instructed_texts.offsets
        self._prompted = _bytes(examples.instructed_texts.values)
        self._texts = [_bytes(table["text"]) for table in (examples.candidates, examples.queries)]
        self._pictured = [np.asarray(table["image"].is_valid()) for table in (examples.candidates, examples.queries)]

    def order(self, key: Key) -> tuple[bool, int, Key]:
        text = (self._texts[key.is_query][key.row] if key.prompt < 0
                else self._prompted[self._prompts[key.row] + key.prompt])
        return bool(self._pictured[key.is_query][key.row]), int(text), key


def _bytes(texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.fill_null(pc.binary_length(texts), 0))


def lay_out(draw: Draw, lengths: _Lengths, chunk_size: int) -> Layout:
    queries = [Key(True, int(row), int(prompt)) for row, prompt in zip(draw.queries, draw.prompts)]
    positives = [Key(False, int(row), -1) for row in draw.positives]
    negatives = [None if row < 0 else Key(False, int(row), -1) for row in draw.negatives.reshape(-1)]
    needed = {*queries, *positives, *(key for key in negatives if key is not None)}
    keys = sorted(needed, key=lengths.order)
    place = {key: number for number, key in enumerate(keys)}
    size = chunk_size or len(keys)
    return Layout(draw, [keys[start:start + size] for start in range(0, len(keys), size)],
                  np.array([place[key] for key in queries]), np.array([place[key] for key in positives]),
                  np.array([-1 if key is None else place[key] for key in negatives], np.int64))


@dataclass
class _Items:
    """What loader processes run: a key -> (prepared item, what is wrong with its image or None)."""

    examples: Examples
    images: ImageStore
    encoder: Encoder

    def __getitem__(self, key: Key) -> tuple[Any, Any]:
        table = self.examples.queries if key.is_query else self.examples.candidates
        text = table["text"][key.row] if key.prompt < 0 else table["instructed_texts"][key.row][key.prompt]
        image, flaw, reference = None, None, table["image"][key.row].as_py()
        if reference is not None:
            try:
                image = self.images.open(reference)
            except Flaw as found:
                flaw = f"{table['query_id' if key.is_query else 'candidate_id'][key.row]}: {found}"
            except UserError as error:  # a value: the loader would wrap it into a traceback
                return None, error
        words = text.as_py()
        return self.encoder.prepare(Item(words if words or image else "", image)), flaw
