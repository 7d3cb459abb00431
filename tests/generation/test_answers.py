"""Shards of answers: every question once, whatever fails or is killed in between; what fails for good is counted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import Artifact, Identity, damages
from pipeline.cli import main
from pipeline.generation import answers
from pipeline.generation.answers import Job, Params, Question
from pipeline.generation.chat import Answer
from pipeline.support import http
from pipeline.support.errors import UserError
from tests.fault_server import Handler, answering, dropped, running
from tests.generation.chat_server import ChatServer, defined

COUNT = 23


class Asked:
    """A model in this process: upper case; what it is told to fail, fails."""

    def __init__(self, failing: Sequence[str] = (), slow: float = 0.0):
        self.failing, self.slow, self.seen = set(failing), slow, list[str]()

    def __call__(self, messages: Sequence[Any], stop: threading.Event) -> Answer:
        text = messages[0]["content"]
        self.seen.append(text)
        time.sleep(self.slow)
        if text in self.failing:
            raise UserError("the service answered 400: too long \ud800", "host")
        return Answer(text.upper(), None, "length" if text == "q3" else "stop", 5, None if text == "q4" else 2)


def job_of(directory: Path, count: int = COUNT, per_shard: int = 5) -> Job:
    def questions() -> Iterator[Question]:
        return (Question(f"q{number}", partial(_messages, f"q{number}")) for number in range(count))
    params = Params("host", "a-model", "{}", "{}", per_shard)
    return Job(Artifact(directory, "task.a-model", Identity(answers.STAGE, answers.VERSION, params, {})),
               questions, count)


def _messages(text: str) -> list[dict[str, Any]]:
    if text == "q21":
        raise UserError("a picture cannot be used", "img.png: gone")
    return [{"role": "user", "content": text}]


def made(job: Job, ask: Asked, tolerated: int = 1) -> list[str]:
    return [landed.unit for landed in answers.make(job, ask, 3, tolerated)]


def shards_of(job: Job) -> dict[str, bytes]:
    return {name: job.artifact.path(name).read_bytes() for name in job.artifact.present() if "answers" in name}


def test_every_question_has_its_answer_in_order_and_the_sums_are_right(tmp_path: Path) -> None:
    job, ask = job_of(tmp_path), Asked()
    assert sorted(made(job, ask)) == [f"answers-{number:05d}.jsonl" for number in range(job.num_shards)]
    rows = list(answers.rows(job.artifact))
    assert [row["query_id"] for row in rows] == [f"q{number}" for number in range(COUNT)]
    assert [row["answer"] for row in rows if row["query_id"] != "q21"] == [
        f"Q{number}" for number in range(COUNT) if number != 21]
    manifest = job.artifact.manifest()
    assert manifest["failed"] == {"count": 1, "first": [
        {"query_id": "q21", "reason": "a picture cannot be used [img.png: gone]"}]}
    assert (manifest["queries"], manifest["answered"], manifest["cut_off"]) == (23, 22, 1)
    assert (manifest["prompt_tokens"], manifest["completion_tokens"]) == (22 * 5, 21 * 2)
    assert manifest["without_token_counts"] == 2 and not damages(job.artifact.directory)
    assert "q21" not in ask.seen, "a picture that is missing is never paid for"


def test_neither_order_of_arrival_nor_concurrency_changes_a_byte(tmp_path: Path) -> None:
    one, other = job_of(tmp_path / "one"), job_of(tmp_path / "other")
    made(one, Asked())
    list(answers.make(other, Asked(slow=0.003), 16, 1))
    assert shards_of(one) == shards_of(other) and one.artifact.manifest() == other.artifact.manifest()


def test_too_many_failures_end_the_run_and_keep_what_is_paid_for(tmp_path: Path) -> None:
    job, ask = job_of(tmp_path), Asked(failing=["q7"])
    with pytest.raises(UserError, match=r"2 queries have no answer, 1 tolerated(.|\n)*q7: .*400: too long"):
        made(job, ask)
    assert not job.artifact.is_complete()
    again = Asked()
    made(job, again)
    assert sorted([*ask.seen, *again.seen]) == sorted([*(f"q{n}" for n in range(COUNT) if n != 21), "q7"])
    whole = job_of(tmp_path / "whole")
    made(whole, Asked())
    assert shards_of(job) == shards_of(whole)


def test_nothing_more_is_asked_after_a_failure_that_is_not_tolerated(tmp_path: Path) -> None:
    job, ask = job_of(tmp_path, count=500), Asked(failing=[f"q{number}" for number in range(500)], slow=0.001)
    with pytest.raises(UserError, match="0 tolerated"):
        made(job, ask, tolerated=0)
    assert len(ask.seen) <= 3 * 3


def test_tolerated_failures_stay_recorded_until_they_are_tolerated_no_more(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    made(job, Asked(failing=["q7"]), tolerated=2)
    assert answers.is_accepted(job, 2) and job.artifact.manifest()["failed"]["count"] == 2
    assert not answers.is_accepted(job, 1)
    ask = Asked()
    made(job, ask)
    assert ask.seen == ["q7"] and answers.is_accepted(job, 1)
    assert b"\\ud800" not in b"".join(shards_of(job).values())


def test_questions_without_ids_of_their_own_are_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    twice = Job(job.artifact, lambda: iter([*job.questions(), *job.questions()]), 46)
    with pytest.raises(UserError, match="stands twice"):
        made(twice, Asked())
    with pytest.raises(UserError, match="nothing to ask"):
        made(Job(job.artifact, lambda: iter(()), 0), Asked())


def test_interrupted_in_this_process_what_came_is_kept(tmp_path: Path) -> None:
    job, ask, again = job_of(tmp_path, per_shard=COUNT), Asked(), Asked()

    class Interrupting(Asked):
        def __call__(self, messages: Sequence[Any], stop: threading.Event) -> Answer:
            if len(ask.seen) == 12:
                raise KeyboardInterrupt
            return ask(messages, stop)
    with pytest.raises(KeyboardInterrupt):
        list(answers.make(job, Interrupting(), 1, 1))
    assert list(shards_of(job)) == ["answers-00000.jsonl"] and not job.artifact.is_complete()
    made(job, again)
    assert len(ask.seen) == 12 and {*ask.seen, *again.seen} == {f"q{n}" for n in range(COUNT) if n != 21}
    assert len({*ask.seen} & {*again.seen}) <= 2, "no more than what was under way"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    with running(ChatServer(), monkeypatch) as found:
        found.delay = 0.01
        yield found


def test_whatever_fails_on_the_way_every_query_gets_its_own_answer(
        server: ChatServer, tmp_path: Path, small_arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message meets two faults before it is answered, several at a time."""
    monkeypatch.setattr(http, "FIRST_WAIT", 0.02)
    lines = [{"query_id": f"q{n}", "messages": [{"role": "user", "content": f"Word {n}?"}]} for n in range(250)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    faults = [answering(429, Retry_After="0"), answering(500), answering(200, b"{half"), dropped, answering(200, {})]
    met = Counter[str]()

    def fault(handler: Handler) -> bool:
        with server.lock:
            word = handler.sent["messages"][0]["content"]
            met[word] += 1
        return met[word] <= 2 and faults[(met[word] + len(word) * 3 + ord(word[-2])) % 5](handler)
    server.always, server.delay = fault, 0.0
    assert main(["generate", "quickstart", "--messages", str(tmp_path / "words.jsonl"), "--url", server.url, "--model",
                 "m", "--concurrency", "16", f"work_dir={tmp_path / 'work'}", *small_arguments]) == 0
    found, = (tmp_path / "work" / "experiments" / "quickstart" / "generation").glob("words.m-*")
    rows = [json.loads(line) for path in sorted(found.glob("answers-*")) for line in path.read_text().splitlines()]
    assert [(row["query_id"], row["answer"]) for row in rows] == [
        (line["query_id"], defined(line["messages"])) for line in lines]  # type: ignore[arg-type]
    assert set(met.values()) == {3}


def test_killed_again_and_again_the_answers_are_those_of_a_run_left_alone(
        server: ChatServer, tmp_path: Path, small_arguments: list[str]) -> None:
    """The whole program, SIGKILL; what was in a finished shard is not asked for again."""
    lines = [{"query_id": f"q{n}", "messages": [{"role": "user", "content": f"Word {n}?"}]} for n in range(450)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "pipeline", "generate", "quickstart", "--messages", str(tmp_path / "words.jsonl"),
               "--url", server.url, "--model", "lab/a-model", "--concurrency", "4", *small_arguments]
    chance, kills = random.Random(3), 0
    directory = tmp_path / "work" / "experiments" / "quickstart" / "generation"
    while kills < 4:
        before = len(list(directory.rglob("answers-*")))
        program = subprocess.Popen([*command, f"work_dir={tmp_path / 'work'}"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while program.poll() is None and len(list(directory.rglob("answers-*"))) <= min(before, 3):
            time.sleep(0.005)
        time.sleep(chance.random() * 0.1)
        assert program.poll() is None, "it ended before it was killed"
        os.kill(program.pid, signal.SIGKILL)
        program.wait()
        kills += 1
    asked = len(server.bodies)
    done = subprocess.run([*command, f"work_dir={tmp_path / 'work'}"], capture_output=True, text=True)
    assert done.returncode == 0 and "450 of 450" in done.stdout, done.stderr
    assert asked + (450 - 400) <= len(server.bodies) <= asked + 100, "four shards were there"
    found, = directory.glob("words.a-model-*")
    rows = [json.loads(line) for path in sorted(found.glob("answers-*")) for line in path.read_text().splitlines()]
    assert {row["query_id"]: row["answer"] for row in rows} == {
        str(line["query_id"]): defined(line["messages"]) for line in lines}  # type: ignore[arg-type]
    alone = subprocess.run([*command, f"work_dir={tmp_path / 'alone'}"], capture_output=True, text=True)
    assert alone.returncode == 0
    other, = (tmp_path / "alone" / "experiments" / "quickstart" / "generation").glob("words.a-model-*")
    for path in sorted(other.glob("answers-*")) + [other / "manifest.json"]:
        assert (found / path.name).read_bytes() == path.read_bytes()
    again = subprocess.run([*command, f"work_dir={tmp_path / 'work'}"], capture_output=True, text=True)
    assert again.returncode == 0 and len(server.bodies) <= asked + 100 + 450
