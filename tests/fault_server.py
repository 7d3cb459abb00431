"""An HTTP server of our own in a thread: a defined answer for every request, and faults put into its way one by one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import pytest

from pipeline.support import http

KEY = "sk-secret-0123456789"
Fault = Callable[["Handler"], bool]  # answers a request in place of the server; True if it did


class Handler(BaseHTTPRequestHandler):
    server: FaultServer

    def do_POST(self) -> None:
        self.sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(self.sent)
            self.server.times.append(time.monotonic())
            fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        key = self.headers.get("Authorization")
        if self.path != self.server.path:
            return self.answer(404, {"error": {"message": f"no {self.path} here"}})
        if key != f"Bearer {KEY}" and (key or not self.server.is_open):
            return self.answer(401, {"error": {"message": f"no: {key}"}})
        time.sleep(self.server.delay)
        if fault is None or not fault(self):
            self.answer(200, self.server.defined(self.sent))

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


class FaultServer(ThreadingHTTPServer):
    """It answers at `path`; where it `is_open` also without a key."""

    daemon_threads = True
    request_queue_size = 64
    path = "/"
    is_open = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[Fault | None] = []
        self.always: Fault | None = None
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.lock = threading.Lock()
        self.delay = 0.0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def defined(self, body: Any) -> dict[str, Any]:
        """The answer to a request."""
        raise NotImplementedError

    def handle_error(self, *_: Any) -> None:
        """Clients that are killed in the middle are part of these tests."""


Server = TypeVar("Server", bound=FaultServer)


@contextmanager
def running(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """In a thread; TEST_KEY holds its key, and what it refuses is asked again soon."""
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(http, "FIRST_WAIT", 0.02)
    with server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def answering(status: int, content: Any = None, **headers: str) -> Fault:
    def fault(handler: Handler) -> bool:
        handler.answer(status, content if content is not None else {"error": {"message": "try later"}}, **headers)
        return True
    return fault


def cut(handler: Handler) -> bool:
    """The connection ends in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.close_connection = True
    return True


def dropped(handler: Handler) -> bool:
    handler.connection.close()
    return True
