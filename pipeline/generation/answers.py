"""The answers of one model to one set of questions: JSON Lines in shards that belong to the data, and a manifest.

Promises: killed anywhere and started again, every question has one answer, and those on disk are not asked for again
(what a kill loses is at most the shards being filled). A question that fails for good is a row with its reason, counted
and asked again until its number is tolerated. The trade: answers of a service that draws at random differ each time.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import artifacts
from pipeline.artifacts import MADE, MANIFEST, Artifact, atomic_path
from pipeline.generation.chat import Answer, Message
from pipeline.support.errors import UserError
from pipeline.support.http import Abandoned
from pipeline.support.progress import Landed
from pipeline.support.rows import json_rows
from pipeline.support.streams import as_they_end

VERSION = 1
STAGE = "generation"
QUESTIONS_PER_SHARD = 100
_NAMED = 20  # so many failures are named in a manifest; the rest is counted

Ask = Callable[[Sequence[Message], threading.Event], Answer]


@dataclass(frozen=True)
class Params(artifacts.Params):
    """What may change an answer: the model, by the user's word, the fields sent with it, and how messages are made.

    `service` stands for the weights, which nobody here can see; `request` and `messages` are canonical JSON.
    """

    service: str
    model: str
    request: str
    messages: str
    questions_per_shard: int = QUESTIONS_PER_SHARD


class Question(NamedTuple):
    """What to ask; `messages` is called in the thread that asks, because images in them are large."""

    query_id: str
    messages: Callable[[], Sequence[Message]]


@dataclass(frozen=True)
class Job:
    """`questions` gives `total` of them, in the same order each time it is called."""

    artifact: Artifact[Params]
    questions: Callable[[], Iterator[Question]]
    total: int

    @property
    def num_shards(self) -> int:
        return -(-self.total // self.artifact.params.questions_per_shard)


@dataclass
class _Shard:
    """Rows by query id; `open_ids`: those without an answer that have not been tried in this run."""

    path: Path
    query_ids: list[str]
    rows: dict[str, dict[str, Any]]
    open_ids: set[str] = field(default_factory=set)
    is_changed: bool = False

    def write(self) -> None:
        lines = [_line(self.rows[query_id]) for query_id in self.query_ids if query_id in self.rows]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        self.is_changed = False


def make(job: Job, ask: Ask, concurrency: int, tolerated: int) -> Iterator[Landed]:
    """Ask what has no answer yet and yield each shard that is done; seals the artifact at the end.

    UserError when more questions than `tolerated` have failed: what has been answered by then is on disk.
    """
    reasons: list[str] = []
    stop, shards = threading.Event(), dict[int, _Shard]()
    calls = as_they_end(lambda work: _row(work[1], ask, stop), _unanswered(job, shards), concurrency, stop)
    try:
        for (number, question), call in calls:
            row = _ended(call)
            if row is None:
                continue
            if row["failure"] is not None:
                reasons.append(f"{row['query_id']}: {row['failure']}")
                if len(reasons) > tolerated:
                    stop.set()
            yield from _received(job, shards, number, row)
    finally:
        calls.close()
        for shard in shards.values():
            if shard.is_changed:
                shard.write()
    if len(reasons) > tolerated:
        raise UserError(f"{len(reasons)} queries have no answer, {tolerated} tolerated", str(job.artifact.directory),
                        "\n".join([*reasons[:5], "the same command asks again for these and for what is missing;"
                                   " or tolerate them: --tolerate"]))
    job.artifact.seal(facts(job))


def is_accepted(job: Job, tolerated: int) -> bool:
    """Whether all is done; a finished set with more failures than are tolerated now is opened again."""
    if not job.artifact.is_complete():
        return False
    if job.artifact.manifest()["failed"]["count"] <= tolerated:
        return True
    job.artifact.path(MANIFEST).unlink()
    job.artifact.path(MADE).unlink(missing_ok=True)
    return False


def rows(artifact: Artifact[Params]) -> Iterator[dict[str, Any]]:
    """What was answered, in the order of the questions: query_id, answer or null, failure or null, and tokens."""
    for name in sorted(artifact.present()):
        if name.startswith("answers-"):
            yield from (row.fields for row in json_rows(artifact.path(name)))


def facts(job: Job) -> dict[str, Any]:
    """Counts over all shards: what failed and why, what was cut off, tokens."""
    found = list(rows(job.artifact))
    failed = [row for row in found if row["failure"] is not None]
    named = [{"query_id": row["query_id"], "reason": row["failure"]} for row in failed[:_NAMED]]
    return {"queries": len(found), "answered": len(found) - len(failed),
            "failed": {"count": len(failed), "first": named},
            "cut_off": sum(row["finish_reason"] == "length" for row in found),
            "without_token_counts": sum(row["prompt_tokens"] is None or row["completion_tokens"] is None
                                        for row in found),
            **{name: sum(row[name] or 0 for row in found) for name in ("prompt_tokens", "completion_tokens")}}


def _unanswered(job: Job, shards: dict[int, _Shard]) -> Iterator[tuple[int, Question]]:
    """Questions without an answer, each with the number of its shard, which is opened in `shards`."""
    questions, number, seen = job.questions(), 0, set[str]()
    while chunk := list(islice(questions, job.artifact.params.questions_per_shard)):
        query_ids = [question.query_id for question in chunk]
        _refuse_twice(query_ids, seen)
        path = job.artifact.path(f"answers-{number:05d}.jsonl")
        found = {row.fields["query_id"]: row.fields for row in json_rows(path)} if path.exists() else {}
        todo = [question for question in chunk if found.get(question.query_id, {}).get("answer") is None]
        if todo:
            shards[number] = _Shard(path, query_ids, found, {question.query_id for question in todo})
        yield from ((number, question) for question in todo)
        number += 1
    if not number:
        raise UserError("there is nothing to ask", job.artifact.name, "check the task, or the file of messages")


def _refuse_twice(query_ids: Iterable[str], seen: set[str]) -> None:
    for query_id in query_ids:
        if query_id in seen:
            raise UserError(f"query '{query_id}' stands twice among the questions", None, "ids must be unique")
        seen.add(query_id)


def _row(question: Question, ask: Ask, stop: threading.Event) -> dict[str, Any]:
    """The answer as it is kept; a failure for good is one, too."""
    try:
        answer = ask(question.messages(), stop)
    except UserError as error:
        what = f"{error.what} [{error.where}]" if error.where else error.what
        answer = Answer(None, what.encode("utf-8", "replace").decode())  # no file could hold lone surrogates
    kept = answer._asdict()
    return {"query_id": question.query_id, "answer": kept.pop("text"), **kept}


def _ended(call: Future[dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return call.result()
    except Abandoned:
        return None


def _received(job: Job, shards: dict[int, _Shard], number: int, row: dict[str, Any]) -> Iterator[Landed]:
    shard = shards[number]
    shard.rows[row["query_id"]] = row
    shard.open_ids.discard(row["query_id"])
    shard.is_changed = True
    if not shard.open_ids:
        shards.pop(number).write()
        yield Landed(job.artifact.name, shard.path.name, len(shard.query_ids))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
