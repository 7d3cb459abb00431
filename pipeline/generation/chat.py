"""A model behind OpenAI's chat protocol: messages in, one answer out, with the tokens that it took.

Promise: what can pass is tried again (support/http.py); what the model leaves empty or refuses is a value with its
reason, since its tokens are paid for. The trade: only the text of the first choice is read, no tool calls, no stream.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.support.http import JsonService, Patience, Unusable, service_of

_PATH = "/chat/completions"

Message = Mapping[str, Any]  # {"role": ..., "content": text, or a list of parts of type text and image_url}


class Answer(NamedTuple):
    """`text`, or None and the `failure`; why the model ended ("length": it was cut off); tokens, where told."""

    text: str | None
    failure: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ChatService:
    """Asks one model; safe to use from several threads. `request`: more fields for every request."""

    def __init__(self, url: str, model: str, request: Mapping[str, Any], key_variable: str | None, patience: Patience):
        self._service = JsonService(endpoint_of(url), key_variable, patience)
        self._fixed = {"model": model, **request}

    def answer(self, messages: Sequence[Message], stop: threading.Event) -> Answer:
        """UserError if the service fails for good; http.Abandoned if `stop` is set before it was asked."""
        return self._service.answer({**self._fixed, "messages": list(messages)}, read_answer, stop)


def endpoint_of(url: str) -> str:
    """Where to post to; `url` may be the base (http://host/v1) or whole. UserError if it is no URL."""
    service_of(url)
    base = url.rstrip("/")
    return base if base.endswith(_PATH) else base + _PATH


def read_answer(sent: Any) -> Answer:
    """A chat completion as it came; Unusable if it is none."""
    choices = sent.get("choices") if isinstance(sent, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    if not isinstance(first, dict) or not isinstance(message, dict):
        told = sent.get("error") if isinstance(sent, dict) else None  # some gateways put errors under status 200
        raise Unusable(f"it holds an error: {told}" if told else "it has no message in `choices`")
    usage = sent.get("usage") if isinstance(sent.get("usage"), dict) else {}
    reason = first.get("finish_reason") if isinstance(first.get("finish_reason"), str) else None
    text = _text(message.get("content"))
    return Answer(text, None if text is not None else _why_empty(message, reason), reason,
                  _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def _text(content: Any) -> str | None:
    """Of a string, or of a list of parts; lone surrogates, which no file could hold, are replaced."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str)) if parts else None
    return content.encode("utf-8", "replace").decode() if isinstance(content, str) else None


def _why_empty(message: Mapping[str, Any], reason: str | None) -> str:
    refusal = _text(message.get("refusal"))
    return f"the model refused: {refusal}" if refusal else f"the answer has no content (finish_reason: {reason})"


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
