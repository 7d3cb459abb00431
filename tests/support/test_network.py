"""Without network, this machine can still be reached and nothing else: whoever tries is refused and named."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pipeline.support.errors import NotReady, UserError
from pipeline.support.findings import Finding, guarded, offline
from pipeline.support.network import is_here, without_network


@pytest.mark.parametrize("host, here", [
    ("localhost", True), ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("", True), ("0.0.0.0", True),
    ("example.org", False), ("10.0.0.1", False), ("192.0.2.1", False), ("fe80::1%eth0", False)])
def test_what_is_here(host: str, here: bool) -> None:
    assert is_here(host) is here


def test_lookups_and_connections_are_refused_and_named() -> None:
    with without_network() as asked:
        with pytest.raises(socket.gaierror, match="switched off"):
            socket.getaddrinfo("example.org", 443)
        with pytest.raises(OSError, match="unreachable"), socket.socket() as calling:
            calling.connect(("192.0.2.7", 80))
        with pytest.raises(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            datagrams.sendto(b"hello", ("192.0.2.8", 53))
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen("https://example.com", timeout=5)
        with pytest.raises(httpx.ConnectError):
            httpx.get("https://example.net")
        with pytest.raises(OSError):
            socket.gethostbyname("example.org")
    assert asked == ["example.org", "192.0.2.7", "192.0.2.8", "example.com", "example.net"]


def test_this_machine_and_unix_sockets_stay(tmp_path: Path) -> None:
    with without_network() as asked, socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
        with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as calling:
            listening.bind(str(tmp_path / "socket"))
            listening.listen()
            calling.connect(str(tmp_path / "socket"))
    assert asked == []


def test_afterwards_the_network_is_back_and_inside_another_too() -> None:
    with without_network() as outer:
        with without_network() as inner, pytest.raises(OSError):
            socket.getaddrinfo("example.org", 1)
        with pytest.raises(socket.gaierror, match="switched off"):
            socket.getaddrinfo("example.net", 1)
    assert (inner, outer) == (["example.org"], ["example.net"])
    with pytest.raises(OSError) as refused, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.settimeout(0.1)
        datagrams.sendto(b"", ("192.0.2.7", 0))  # port 0: refused by the system itself, nothing leaves
    assert "unreachable" not in str(refused.value)


def findings(asks: bool, state: str) -> Iterator[Finding]:
    if asks:
        with pytest.raises(OSError):
            socket.getaddrinfo("example.org", 443)
    yield Finding(state, "weights", "")


@pytest.mark.parametrize("asks, state, expected", [(False, "ok", "ok"), (False, "FAIL", "ok"), (True, "ok", "note"),
                                                   (True, "FAIL", "FAIL")])
def test_a_section_fails_for_the_network_only_if_it_asked_and_failed(asks: bool, state: str, expected: str) -> None:
    *_, last = offline(findings(asks, state))
    assert last.name == "network" and last.state == expected and ("example.org" in last.detail) is asks


def test_what_ends_a_section_is_a_finding() -> None:
    def broken(error: Exception) -> Iterator[Finding]:
        yield Finding("ok", "first", "")
        raise error

    assert [each.state for each in guarded(broken(ValueError("odd")), "mend it")] == ["ok", "FAIL"]
    assert list(guarded(broken(ValueError("odd")), "mend it"))[1] == ("FAIL", "exception", "ValueError: odd", "mend it",
                                                                      None)
    assert list(guarded(broken(UserError("a", "b", "c")), ""))[1] == ("FAIL", "stopped", "a  [b]", "c", None)
    assert list(guarded(broken(NotReady("later")), ""))[1].state == "note"
