"""A chat completions server of our own: a defined answer for every conversation."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from tests.fault_server import FaultServer


def defined(messages: list[dict[str, Any]]) -> str:
    """The model: the text it was sent, and a number from the hash of everything."""
    texts = [part.get("text", "<picture>") for message in messages for part in _parts(message["content"])]
    return f"{sha256(json.dumps(messages).encode()).hexdigest()[:6]} of {texts[-1]}"


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"text": content}] if isinstance(content, str) else content


def completion(content: Any, **message: Any) -> dict[str, Any]:
    return {"object": "chat.completion", "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
            "choices": [{"index": 0, "finish_reason": "stop",
                         "message": {"role": "assistant", "content": content, **message}}]}


class ChatServer(FaultServer):
    path = "/v1/chat/completions"
    is_open = True

    def __init__(self, model: Callable[[list[dict[str, Any]]], Any] = defined) -> None:
        super().__init__()
        self.model = model

    @property
    def url(self) -> str:
        return f"{self.address}/v1"

    def defined(self, body: Any) -> dict[str, Any]:
        return completion(self.model(body["messages"]))
