"""One question to a server: what passes is asked again, what does not is told, and the key is told to nobody."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.generation.chat import Answer, ChatService, endpoint_of, read_answer
from pipeline.generation.model import Model, request_of
from pipeline.support.errors import UserError
from pipeline.support.http import Abandoned, Patience, Unusable
from tests.fault_server import KEY, Fault, Handler, answering, cut, dropped, running
from tests.generation.chat_server import ChatServer, completion, defined

HELLO = [{"role": "user", "content": "Hello \u00e9 \U0001f600"}]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    with running(ChatServer(), monkeypatch) as found:
        yield found


def service_of(server: ChatServer, retries: int = 6, timeout: float = 5.0, **options: Any) -> ChatService:
    model = Model(server.url, "a-model", {"temperature": 0.0}, key_variable="TEST_KEY", **options)
    return model.connect(Patience(4, retries, timeout))


def asked(service: ChatService) -> Answer:
    return service.answer(HELLO, threading.Event())


def slow(handler: Handler) -> bool:
    time.sleep(0.5)
    return False


def test_what_is_sent_and_what_comes_back(server: ChatServer) -> None:
    assert asked(service_of(server)) == Answer(defined(HELLO), None, "stop", 7, 2)
    assert server.bodies == [{"model": "a-model", "temperature": 0.0, "messages": HELLO}]


@pytest.mark.parametrize("fault", [
    answering(429, Retry_After="0"), answering(429), answering(500), answering(503, b"<html>busy</html>"),
    answering(200, b"{not json"), answering(200, {"choices": []}), answering(200, {"error": {"message": "busy"}}),
    answering(200, [1]), cut, dropped])
def test_what_passes_is_asked_again(server: ChatServer, fault: Fault) -> None:
    server.faults = [fault, None, fault, None]
    assert asked(service_of(server)).text == defined(HELLO)
    assert asked(service_of(server)).text == defined(HELLO)
    assert len(server.bodies) == 4


def test_a_slow_answer_is_asked_for_again(server: ChatServer) -> None:
    server.faults = [slow]
    assert asked(service_of(server, timeout=0.15)).text == defined(HELLO) and len(server.bodies) == 2


def test_retry_after_is_obeyed(server: ChatServer) -> None:
    server.faults = [answering(429, Retry_After="0.4")]
    started = time.monotonic()
    asked(service_of(server))
    assert time.monotonic() - started >= 0.4


def test_one_asks_no_more_often_than_allowed(server: ChatServer) -> None:
    server.always = answering(500)
    with pytest.raises(UserError, match="answered 500: try later, after 3 attempts"):
        asked(service_of(server, retries=2))
    assert len(server.bodies) == 3


@pytest.mark.parametrize("status, told", [(400, "no such field"), (401, "environment variable TEST_KEY"),
                                          (404, "check url"), (413, "check url")])
def test_what_does_not_pass_is_told_at_once(server: ChatServer, status: int, told: str) -> None:
    server.faults = [answering(status, {"error": {"message": "no such field"}})]
    with pytest.raises(UserError) as error:
        asked(service_of(server))
    assert told in str(error.value) and len(server.bodies) == 1


def test_a_wrong_key_is_told_without_the_key(server: ChatServer, monkeypatch: pytest.MonkeyPatch,
                                             caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-wrong-4711")
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as error:
        asked(service_of(server))
    assert "401" in str(error.value) and "TEST_KEY" in str(error.value)
    assert not any(key in str(error.value) + caplog.text for key in ("sk-wrong-4711", KEY))


def test_whoever_stops_is_not_kept_waiting(server: ChatServer) -> None:
    server.always, stop = answering(429, Retry_After="300"), threading.Event()
    threading.Timer(0.3, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Abandoned):
        service_of(server).answer(HELLO, stop)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("sent, expected", [
    (completion(""), Answer("", None, "stop", 7, 2)),
    (completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), Answer("ab", None, "stop", 7, 2)),
    (completion(None, refusal="no"), Answer(None, "the model refused: no", "stop", 7, 2)),
    (completion(None), Answer(None, "the answer has no content (finish_reason: stop)", "stop", 7, 2)),
    (completion("a\ud800"), Answer("a?", None, "stop", 7, 2)),
    ({"choices": [{"message": {"content": "a"}}]}, Answer("a")),
    ({"choices": [{"message": {"content": "a"}, "finish_reason": 3}], "usage": {"prompt_tokens": True}}, Answer("a")),
])
def test_answers_are_read_as_services_write_them(sent: Any, expected: Answer) -> None:
    assert read_answer(sent) == expected


@pytest.mark.parametrize("sent", [None, 1, [], {}, {"choices": None}, {"choices": [1]}, {"choices": [{}]},
                                  {"choices": {"0": 1}}, {"choices": [{"message": "text"}]}])
def test_what_is_no_answer_is_refused(sent: Any) -> None:
    with pytest.raises(Unusable):
        read_answer(sent)


def test_an_error_under_status_200_is_told() -> None:
    with pytest.raises(Unusable, match="it holds an error: busy"):
        read_answer({"error": "busy"})


@pytest.mark.parametrize("url", ["http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/chat/completions"])
def test_the_base_or_the_whole_address_may_be_given(url: str) -> None:
    assert endpoint_of(url) == "http://h:1/v1/chat/completions"


@pytest.mark.parametrize("url", ["h:1/v1", "ftp://h", "http://me:secret@h/v1", "http://h:99999/v1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UserError):
        endpoint_of(url)


def test_fields_of_a_request() -> None:
    assert request_of(None, None, None) == {}
    assert request_of('{"seed": 1, "temperature": 1}', 5, 0.0) == {"max_tokens": 5, "temperature": 1, "seed": 1}
    for wrong in ("{", "[]", '{"n": 2}', '{"stream": true}', '{"messages": []}'):
        with pytest.raises(UserError):
            request_of(wrong, None, None)
