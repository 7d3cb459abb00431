"""JSON over HTTP from a service that may be busy, slow or broken.

Promises: what waiting can mend (429, 5xx, a cut or slow connection, an answer that is no answer) is tried again, as
late as the service asks or ever more slowly; everything else ends at once with the service's own words; the key
comes from the environment and appears in no message. The trade: a request whose answer is lost is sent, and paid,
again.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pipeline.support.errors import UserError

if TYPE_CHECKING:
    import httpx
    import tenacity

log = logging.getLogger("pipeline")

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second attempt, and at most (then doubled each time)
LONGEST_ASKED = 600.0  # seconds: a service that asks for more has a daily quota, and nobody wants to wait
_PASSING = (408, 409, 425, 429)  # like 5xx: the same request may succeed later
_SHOWN = 300  # characters of a service's message

Answer = TypeVar("Answer")


class Unusable(Exception):
    """An answer that is not of the form agreed on: asking again may help."""


class _Passing(Exception):
    """A failure that may pass; `after`: seconds that the service asks to wait, if it does."""

    def __init__(self, what: str, after: float | None = None):
        super().__init__(what)
        self.after = after


class Abandoned(Exception):
    """The request was not made, or not made again: nobody waits for its answer any more."""


@dataclass(frozen=True)
class Patience:
    """How a service is asked; `timeout` in seconds, without a word from it; `retries` after the first attempt."""

    concurrency: int
    retries: int
    timeout: float
    requests_per_minute: int | None = None


class JsonService:
    """POSTs JSON to one URL, with the key that the environment variable `key_variable` holds (None: without)."""

    def __init__(self, url: str, key_variable: str | None, patience: Patience):
        httpx, _ = _libraries()
        self.where = service_of(url)
        self._url, self._key_variable, self._patience = url, key_variable, patience
        self._key = _key(key_variable, self.where)
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx.Limits(max_connections=patience.concurrency, max_keepalive_connections=patience.concurrency)
        self._client = httpx.Client(headers=headers, timeout=patience.timeout, limits=limits)
        self._slots = _Slots(patience.requests_per_minute)

    def answers(self, bodies: Sequence[Any], read: Callable[[Any, int], Answer]) -> list[Answer]:
        """For each body `read(answer, its number)`, in order; some are under way at a time.

        `read` raises Unusable if the answer is worth another attempt. UserError for the first that fails for good,
        when the others are abandoned.
        """
        stop = threading.Event()
        with ThreadPoolExecutor(max(1, min(self._patience.concurrency, len(bodies)))) as pool:
            futures = [pool.submit(self.answer, body, lambda answer, number=number: read(answer, number), stop)
                       for number, body in enumerate(bodies)]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:
                stop.set()
                for future in futures:
                    future.cancel()
        return [future.result() for future in futures]

    def answer(self, body: Any, read: Callable[[Any], Answer], stop: threading.Event) -> Answer:
        """`read` of the answer to one body; UserError if it fails for good, Abandoned if `stop` is set before."""
        _, tenacity = _libraries()
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Passing), wait=_seconds_to_wait, sleep=stop.wait,
            stop=tenacity.stop_after_attempt(self._patience.retries + 1), before_sleep=self._tell, reraise=True)
        try:
            found: Answer = retrying(self._once, body, read, stop)
            return found
        except _Passing as error:
            raise UserError(f"{error}, after {self._patience.retries + 1} attempts", self.where,
                            "run the same command again later: finished shards stay; or ask more slowly\n"
                            "(concurrency, requests_per_minute), or wait longer (timeout)") from error

    def _once(self, body: Any, read: Callable[[Any], Answer], stop: threading.Event) -> Answer:
        httpx, _ = _libraries()
        self._slots.take(stop)
        if stop.is_set():
            raise Abandoned
        try:
            response = self._client.post(self._url, content=json.dumps(body).encode())
        except httpx.RequestError as error:
            raise _Passing(f"no answer ({type(error).__name__}: {self._plain(str(error))})") from error
        self._check(response)
        try:
            return read(_parsed(response))
        except Unusable as error:
            raise _Passing(f"the answer cannot be used: {error}") from error

    def _check(self, response: httpx.Response) -> None:
        """Nothing for 200 to 299; _Passing or UserError for the rest."""
        status = response.status_code
        if response.is_success:
            return
        said = f"the service answered {status}: {self._plain(_message(response))}"
        if status in _PASSING or status >= 500:
            after = _asked_wait(response.headers.get("Retry-After", ""))
            if after is None or after <= LONGEST_ASKED:
                raise _Passing(said, after)
            raise UserError(f"{said}; it asks to wait {after:,.0f} seconds", self.where,
                            "run the same command again then: finished shards stay")
        if status in (401, 403):
            held = (f"check the key in the environment variable {self._key_variable}, and what it may do"
                    if self._key_variable else "name the environment variable that holds a key: key_variable")
            raise UserError(said, self.where, held)
        raise UserError(said, self.where, "check url, model and the fields of the request"
                        + (": the service redirects, which is not followed" if response.is_redirect else ""))

    def _plain(self, message: str) -> str:
        """A message of the service in one line, without the key that some repeat in it."""
        hidden = message.replace(self._key, "<key>") if self._key else message
        return " ".join(hidden.split())[:_SHOWN]

    def _tell(self, state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        log.warning("%s: %s; attempt %d of %d in %.1f s", self.where, state.outcome.exception(),
                    state.attempt_number + 1, self._patience.retries + 1, state.next_action.sleep)


class _Slots:
    """Starts of requests, evenly spaced if there is a bound per minute."""

    def __init__(self, per_minute: int | None):
        self._space = 60 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def take(self, stop: threading.Event) -> None:
        if self._space:
            with self._lock:
                start = max(self._next, time.monotonic())
                self._next = start + self._space
            stop.wait(start - time.monotonic())


def service_of(url: str) -> str:
    """Host and port of an http(s) URL; UserError for anything else, and for a password in it."""
    try:
        parts = urlsplit(url)
        valid_port = parts.port  # a property, which raises
    except ValueError:
        raise UserError("the URL is not valid", None, "url: https://<host>/v1/...") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"'{url}' is not the URL of a service", None, "url: https://<host>/v1/...")
    if "@" in parts.netloc:
        raise UserError("the URL holds a name or password", parts.hostname,
                        "put the key into an environment variable and name it: key_variable")
    return parts.hostname + (f":{valid_port}" if valid_port is not None else "")


def _key(variable: str | None, where: str) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"the environment variable {variable} holds no key", where, f"export {variable}=<your key>")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"what the environment variable {variable} holds cannot be a key", where,
                        "a key is one line of ASCII characters")
    return key


def _libraries() -> tuple[Any, Any]:
    try:
        import httpx
        import tenacity
    except ImportError as error:
        raise UserError(f"asking a service needs {error.name}, which is not installed", None,
                        "pip install httpx tenacity") from error
    return httpx, tenacity


def _seconds_to_wait(state: tenacity.RetryCallState) -> float:
    """As the service asks, or twice as long each time; a little more at random, or all would come back at once."""
    failure = state.outcome.exception() if state.outcome else None
    asked = failure.after if isinstance(failure, _Passing) else None
    if asked is not None:
        return asked + random.uniform(0, FIRST_WAIT)
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (state.attempt_number - 1)) * random.uniform(0.5, 1.0)


def _asked_wait(header: str) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None if it is absent or neither."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _parsed(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:  # also where it is no text at all
        raise Unusable("it is not JSON") from None


def _message(response: httpx.Response) -> str:
    """What the service says is wrong: services put it under different names."""
    try:
        found = response.json()
    except ValueError:
        return response.text or response.reason_phrase
    for name in ("error", "detail", "message"):
        while isinstance(found, dict) and name in found:
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found)
