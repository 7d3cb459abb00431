"""Every kernel of the exact search that can run here, the AMX one in software where the processor has none."""

from __future__ import annotations

import os
import shutil
from functools import lru_cache
from pathlib import Path

from pipeline.indexes import native
from pipeline.indexes.native_kernel import NativeKernel
from pipeline.indexes.search import Kernel
from pipeline.indexes.torch_kernel import TorchKernel

EMULATED = Path(__file__).with_name("emulated_tiles.h")
EXTRA_FLAGS = "PLUMBLINE_TEST_FLAGS"  # an environment variable: sanitizers, say
_COMPILER = next((path for name in ("g++", "clang++") if (path := shutil.which(name))), None)
NAMES = ["torch", *(["emulated amx", *native.available_units()] if _COMPILER and native.available_units() else [])]
if EXTRA_FLAGS in os.environ:  # which take long: the builds that hold all the code between them
    NAMES = [name for number, name in enumerate(NAMES) if number < 3 or name == "avx2"]


@lru_cache(maxsize=None)
def kernel(name: str) -> Kernel:
    if name == "torch":
        return TorchKernel()
    library = native.Native(name.removeprefix("emulated "), _built(name))
    assert library("start") == 0
    return NativeKernel(library)


def _built(name: str) -> Path:
    assert _COMPILER is not None
    extra = os.environ.get(EXTRA_FLAGS, "").split()
    if name != "emulated amx":
        return native.SOURCE.compiled(_COMPILER, [*native.flags(name), *extra], [], name)
    flags = [*native.flags(native.available_units()[0]), *extra, f'-DPLUMBLINE_EMULATED_TILES="{EMULATED}"']
    return native.SOURCE.compiled(_COMPILER, [flag for flag in flags if "amx" not in flag], [EMULATED], "emulated-amx")
