"""`doctor` passes what is fit, finds whatever each of these breaks, and says what mends it."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.config import load
from pipeline.doctor import duration, environment, places
from pipeline.support import requirements
from pipeline.support.findings import Finding
from tests import toy_encoder
from tests.small_mbeir import TASK, SmallMbeir

Found = dict[str, dict[str, Any]]


@pytest.fixture(autouse=True)
def quick_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.examination._SECONDS", 0.01)


def doctor(capsys: pytest.CaptureFixture[str], small: SmallMbeir, *arguments: str, code: int = 0) -> Found:
    """Section and name -> finding."""
    assert main(["doctor", str(small.experiment), *arguments, "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    found = {f"{section}: {finding['name']}": finding for section, each in told.items() for finding in each}
    assert all(finding["do"] for finding in found.values() if finding["state"] == "FAIL"), found
    return found


def failing(found: Found) -> set[str]:
    return {name for name, finding in found.items() if finding["state"] == "FAIL"}


def test_what_is_fit_passes_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = SmallMbeir(tmp_path).write()
    found = doctor(capsys, small, "cluster=example")
    assert failing(found) == set() and not (tmp_path / "work" / "artifacts").exists()
    assert found[f"images: pool {TASK}"]["detail"] == "4 images of 4 decoded"
    assert "at most about" in found["encoder tests_toy_encoder: time to embed"]["detail"]
    assert found["disk and data: tables"]["detail"] == "0 of 2 are collected"
    assert "embed 8 x 1 GPUs" in found["cluster example: file"]["detail"]
    assert main(["run", str(small.experiment), "--json"]) == 0
    capsys.readouterr()
    found = doctor(capsys, small)
    assert found["encoder tests_toy_encoder: time to embed"]["detail"] == "nothing is left"
    assert found["disk and data: tables"]["detail"] == "2 of 2 are collected"


def without(kind: str) -> Callable[[SmallMbeir], Any]:
    return lambda small: small.path(kind).unlink()


def with_archive(content: bytes) -> Callable[[SmallMbeir], Any]:
    return lambda small: (small.root / "images.tar").write_bytes(content)


@pytest.mark.parametrize("damage, arguments, broken, said", [
    (without("candidates"), [], {"disk and data: files"}, "cand_pool/local"),
    (without("qrels"), [], {"disk and data: files"}, "_qrels.txt"),
    (lambda small: small.path("queries").write_text(""), [], {"disk and data: files"}, "1 of 4 cannot be read"),
    (lambda small: small.path("queries").write_text("{"), [], {f"images: task {TASK}"}, "jsonl:1"),
    (lambda small: small.image("red").unlink(), [], {f"images: pool {TASK}"}, "first is 7:1: missing_image"),
    (lambda small: small.image("grey").write_bytes(b"\xff\xd8"), [], {f"images: pool {TASK}"}, "7:4: undecodable"),
    (None, ["benchmark.archives=[images.tar]"], {"disk and data: archive images.tar", f"images: pool {TASK}"},
     "No such file"),
    (with_archive(b"\x1f\x8b" + bytes(600)), ["benchmark.archives=[images.tar]"],
     {"disk and data: archive images.tar", f"images: pool {TASK}"}, "not compressed"),
    (None, ["benchmark.trusted_roots=[nowhere]"], {"disk and data: trusted_roots"}, "nowhere is no directory"),
    (None, ["embed.device=cuda:9"], {"environment: embed.device", "encoder tests_toy_encoder: stopped"}, "cuda:9"),
    (None, ["index.factory=IVF0,Flat"], {"environment: index.factory"}, "too small"),
    (None, ["cluster=exampel"], {"cluster exampel: file"}, "nearest: example"),
    (None, ["encoders=[clip_sf_large]"], {"encoder clip_sf_large: weights"}, "download the file first")])
def test_what_is_broken_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any,
                                 arguments: list[str], broken: set[str], said: str) -> None:
    small = SmallMbeir(tmp_path).write()
    if damage:
        damage(small)
    found = doctor(capsys, small, *arguments, code=1)
    assert failing(found) == broken
    assert any(said in finding["detail"] + finding["do"] for finding in found.values() if finding["state"] == "FAIL")


def test_tolerated_flaws_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = SmallMbeir(tmp_path).write()
    small.image("red").unlink()
    assert doctor(capsys, small, "embed.max_flawed=1")[f"images: pool {TASK}"]["state"] == "note"


def test_the_quick_look_opens_no_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_encoder, "build", lambda *_: pytest.fail("it was opened"))
    found = doctor(capsys, SmallMbeir(tmp_path).write(), "--quick")
    assert {name for name in found if name.startswith("encoder")} == {
        "encoder tests_toy_encoder: weights", "encoder tests_toy_encoder: examination"}


def test_offline_names_what_needs_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    small = SmallMbeir(tmp_path).write()
    found = doctor(capsys, small, "--offline")
    assert {finding["detail"] for name, finding in found.items() if name.endswith(": network")} == {
        "nothing asked for it"}

    def build(params: Any, *_: Any) -> Any:
        socket.getaddrinfo("weights.example.org", 443)
        return toy_encoder.ToyEncoder(params)

    monkeypatch.setattr(toy_encoder, "build", build)
    found = doctor(capsys, small, "--offline", code=1)
    assert failing(found) == {f"encoder tests_toy_encoder: {name}" for name in ("exception", "network")}
    assert "weights.example.org" in found["encoder tests_toy_encoder: network"]["detail"]
    found = doctor(capsys, small, "--offline", "--encoder", "jina_clip_v2_api", code=1)
    assert "api.jina.ai" in found["encoder jina_clip_v2_api: service"]["detail"]


def test_offline_holds_in_another_interpreter(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "needy_encoder.py").write_text(
        "import urllib.request\nfrom tests.toy_encoder import Params, identity\n"
        "def build(params, device, precision):\n    urllib.request.urlopen('http://weights.example.org')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    needy = tmp_path / "needy.yaml"
    needy.write_text(f"encoder: lab.needy_encoder\npython: {sys.executable}\n")
    found = doctor(capsys, SmallMbeir(tmp_path).write(), "--offline", "--encoder", str(needy), code=1)
    assert "switched off" in found["encoder needy: exception"]["detail"]


def test_packages_are_held_against_setup_cfg(tmp_path: Path) -> None:
    setup = tmp_path / "setup.cfg"
    setup.write_text("[options]\npython_requires = >=99.1\n"
                     "install_requires =\n    numpy>=99\n    nothing-of-this-name\n")
    found = list(environment._packages(setup))
    assert [finding.state for finding in found] == ["FAIL"] * 3
    assert "not >=99.1" in found[0].detail and found[2].detail == "nothing-of-this-name is not installed"
    assert found[1].do.endswith("'numpy>=99'") and found[1].do.startswith(f"{sys.executable} -m pip install -c ")
    assert [finding.state for finding in environment._packages(tmp_path / "none.cfg")] == ["note"]
    assert [finding.state for finding in environment._packages(requirements.SETUP)] == ["ok"]


def test_room_on_the_disk(tmp_path: Path) -> None:
    assert places.room("disk", [1000, 1000], tmp_path).state == "ok"
    assert places.room("disk", [1000, None], tmp_path).state == "note"
    full = places.room("disk", [10**18, None], tmp_path / "not" / "there")
    assert full.state == "FAIL" and "free 100" in full.do or "free 999" in full.do


def test_a_directory_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = SmallMbeir(tmp_path).write()
    found = doctor(capsys, small, "work_dir=/proc/plumbline", "--quick", code=1)
    assert "disk and data: work_dir" in failing(found)


def test_the_time_is_the_rows_that_are_left_by_the_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = SmallMbeir(tmp_path).write()
    assert main(["collect", str(small.experiment)]) == 0
    capsys.readouterr()
    measured = [Finding("ok", "build", "", "", 8), Finding("note", "speed of text", "", "", 0.5),
                Finding("note", "speed of image", "", "", 0.1), Finding("note", "preparing image", "", "", 0.2),
                Finding("note", "decoding", "", "", 0.2)]
    time, disk = duration.findings(load(str(small.experiment)), measured)
    seconds = 4 / 0.5 + 4 * (1 / 0.1 + 1 / 0.2 + 1 / 0.2)  # four queries, four candidates, one loader on a CPU
    assert time.detail == f"about {seconds:.0f} seconds: 4 image, 4 text"
    assert f" {8 * 8 * 2} B needed" in disk.detail
    assert duration.duration_text(7200) == "2.0 hours" and duration.duration_text(86400 * 3) == "3.0 days"
    assert list(duration.findings(load(str(small.experiment)), measured[:1])) == []
