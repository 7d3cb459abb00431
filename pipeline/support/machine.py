"""What this machine is, in one line, read from the system without loading a library that computes.

Only what decides speed: the processor's name, its cores, the vector units that a product can use, GPUs, and the
versions of the libraries that make the products. Where the system does not tell (it is Linux that does), less is said.
"""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve",
          "bf16")
_LIBRARIES = {"torch": ("torch",), "faiss": ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu13")}


def machine(processors: Path = Path("/proc/cpuinfo"), gpus: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """Such as `AMD EPYC, 2 cores (avx2, avx512f), no GPU; python 3.11.2, torch 2.15.0, faiss-cpu 1.15.1`."""
    text = processors.read_text() if processors.exists() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    units = _vector_units(text)
    return (f"{_name(text)}, {cores} cores" + (f" ({', '.join(units)})" if units else "")
            + f", {_graphics(gpus)}; {_versions()}")


def _name(text: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _vector_units(text: str) -> list[str]:
    """Those that every core has: cores of one machine can differ."""
    of_cores = [set(flags.split()) for flags in re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)]
    common = set.intersection(*of_cores) if of_cores else set()
    return [unit for unit in _UNITS if unit in common]


def _graphics(gpus: Path) -> str:
    """Those of the machine; which of them a process may use is another question."""
    found = [re.search(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE) for path in gpus.glob("*/information")]
    names = sorted(match[1].strip() for match in found if match)
    return " + ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "no GPU"


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for names in _LIBRARIES.values():
        for name in names:
            try:
                found.append(f"{name} {version(name)}")
                break
            except PackageNotFoundError:
                continue
    return ", ".join(found)
