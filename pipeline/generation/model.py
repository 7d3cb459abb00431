"""The model that is asked: what of it enters a fingerprint, and how it is reached.

Promise: a key never enters a file; the address does only as a label, so that a server may move while its answers stay.
The trade is that of every closed model: new weights under an old name are noticed only if the label changes with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.artifacts import canonical_json
from pipeline.generation.answers import Params
from pipeline.generation.chat import ChatService, endpoint_of
from pipeline.support.errors import UserError
from pipeline.support.http import Patience, service_of


@dataclass(frozen=True)
class Model:
    """`request`: fields beside model and messages. `service`: the label in the fingerprint; None: host and port."""

    url: str
    name: str
    request: Mapping[str, Any] = field(default_factory=dict)
    service: str | None = None
    key_variable: str | None = None

    def params(self, messages: Mapping[str, Any]) -> Params:
        """What the fingerprint sees; `messages`: how they are made."""
        return Params(self.service or service_of(self.url), self.name, canonical_json(self.request),
                      canonical_json(messages))

    @property
    def slug(self) -> str:
        """Its name as part of a file's name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "_", self.name.rstrip("/").rsplit("/", 1)[-1]).strip("._-") or "model"

    def connect(self, patience: Patience) -> ChatService:
        """UserError if the URL is none, or the key is not there."""
        if patience.concurrency < 1 or patience.retries < 0 or patience.timeout <= 0:
            raise UserError(f"concurrency is {patience.concurrency}, retries {patience.retries}, timeout "
                            f"{patience.timeout}", None, "at least 1, at least 0, more than 0 seconds")
        return ChatService(endpoint_of(self.url), self.name, self.request, self.key_variable, patience)


def request_of(more: str | None, max_tokens: int | None, temperature: float | None) -> dict[str, Any]:
    """Fields for every request; `more` is a JSON object, whose fields win. None is not sent."""
    found: dict[str, Any] = {name: value for name, value in
                             (("max_tokens", max_tokens), ("temperature", temperature)) if value is not None}
    try:
        given = json.loads(more) if more else {}
    except ValueError as error:
        raise UserError(f"not JSON: {error}", "--request", """such as '{"seed": 1}'""") from None
    if not isinstance(given, dict) or {"model", "messages", "stream", "n"} & set(given):
        raise UserError("an object with more fields is expected, without model, messages, stream and n", "--request",
                        """such as '{"seed": 1}'""")
    return found | given
