"""Findings: what an examination says, a line each. A failing one says what mends it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.support.errors import NotReady, UserError
from pipeline.support.network import without_network

OK, NOTE, FAIL = "ok", "note", "FAIL"


class Finding(NamedTuple):
    """One line of an examination. state: "ok", "note", or "FAIL", of which `do` says what mends it. `value`: the number
    that the detail tells in words, where others count with it: items per second, dimensions."""

    state: str
    name: str
    detail: str
    do: str = ""
    value: float | None = None


def failed(name: str, error: UserError) -> Finding:
    """A mistake of the user as a finding."""
    return Finding(FAIL, name, error.what + (f"  [{error.where}]" if error.where else ""),
                   error.do or "mend what is named here, then the same command again")


def guarded(findings: Iterator[Finding], do: str) -> Iterator[Finding]:
    """The findings; what ends them early is one as well. What is examined may fail in any way."""
    try:
        yield from findings
    except UserError as error:
        yield failed("stopped", error)
    except NotReady as reason:
        yield Finding(NOTE, "stopped", str(reason))
    except Exception as error:  # the last line says where it was
        yield Finding(FAIL, "exception", f"{type(error).__name__}: {error}", do)


def offline(findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings made without network, and at last whether one was asked for: to no avail, or without need."""
    has_failed = False
    with without_network() as asked:
        for finding in findings:
            has_failed = has_failed or finding.state == FAIL
            yield finding
    if not asked:
        yield Finding(OK, "network", "nothing asked for it")
        return
    hosts = ", ".join(asked)
    if has_failed:
        yield Finding(FAIL, "network", f"{hosts} was asked for, and not all went well without",
                      "run the same command without --offline once, where there is a network")
    else:
        yield Finding(NOTE, "network", f"{hosts} was asked for; it goes without")
