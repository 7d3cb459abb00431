"""The compiled half of the exact search: native.cpp, built on first use for this machine's processor.

One source, one build per kind of vector unit. Without a compiler or on a processor that it is not written for there is
none, and the search runs on torch: the same hits, more slowly, and the log says so (support/native_build.py).
"""

from __future__ import annotations

import logging
from functools import lru_cache, partial
from pathlib import Path

from pipeline.support.native_build import OPTIONS, UNITS, VARIABLE, Library, Source, available_units

log = logging.getLogger("pipeline")

SOURCE = Source(Path(__file__).with_name("native.cpp"), "exact search", "torch")
OVERFLOW = -1

_SIGNATURES = {
    "start": "", "packed_bytes": "ni", "norms": "pinnip", "sum_of_units": "pinnpdip", "pack_rows": "pinnpppiippp",
    "pack_panels": "pnnpiipp", "search": "ppppippppippnpipnnnnip", "search_few": "pippnpipnnnip"}


class Native(Library):
    """The functions of native.cpp, as it describes them."""

    def __init__(self, unit: str, path: Path):
        super().__init__(path, _SIGNATURES)
        self.unit = unit

    @property
    def numbers(self) -> tuple[str, ...]:
        """What products can be formed of, the quickest first.

        AMX multiplies bfloat16 so quickly that scoring what int8 keeps would cost more than it saves.
        """
        has = {"int8": "avx512vnni" in UNITS[self.unit] and self.unit != "amx",
               "bfloat16": "avx512bf16" in UNITS[self.unit], "float32": True}
        return tuple(number for number, is_here in has.items() if is_here)


@lru_cache(maxsize=1)
def load() -> Native | None:
    """The build for the best unit of this processor that the environment allows; None, with the reason logged."""
    for unit in available_units():
        native = SOURCE.loaded(unit, flags(unit), partial(Native, unit))
        if native is None:
            return None
        if native("start") == 0:
            log.info("exact search: native kernel (%s)", unit)
            return native
        log.info("the system does not let this process use %s", unit)
    log.info("exact search: torch; the native kernel needs an x86 processor with AVX2 (%s caps what is used)", VARIABLE)
    return None


def load_if(worth_compiling: bool) -> Native | None:
    """The same where it is there already, or worth some seconds of compiling; the results are the same without it."""
    return load() if worth_compiling or _is_built() else None


def _is_built() -> bool:
    units = available_units()
    return bool(units) and SOURCE.is_built(units[0], flags(units[0]))


def flags(unit: str) -> list[str]:
    """The bits of a score are defined by single operations: a compiler must not join a product and a sum."""
    return [*OPTIONS, "-ffp-contract=off", "-pthread", *(f"-m{flag}" for flag in UNITS[unit])]
