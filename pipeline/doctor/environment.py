"""Is this Python what setup.cfg asks for, and what of this machine will be used?"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline import indexes
from pipeline.devices import resolve_device
from pipeline.indexes import native
from pipeline.indexes.exact import choose_kernel
from pipeline.indexes.native_kernel import NativeKernel
from pipeline.settings import Settings
from pipeline.support import requirements
from pipeline.support.errors import UserError
from pipeline.support.findings import FAIL, NOTE, OK, Finding, failed, guarded
from pipeline.support.machine import machine

_INSTALL = "see the lines above: a library is missing or broken"


def findings(settings: Settings) -> Iterator[Finding]:
    yield Finding(OK, "machine", machine())
    yield from _packages()
    yield from guarded(_threads(), _INSTALL)
    for section, asked in (("embed", settings.embed.device), ("retrieve", settings.retrieve.device)):
        yield from guarded(_device(section, asked), _INSTALL)
    yield from guarded(_kernel(settings), _INSTALL)
    yield from guarded(_faiss(settings), f"{_pip()} 'faiss-cpu'")


def _pip() -> str:
    pins = requirements.SETUP.with_name("constraints.txt")
    return f"{sys.executable} -m pip install" + (f" -c {pins}" if pins.exists() else "")


def _packages(setup: Path = requirements.SETUP) -> Iterator[Finding]:
    if not setup.exists():
        yield Finding(NOTE, "packages", "there is no setup.cfg here to compare them with")
        return
    if old := requirements.python_flaw(setup):
        yield Finding(FAIL, "python", old, "make an environment with a newer Python: bash run_eval_pipeline.sh does so")
    lines = requirements.requirements(setup=setup)
    for line in lines:
        for flaw in requirements.missing([line]):
            yield Finding(FAIL, "packages", flaw, f"{_pip()} '{line}'")
    if not requirements.missing(lines):
        yield Finding(OK, "packages", f"{len(lines)}, all as setup.cfg asks")


def _threads() -> Iterator[Finding]:
    import torch

    cores, threads, told = len(os.sched_getaffinity(0)), torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    detail = f"torch computes with {threads} on {cores} cores" + (f" (OMP_NUM_THREADS={told})" if told else "")
    is_fit = threads == cores or (told is not None and 1 < threads < cores)
    yield Finding(OK if is_fit else NOTE, "threads", detail, "" if is_fit else f"export OMP_NUM_THREADS={cores}")


def _device(section: str, asked: str) -> Iterator[Finding]:
    import torch

    try:
        device = resolve_device(asked)
    except UserError as error:
        yield failed(f"{section}.device", error)
        return
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if torch.device(device).type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        detail = f"{device}: {facts.name}, {facts.total_memory / 1e9:.0f} GB; {torch.cuda.device_count()} can be seen"
        yield Finding(OK, f"{section}.device", detail)
    elif present and asked == "auto":
        yield Finding(NOTE, f"{section}.device", f"{device}, though this machine has {present} GPUs",
                      "check CUDA_VISIBLE_DEVICES and nvidia-smi, and that torch was built with CUDA")
    else:
        yield Finding(OK, f"{section}.device", device)


def _kernel(settings: Settings) -> Iterator[Finding]:
    """Compiles it if need be: some seconds, once."""
    chosen = settings.retrieve
    try:
        kernel = choose_kernel(chosen.kernel, resolve_device(chosen.device), chosen.coarse, math.inf)
    except UserError as error:
        yield failed("exact search", error)
        return
    if isinstance(kernel, NativeKernel):
        yield Finding(OK, "exact search", f"native kernel ({getattr(native.load(), 'unit', '?')})")
        return
    on_processor = resolve_device(chosen.device) == "cpu" and chosen.kernel == "auto"
    yield Finding(NOTE if on_processor else OK, "exact search", "torch, the same hits",
                  "a C++ compiler makes it faster: apt-get install g++, or name yours in CXX" if on_processor else "")


def _faiss(settings: Settings) -> Iterator[Finding]:
    import torch  # noqa: F401  before faiss, or there are two OpenMP pools

    import faiss

    options = faiss.get_compile_options().strip() or "plain"
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    yield Finding(OK, "faiss", f"{faiss.__version__} ({options}), {gpus} GPUs")
    if not settings.index.is_exact:
        try:
            indexes.check_factory(settings.index.factory)
        except UserError as error:
            yield failed("index.factory", error)
            return
        yield Finding(OK, "index.factory", settings.index.factory)
