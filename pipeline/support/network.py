"""The network switched off inside this process: who asks for it is refused, and noted.

Python tells of every look-up and connection before it is made, whoever makes it through Python's own sockets; unix
sockets and this machine itself stay. The price: a compiled library with sockets of its own is not seen.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

_LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname")
_CONNECTIONS = ("socket.connect", "socket.sendto", "socket.sendmsg")
_asked: list[list[str]] = []  # one list for each `without_network` that is entered


@contextmanager
def without_network() -> Iterator[list[str]]:
    """The hosts that were asked for meanwhile, each once; who asks gets the error of a machine without network."""
    _install()
    asked: list[str] = []
    _asked.append(asked)
    try:
        yield asked
    finally:
        _asked.remove(asked)


@lru_cache(maxsize=1)
def _install() -> None:
    """Once: an audit hook cannot be taken away again."""
    sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _asked or event not in (*_LOOKUPS, *_CONNECTIONS):
        return
    address = arguments[0] if event in _LOOKUPS else arguments[1]
    host = address[0] if isinstance(address, tuple) else address if event in _LOOKUPS else None
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if not isinstance(name, str) or is_here(name):  # the path of a unix socket is no tuple
        return
    if name not in _asked[-1]:
        _asked[-1].append(name)
    if event in _LOOKUPS:
        raise socket.gaierror(socket.EAI_AGAIN, "the network is switched off")
    raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))


def is_here(host: str) -> bool:
    """Whether this name or address is this machine itself."""
    if host in ("", "localhost", "localhost.localdomain", "ip6-localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
