"""A chat completions server of our own: a defined answer for every request, and faults put into its way one by one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

KEY = "sk-secret-0123456789"
Fault = Callable[["Handler"], bool]  # answers a request in place of the server; True if it did


def defined(messages: list[dict[str, Any]]) -> str:
    """The model: the text it was sent, and a number from the hash of everything."""
    texts = [part.get("text", "<picture>") for message in messages for part in _parts(message["content"])]
    return f"{sha256(json.dumps(messages).encode()).hexdigest()[:6]} of {texts[-1]}"


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"text": content}] if isinstance(content, str) else content


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        self.sent = body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        if self.path != "/v1/chat/completions":
            return self.answer(404, {"error": {"message": f"no {self.path} here"}})
        if self.headers.get("Authorization") not in (None, f"Bearer {KEY}"):
            return self.answer(401, {"error": {"message": f"no: {self.headers.get('Authorization')}"}})
        time.sleep(self.server.delay)
        if fault is None or not fault(self):
            self.answer(200, completion(self.server.model(body["messages"])))

    def answer(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def answering(status: int, content: Any = None, **headers: str) -> Fault:
    def fault(handler: Handler) -> bool:
        handler.answer(status, content if content is not None else {"error": {"message": "try later"}}, **headers)
        return True
    return fault


def cut(handler: Handler) -> bool:
    handler.connection.close()
    return True


def completion(content: Any, **message: Any) -> dict[str, Any]:
    return {"object": "chat.completion", "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
            "choices": [{"index": 0, "finish_reason": "stop",
                         "message": {"role": "assistant", "content": content, **message}}]}


class ChatServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[Fault | None] = []
        self.always: Fault | None = None
        self.bodies: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.delay = 0.0
        self.model: Callable[[list[dict[str, Any]]], Any] = defined

    def handle_error(self, *_: Any) -> None:
        """Clients that are killed in the middle are part of these tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    """A server in a thread; TEST_KEY holds its key."""
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    with ChatServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()
