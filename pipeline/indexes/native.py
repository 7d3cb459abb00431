"""The compiled half of the exact search: native.cpp, built on first use for this machine's processor.

One source, one build per kind of vector unit, kept in the user's cache under a hash of source, compiler and flags.
Without a compiler or on a processor that it is not written for there is none, and the search runs on torch: the same
hits, more slowly, and the log says so. The environment variable PLUMBLINE_CPU caps the vector unit that is used (amx,
avx512_bf16, avx512, avx2), or turns this off (none).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.support.cache import user_cache
from pipeline.support.errors import UserError, nearest

log = logging.getLogger("pipeline")

SOURCE = Path(__file__).with_name("native.cpp")
VARIABLE = "PLUMBLINE_CPU"
OVERFLOW, NO_MEMORY = -1, -2

_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
# the best first; names as compilers spell them
UNITS = {"amx": (*_AVX512, "avx512bf16", "amx-tile", "amx-bf16"), "avx512_bf16": (*_AVX512, "avx512bf16"),
         "avx512": _AVX512, "avx2": _AVX2}
_TORCH_NAMES = {"fma": "fma3", "avx512f": "avx512_f", "avx512bw": "avx512_bw", "avx512vl": "avx512_vl",
                "avx512dq": "avx512_dq", "avx512bf16": "avx512_bf16", "amx-tile": "amx_tile", "amx-bf16": "amx_bf16"}
# the bits of a score are defined by single operations: a compiler must not join a product and a sum
_OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
_SIGNATURES = {
    "plumbline_start": "", "plumbline_packed_bytes": "ni", "plumbline_norms": "pinnip",
    "plumbline_sum_of_units": "pinnpdip",
    "plumbline_pack_rows": "pinnppiipp", "plumbline_pack_panels": "pnniip",
    "plumbline_search": "ppipppippnpipnnnnip", "plumbline_search_few": "pippnpipnnnip"}
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "n": ctypes.c_int64, "d": ctypes.c_double}


class Native:
    """The functions of native.cpp, as it describes them; arrays are NumPy's or torch's, C-contiguous."""

    def __init__(self, unit: str, path: Path):
        self.unit, self._library = unit, ctypes.CDLL(str(path))
        for name, letters in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = ctypes.c_int64, [_TYPES[letter] for letter in letters]

    @property
    def has_bfloat16(self) -> bool:
        return "avx512bf16" in UNITS[self.unit]

    def __call__(self, name: str, *arguments: Any) -> int:
        """The result of the function plumbline_<name>; MemoryError if it had too little memory."""
        result = int(getattr(self._library, f"plumbline_{name}")(*(_address(value) for value in arguments)))
        if result == NO_MEMORY:
            raise MemoryError(f"plumbline_{name}")
        return result


def _address(value: Any) -> Any:
    if hasattr(value, "data_ptr"):
        assert value.is_contiguous()
        return value.data_ptr()
    if hasattr(value, "ctypes"):
        assert value.flags.c_contiguous
        return value.ctypes.data
    return value


@lru_cache(maxsize=1)
def load() -> Native | None:
    """The build for the best unit of this processor that the environment allows; None, with the reason logged."""
    for unit in available_units():
        native = _opened(unit)
        if native is None:
            return None
        if native("start") == 0:
            log.info("exact search: native kernel (%s)", unit)
            return native
        log.info("the system does not let this process use %s", unit)
    log.info("exact search: torch; the native kernel needs an x86 processor with AVX2 (%s caps what is used)", VARIABLE)
    return None


def _opened(unit: str) -> Native | None:
    path = built(unit)
    try:
        return None if path is None else Native(unit, path)
    except OSError as error:  # a cache on a disk from which nothing may be run, or made for another system
        log.warning("exact search: torch; the native kernel cannot be loaded: %s", error)
        return None


def load_if(worth_compiling: bool) -> Native | None:
    """The same where it is there already, or worth some seconds of compiling; the results are the same without it."""
    return load() if worth_compiling or _is_built() else None


def _is_built() -> bool:
    units, compiler = available_units(), _compiler()
    try:
        return bool(units and compiler and _target(compiler, tuple(flags(units[0])), (), units[0]).exists())
    except (OSError, subprocess.SubprocessError):  # no place to keep one
        return False


def available_units() -> list[str]:
    """What this processor has and PLUMBLINE_CPU allows, the best first; UserError if the variable names no unit."""
    import torch

    wanted = os.environ.get(VARIABLE, "amx")
    if wanted == "none":
        return []
    if wanted not in UNITS:
        raise UserError(f"{VARIABLE}={wanted} is not known", None,
                        nearest(wanted, UNITS) or f"one of {', '.join(UNITS)}, none")
    names = list(UNITS)
    abilities = torch.cpu.get_capabilities()
    return [unit for unit in names[names.index(wanted):]
            if all(abilities.get(_TORCH_NAMES.get(flag, flag)) for flag in UNITS[unit])]


def built(unit: str) -> Path | None:
    """The library for a unit, compiled if it is not in the cache; None, with the reason logged, if that cannot be."""
    compiler = _compiler()
    if compiler is None:
        log.info("exact search: torch; a C++ compiler (g++, clang++, or what CXX names) makes it several times faster")
        return None
    try:
        return compiled(compiler, flags(unit), [], unit)
    except (OSError, subprocess.SubprocessError) as error:
        found = getattr(error, "stderr", None) or str(error)
        log.warning("exact search: torch; %s could not compile the native kernel: %s", compiler, found[:300])
        return None


def flags(unit: str) -> list[str]:
    return [*_OPTIONS, *(f"-m{flag}" for flag in UNITS[unit])]


def compiled(compiler: str, options: list[str], headers: Sequence[Path], label: str) -> Path:
    """The shared library that these options make of native.cpp; atomically: two processes may compile at once."""
    target = _target(compiler, tuple(options), tuple(headers), label)
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            subprocess.run([compiler, *options, str(SOURCE), "-o", str(made)], check=True, capture_output=True,
                           text=True, timeout=300)
            made.replace(target)
    return target


def _compiler() -> str | None:
    candidates = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


@lru_cache(maxsize=8)
def _target(compiler: str, options: tuple[str, ...], headers: tuple[Path, ...], label: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    contents = [version, " ".join(options).encode(), *(path.read_bytes() for path in (SOURCE, *headers))]
    return _cache() / f"native-{label}-{hashlib.sha256(b'|'.join(contents)).hexdigest()[:16]}.so"


def _cache() -> Path:
    """A directory that nobody else can write to: what lies there is run."""
    directory = user_cache("native")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{directory} can be written by others: chmod go-w it")
    return directory
