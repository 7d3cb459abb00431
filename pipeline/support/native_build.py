"""C++ that is compiled on first use, for this machine: kept in the user's cache, loaded with ctypes, or done without.

A library lies there under a hash of its source, the compiler and the flags. Whatever prevents one (no compiler, no
place to keep it, a library that cannot be loaded) is a line in the log and None: every use has another way to the same
results. The environment variable PLUMBLINE_CPU caps the vector unit that may be used (amx, avx512_bf16, avx512_vnni,
avx512, avx2), or turns all of this off (none).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.support.cache import user_cache
from pipeline.support.errors import UserError, nearest

log = logging.getLogger("pipeline")

VARIABLE = "PLUMBLINE_CPU"
NO_MEMORY = -2

_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
_VNNI = (*_AVX512, "avx512vnni")
# the best first; names as compilers spell them
UNITS = {"amx": (*_VNNI, "avx512bf16", "amx-tile", "amx-bf16"), "avx512_bf16": (*_VNNI, "avx512bf16"),
         "avx512_vnni": _VNNI, "avx512": _AVX512, "avx2": _AVX2}
_TORCH_NAMES = {"fma": "fma3", "avx512f": "avx512_f", "avx512bw": "avx512_bw", "avx512vl": "avx512_vl",
                "avx512dq": "avx512_dq", "avx512bf16": "avx512_bf16", "avx512vnni": "avx512_vnni",
                "amx-tile": "amx_tile", "amx-bf16": "amx_bf16"}
OPTIONS = ("-std=c++17", "-O3", "-shared", "-fPIC")
Loaded = TypeVar("Loaded", bound="Library")
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "n": ctypes.c_int64, "d": ctypes.c_double, "u": ctypes.c_uint64}


class Library:
    """The functions plumbline_<name> of a shared library, each of which returns an int64.

    A signature has a letter per argument: p pointer, i int, n int64, u uint64, d double. Arrays are NumPy's or
    torch's, C-contiguous.
    """

    def __init__(self, path: Path, signatures: Mapping[str, str]):
        self._library = ctypes.CDLL(str(path))
        for name, letters in signatures.items():
            function = getattr(self._library, f"plumbline_{name}")
            function.restype, function.argtypes = ctypes.c_int64, [_TYPES[letter] for letter in letters]

    def __call__(self, name: str, *arguments: Any) -> int:
        """The result of the function plumbline_<name>; MemoryError if it had too little memory."""
        result = int(getattr(self._library, f"plumbline_{name}")(*(_address(value) for value in arguments)))
        if result == NO_MEMORY:
            raise MemoryError(f"plumbline_{name}")
        return result


def _address(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return value.ctypes.data
    if hasattr(value, "data_ptr"):
        assert value.is_contiguous()
        return value.data_ptr()
    return value


@dataclass(frozen=True)
class Source:
    """A C++ file, and what the log calls what it is for and what does it otherwise."""

    path: Path
    purpose: str
    otherwise: str

    def loaded(self, label: str, options: Sequence[str], load: Callable[[Path], Loaded]) -> Loaded | None:
        """What `load` makes of the library that is built; None, with the reason logged, if there is none."""
        path = self.built(label, options)
        try:
            return None if path is None else load(path)
        except OSError as error:  # a cache on a disk from which nothing may be run, or made for another system
            self.done_without(f"the native kernel cannot be loaded: {error}")
            return None

    def built(self, label: str, options: Sequence[str]) -> Path | None:
        """The library, compiled if it is not in the cache; None, with the reason logged, if that cannot be."""
        found = compiler()
        if found is None:
            log.info("%s: %s; a C++ compiler (g++, clang++, or what CXX names) makes it several times faster",
                     self.purpose, self.otherwise)
            return None
        try:
            return self.compiled(found, options, [], label)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            self.done_without(f"{found} could not compile the native kernel: {said[:300]}")
            return None

    def is_built(self, label: str, options: Sequence[str]) -> bool:
        found = compiler()
        try:
            return bool(found and _target(self.path, found, tuple(options), (), label).exists())
        except (OSError, subprocess.SubprocessError):  # no place to keep one
            return False

    def compiled(self, compiler: str, options: Sequence[str], headers: Sequence[Path], label: str) -> Path:
        """The shared library that these options make of it; atomically: two processes may compile at once."""
        target = _target(self.path, compiler, tuple(options), tuple(headers), label)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                made = Path(folder) / target.name
                subprocess.run([compiler, *options, str(self.path), "-o", str(made)], check=True, capture_output=True,
                               text=True, timeout=300)
                made.replace(target)
        return target

    def done_without(self, reason: str) -> None:
        """For the log: why it is not used."""
        log.warning("%s: %s; %s", self.purpose, self.otherwise, reason)


def compiler() -> str | None:
    candidates = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def allowed_units() -> list[str]:
    """The units that PLUMBLINE_CPU allows, the best first; none if it is "none", UserError if it names no unit."""
    wanted = os.environ.get(VARIABLE, "amx")
    if wanted == "none":
        return []
    if wanted not in UNITS:
        raise UserError(f"{VARIABLE}={wanted} is not known", None,
                        nearest(wanted, UNITS) or f"one of {', '.join(UNITS)}, none")
    names = list(UNITS)
    return names[names.index(wanted):]


def available_units() -> list[str]:
    """Those of the allowed that this processor has, the best first."""
    import torch

    abilities = torch.cpu.get_capabilities()
    return [unit for unit in allowed_units()
            if all(abilities.get(_TORCH_NAMES.get(flag, flag)) for flag in UNITS[unit])]


@lru_cache(maxsize=16)
def _target(source: Path, compiler: str, options: tuple[str, ...], headers: tuple[Path, ...], label: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    contents = [version, " ".join(options).encode(), *(path.read_bytes() for path in (source, *headers))]
    return _cache() / f"native-{label}-{hashlib.sha256(b'|'.join(contents)).hexdigest()[:16]}.so"


def _cache() -> Path:
    """A directory that nobody else can write to: what lies there is run."""
    directory = user_cache("native")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{directory} can be written by others: chmod go-w it")
    return directory
