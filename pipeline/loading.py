"""From rows of a table to prepared batches: loader processes decode and tokenise while the encoder runs.

A batch never mixes shards; within a shard items are grouped by what they contain and sorted by the length of their
text, so that no tower runs for an absent modality and little is padded. Rows of the same text and image are one
item; loaders give each a digest of its content, by which equal images of different names are known. An image that
cannot be read is a value (`flaw`), never an exception that ends or hangs the job.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from pipeline.embeddings import read_table
from pipeline.encoders import Encoder, Item
from pipeline.images import Flaw, ImageStore, decode
from pipeline.support.ahead import read_ahead
from pipeline.support.errors import UserError
from pipeline.support.loaders import as_bytes, one_thread

SHARING = ("shard", "worker", "none")  # among which items equal ones are encoded once
EXACT, DRAFT = "exact", "draft"
DECODINGS = (EXACT, DRAFT)
_FEW = 256  # below so many items, starting loader processes costs more than it saves
_UNPACKED_AHEAD = 2  # batches


class Key(NamedTuple):
    """One item to encode: which source (position in the list), which row, under which prompt (or none)."""

    position: int
    row: int
    prompt: int | None


@dataclass(frozen=True)
class Source:
    """One shard of a table, the images its rows name, the rule that chooses instructions, and where the result goes."""

    path: Path
    fingerprint: str
    images: ImageStore
    instruction: str
    decoding: str
    target: Path

    def items(self, position: int, share: str) -> dict[Key, list[int]]:
        """What to encode, in order, each with the rows whose vector it is: one, or all whose content is the same."""
        rows = read_table(self.path, self.fingerprint)
        contents = _contents(position, rows, self.instruction)
        pictured = rows["image"].is_valid().to_pylist()
        order = sorted(contents, key=lambda key: (pictured[key.row], len(contents[key][0]), key.row, key.prompt or 0))
        found: dict[Any, list[Key]] = {}
        for key in order:
            found.setdefault(key if share == "none" else contents[key], []).append(key)
        return {keys[0]: [key.row for key in keys] for keys in found.values()}


class Batch(NamedTuple):
    """Prepared items of one source; None where nothing is left to encode, and the flaw that says why.

    `digests`: equal for equal items; None where items are not shared, or nothing is left.
    """

    position: int
    keys: list[Key]
    prepared: list[Any]
    flaws: list[Flaw | None]
    digests: list[bytes | None]


def batches(sources: Sequence[Source], encoder: Encoder, batch_size: int, loaders: int, share: str) -> Iterator[Batch]:
    """All items of all sources in order; a source whose target exists by then is passed over."""
    import torch
    loader: torch.utils.data.DataLoader[bytes] = torch.utils.data.DataLoader(
        _Items(sources, encoder, share != "none"),  # type: ignore[arg-type]
        batch_sampler=_schedule(sources, batch_size, share),
        collate_fn=as_bytes, num_workers=loaders, prefetch_factor=4 if loaders else None,
        worker_init_fn=one_thread if loaders else None)
    arriving = map(_unpacked, loader)  # here, not in a thread, the processes are forked
    return read_ahead(arriving, _UNPACKED_AHEAD) if loaders else arriving


def _needs_ids(encoder: Encoder) -> bool:
    return bool(getattr(encoder, "needs_ids", False))


def _unpacked(packed: bytes) -> Batch:
    keys, prepared, flaws, digests = zip(*pickle.loads(packed))
    for flaw in flaws:
        if isinstance(flaw, UserError):
            raise flaw
    return Batch(keys[0].position, list(keys), list(prepared), list(flaws), list(digests))


def num_loaders(asked: int, num_items: int, sharing: int = 1) -> int:
    """Loader processes to start: as asked, or (-1) one per core, at most 8; `sharing` processes share the cores."""
    if asked >= 0:
        return asked
    return max(1, min(8, len(os.sched_getaffinity(0)) // sharing)) if num_items > _FEW else 0


def _schedule(sources: Sequence[Source], batch_size: int, share: str) -> Iterator[list[Key]]:
    for position, source in enumerate(sources):
        if not source.target.exists():
            keys = list(source.items(position, share))
            yield from (keys[start:start + batch_size] for start in range(0, len(keys), batch_size))


def _contents(position: int, rows: pa.Table, rule: str) -> dict[Key, tuple[str, Any, Any, Any]]:
    """Every item of a table: its text, and what else makes it the item it is."""
    texts, images = rows["text"].to_pylist(), rows["image"].to_pylist()
    if rule in ("", "none"):
        return {Key(position, row, None): (texts[row] or "", texts[row], None, images[row]) for row in range(len(rows))}
    ids, instructed = rows["query_id"].to_pylist(), rows["instructed_texts"].to_pylist()
    instructions = rows["instructions"].to_pylist()
    found = {}
    for row, prompts in enumerate(instructed):
        for prompt in choose_prompts(rule, ids[row], len(prompts)):
            text, said = (texts[row], None) if prompt is None else (prompts[prompt], instructions[row][prompt])
            found[Key(position, row, prompt)] = text or "", texts[row], said, images[row]
    return found


def choose_prompts(rule: str, query_id: str, count: int) -> list[int | None]:
    """Numbers of the prompts a query is encoded under: a rule over its id, never a random generator's state."""
    if not count or rule == "none":
        return [None]
    if rule == "all":
        return list(range(count))
    return [0 if rule == "first" else int(sha256(query_id.encode()).hexdigest()[:8], 16) % count]


