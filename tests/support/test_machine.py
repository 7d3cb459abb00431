"""The line that says which machine a figure came from."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from pipeline.support import machine as described
from pipeline.support.machine import machine

CORES = """processor\t: 0
model name\t: Chip 9000 @ 2.00GHz
flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile

processor\t: 1
model name\t: Chip 9000 @ 2.00GHz
flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile
"""


def test_it_names_processor_units_of_every_core_and_gpus(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(CORES)
    for number, model in enumerate(("Big Card", "Small Card", "Big Card")):
        (tmp_path / "gpus" / str(number)).mkdir(parents=True)
        (tmp_path / "gpus" / str(number) / "information").write_text(f"Model: \t\t {model}\nIRQ: 1\n")
    found = machine(tmp_path / "cpuinfo", tmp_path / "gpus")
    assert found.startswith("Chip 9000 @ 2.00GHz, ")
    assert " (avx2, avx512f, avx512_bf16), 2 x Big Card + 1 x Small Card; python 3." in found


def test_it_says_less_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(described, "_LIBRARIES", {"numpy": ("no-such-library", "numpy"), "none": ("no-such-library",)})
    found = machine(tmp_path / "nothing", tmp_path / "nothing")
    assert "(" not in found and ", no GPU; python 3." in found and found.endswith(f", numpy {numpy.__version__}")


def test_of_this_machine_it_says_something() -> None:
    assert " cores" in machine() and "torch " in machine()
