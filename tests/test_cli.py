"""What stands on stdout, where other programs read it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from tests.small_mbeir import SmallMbeir


@pytest.mark.parametrize("option", ["", f"python: {sys.executable}\n"])
@pytest.mark.parametrize("workers", [1, 2])
def test_json_stands_alone_whatever_libraries_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str,
                                                    workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    """An encoder's module says something when it is imported: here, in another interpreter, in a worker."""
    (tmp_path / "loud").mkdir()
    (tmp_path / "loud" / "encoder.py").write_text('print("[INFO] nobody asked")\nfrom tests.toy_encoder import *\n')
    (tmp_path / "loud.yaml").write_text(f"encoder: loud.encoder\n{option}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    experiment = SmallMbeir(tmp_path).write().experiment
    arguments = [str(experiment), f"encoders=[{tmp_path / 'loud.yaml'}]"]
    assert main(["run", *arguments, f"local.workers={workers}", "--json"]) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["scores"] and "[INFO] nobody asked" in printed.err
    assert main(["score", *arguments]) == 0 and "score" in capfd.readouterr().out
