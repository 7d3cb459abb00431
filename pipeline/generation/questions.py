"""Where questions come from: retrieved candidates, a file of ready messages, or the pictures of a collected table.

Messages are made when they are sent, one at a time, so pictures of a whole task are never in memory together. The
trade: what they are made from is in the fingerprint by the content of files, pictures only by their sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact
from pipeline.embeddings import read_table
from pipeline.generation.answers import Question
from pipeline.generation.chat import Message
from pipeline.images import ImageStore
from pipeline.plan import manifest_of
from pipeline.rag import load_results, to_messages
from pipeline.rag.records import Picture
from pipeline.support.rows import Row, json_rows

DESCRIBE = "Describe the picture in one sentence. Answer with the description only."


@dataclass(frozen=True)
class Asking:
    """How messages are made of retrieved candidates (pipeline.rag.to_messages): style, how many, words of the task.

    `max_side`: pixels; larger pictures are sent smaller.
    """

    style: str
    top: int
    prompt: str | None
    max_side: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def from_results(path: Path, images: ImageStore, asking: Asking) -> Iterator[Question]:
    """One question per line of a file of retrieved candidates; complements are used where they are beside it."""
    for result in load_results(path, images):
        make = partial(to_messages, result, asking.top, asking.style, asking.prompt, asking.max_side)
        yield Question(result.query.query_id, make)


def from_file(path: Path) -> Iterator[Question]:
    """One question per line {"query_id", "messages", ...}; messages are sent as they stand."""
    for row in json_rows(path):
        messages = _messages(row)
        yield Question(row.identifier("query_id"), partial(list, messages))


def _messages(row: Row) -> list[Message]:
    found = row.fields.get("messages")
    if not isinstance(found, list) or not found or not all(
            isinstance(message, dict) and isinstance(message.get("role"), str) for message in found):
        raise row.error("`messages` must be a list of objects with a role and a content",
                        'such as [{"role": "user", "content": "What is this?"}]')
    return found


def from_table(artifact: Artifact, images: ImageStore, prompt: str, max_side: int) -> Iterator[Question]:
    """One question per row of a collected table that has a picture: what does it show?"""
    for item in table_rows(artifact):
        if item["image"] is not None:
            picture = Picture(item["image"], lambda: images)
            yield Question(item.get("query_id") or item["candidate_id"], partial(describing, picture, prompt, max_side))


def describing(picture: Picture, prompt: str, max_side: int) -> Sequence[Message]:
    """The prompt as the system's message and the picture alone as the user's: EvalScope's image_caption."""
    part = {"type": "image_url", "image_url": {"url": picture.data_uri(max_side)}}
    return [{"role": "system", "content": prompt}, {"role": "user", "content": [part]}]


def table_rows(artifact: Artifact) -> Iterator[dict[str, Any]]:
    """The rows of a collected table of queries or candidates, in order."""
    for shard in manifest_of(artifact.directory)["shards"]:
        yield from read_table(artifact.path(shard["file"]), artifact.fingerprint).to_pylist()