@dataclass
class _Items:
    """What loader processes run: a key -> (key, prepared item or None, flaw or None, digest or None)."""

    sources: Sequence[Source]
    encoder: Encoder
    has_digests: bool

    def __getitem__(self, key: Key) -> tuple[Key, Any, Any, bytes | None]:
        source = self.sources[key.position]
        images = None if _needs_ids(self.encoder) else source.images
        at_least = getattr(self.encoder, "image_size", None) if source.decoding == DRAFT else None
        try:
            row = _rows_at(source.path, source.fingerprint)[key.row]
            item, data, flaw = _item(images, row, key.prompt, at_least)
            prepared = None if item is None else self._prepared(item)
        except UserError as error:  # a value: the loader would wrap it into a traceback
            return key, None, error, None
        return key, prepared, flaw, _digest(item, data) if self.has_digests and item is not None else None

    def _prepared(self, item: Item) -> Any:
        try:
            return self.encoder.prepare(item)
        except UserError:
            raise
        except Exception as error:  # of an encoder that is the user's own, say; which item it was, only we know
            raise UserError(f"the encoder cannot prepare this item: {type(error).__name__}: {error}",
                            f"{item.role} {item.id}", "mend the encoder's `prepare`, or the item") from error


@lru_cache(maxsize=2)
def _rows_at(path: Path, fingerprint: str) -> list[dict[str, Any]]:
    return list(read_table(path, fingerprint).to_pylist())


def _item(images: ImageStore | None, row: Mapping[str, Any], prompt: int | None,
          at_least: tuple[int, int] | None) -> tuple[Item | None, bytes, Flaw | None]:
    """The item, the bytes of its image, and what is wrong with it; without `images` none is opened."""
    text = row["text"] if prompt is None else row["instructed_texts"][prompt]
    instruction = None if prompt is None else row["instructions"][prompt]
    image, data, flaw = None, b"", None
    if row["image"] is not None and images is not None:
        try:
            data = images.read(row["image"])
            image = decode(data, row["image"], at_least)
        except Flaw as found:
            data, flaw = b"", found
            if not text:
                return None, data, flaw
    role: Literal["query", "candidate"] = "query" if "query_id" in row else "candidate"
    return Item(text if text or image else "", image, instruction, row["text"], role, row[f"{role}_id"]), data, flaw


def _digest(item: Item, data: bytes) -> bytes:
    """16 bytes that tell items apart: all that an encoder is given, the image by its encoded bytes."""
    head = json.dumps([item.text, item.instruction, item.bare_text, item.role, item.image is not None]).encode()
    return sha256(len(head).to_bytes(8) + head + data).digest()[:16]
