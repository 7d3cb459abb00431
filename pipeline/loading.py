"""From rows of a table to prepared batches: loader processes decode and tokenise while the encoder runs.

A batch never mixes shards; within a shard items are grouped by what they contain and sorted by the length of their
text, so that no tower runs for an absent modality and little is padded. An image that cannot be read is a value
(`flaw`), never an exception that ends or hangs the job.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.embeddings import read_table
from pipeline.encoders import Encoder, Item
from pipeline.images import Flaw, ImageStore
from pipeline.support.errors import UserError
from pipeline.support.loaders import as_bytes, one_thread

_FEW = 256  # below so many items, starting loader processes costs more than it saves


@dataclass(frozen=True)
class Source:
    """One shard of a table, the images its rows name, the rule that chooses instructions, and where the result goes."""

    path: Path
    fingerprint: str
    images: ImageStore
    instruction: str
    target: Path

    def table(self) -> pa.Table:
        return read_table(self.path, self.fingerprint)


class Key(NamedTuple):
    """One item to encode: which source (position in the list), which row, under which prompt (or none)."""

    position: int
    row: int
    prompt: int | None


class Batch(NamedTuple):
    """Prepared items of one source; None where nothing is left to encode, and the flaw that says why."""

    position: int
    keys: list[Key]
    prepared: list[Any]
    flaws: list[Flaw | None]


def batches(sources: Sequence[Source], encoder: Encoder, batch_size: int, loaders: int) -> Iterator[Batch]:
    """All items of all sources in order; a source whose target exists by then is passed over."""
    import torch
    loader: torch.utils.data.DataLoader[bytes] = torch.utils.data.DataLoader(
        _Items(sources, encoder), batch_sampler=_schedule(sources, batch_size),  # type: ignore[arg-type]
        collate_fn=as_bytes, num_workers=loaders, prefetch_factor=4 if loaders else None,
        worker_init_fn=one_thread if loaders else None)
    for packed in loader:
        keys, prepared, flaws = zip(*pickle.loads(packed))
        for flaw in flaws:
            if isinstance(flaw, UserError):
                raise flaw
        yield Batch(keys[0].position, list(keys), list(prepared), list(flaws))


def num_loaders(asked: int, num_items: int, sharing: int = 1) -> int:
    """Loader processes to start: as asked, or (-1) one per core, at most 8; `sharing` processes share the cores."""
    if asked >= 0:
        return asked
    return max(1, min(8, len(os.sched_getaffinity(0)) // sharing)) if num_items > _FEW else 0


def _schedule(sources: Sequence[Source], batch_size: int) -> Iterator[list[Key]]:
    for position, source in enumerate(sources):
        if not source.target.exists():
            keys = keys_of(position, source.table(), source.instruction)
            yield from (keys[start:start + batch_size] for start in range(0, len(keys), batch_size))


def keys_of(position: int, rows: pa.Table, rule: str) -> list[Key]:
    """Every item of a table, grouped by what it contains and sorted by the length of its text."""
    texts = rows["text"].to_pylist()
    if rule in ("", "none"):
        chosen = {Key(position, row, None): text or "" for row, text in enumerate(texts)}
    else:
        ids, instructed = rows["query_id"].to_pylist(), rows["instructed_texts"].to_pylist()
        chosen = {Key(position, row, prompt): (texts[row] or "") if prompt is None else instructed[row][prompt]
                  for row in range(len(rows)) for prompt in choose_prompts(rule, ids[row], len(instructed[row]))}
    pictured = rows["image"].is_valid().to_pylist()
    return sorted(chosen, key=lambda key: (pictured[key.row], len(chosen[key]), key.row, key.prompt or 0))


def choose_prompts(rule: str, query_id: str, count: int) -> list[int | None]:
    """Numbers of the prompts a query is encoded under: a rule over its id, never a random generator's state."""
    if not count or rule == "none":
        return [None]
    if rule == "all":
        return list(range(count))
    return [0 if rule == "first" else int(sha256(query_id.encode()).hexdigest()[:8], 16) % count]


@dataclass
class _Items:
    """What loader processes run: a key -> (key, prepared item or None, flaw or None)."""

    sources: Sequence[Source]
    encoder: Encoder

    def __getitem__(self, key: Key) -> tuple[Key, Any, Any]:
        source = self.sources[key.position]
        try:
            item, flaw = _item(source.images, _rows_at(source.path, source.fingerprint)[key.row], key.prompt)
        except UserError as error:  # a value: the loader would wrap it into a traceback
            return key, None, error
        return key, None if item is None else self.encoder.prepare(item), flaw


@lru_cache(maxsize=2)
def _rows_at(path: Path, fingerprint: str) -> list[dict[str, Any]]:
    return list(read_table(path, fingerprint).to_pylist())


def _item(images: ImageStore, row: dict[str, Any], prompt: int | None) -> tuple[Item | None, Flaw | None]:
    text = row["text"] if prompt is None else row["instructed_texts"][prompt]
    instruction = None if prompt is None else row["instructions"][prompt]
    image, flaw = None, None
    if row["image"] is not None:
        try:
            image = images.open(row["image"])
        except Flaw as found:
            flaw = found
            if not text:
                return None, flaw
    return Item(text if text or image else "", image, instruction, row["text"]), flaw
