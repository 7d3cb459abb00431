"""Checkpoints: content hashes that survive renaming, tensors that load, and pickles that never run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import OrderedDict, defaultdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from pipeline.encoders.checkpoints import find_file, load_state, load_strictly, source_identity, weights_hash
from pipeline.support.errors import UserError

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0])}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plumbline" / "weights"


def settled(path: Path, content: bytes) -> Path:
    """A file whose time of change lies in the past, so that its hash may be remembered."""
    path.write_bytes(content)
    os.utime(path, ns=(10**18, 10**18))
    return path


def same(state: dict[str, Any]) -> bool:
    return state.keys() == STATE.keys() and all(torch.equal(state[name], STATE[name]) for name in STATE)


class Intruder:
    """A pickle of this object runs a command when it is loaded by an unguarded reader."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


# hashes

def test_hash_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    path = settled(tmp_path / "a.bin", b"weights" * 1000)
    assert weights_hash(path) == "sha256:" + sha256(b"weights" * 1000).hexdigest()


def test_hash_follows_content_not_path_or_time(tmp_path: Path) -> None:
    first, copy = settled(tmp_path / "a.bin", b"one"), settled(tmp_path / "b.bin", b"one")
    before = weights_hash(first)
    os.utime(first, ns=(2 * 10**18, 2 * 10**18))
    assert weights_hash(first) == before == weights_hash(copy)
    assert weights_hash(settled(tmp_path / "a.bin", b"two")) != before  # same size, same modification time


def test_hash_is_remembered_once_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = settled(tmp_path / "a.bin", b"one"), tmp_path / "notes"
    weights_hash(path, cache)
    assert not cache.exists()  # written a moment ago: another write could leave the same times
    now = time.time_ns()
    monkeypatch.setattr("pipeline.encoders.checkpoints.time.time_ns", lambda: now + 10**10)
    true_hash = weights_hash(path, cache)
    [note] = cache.iterdir()
    content = json.loads(note.read_text())
    assert content["hash"] == true_hash
    note.write_text(json.dumps({**content, "hash": "sha256:remembered"}))
    assert weights_hash(path, cache) == "sha256:remembered"
    assert weights_hash(settled(path, b"two"), cache) == "sha256:" + sha256(b"two").hexdigest()


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"stamp": 3}'])
def test_a_damaged_cache_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    path, cache = settled(tmp_path / "a.bin", b"one"), tmp_path / "notes"
    now = time.time_ns()
    monkeypatch.setattr("pipeline.encoders.checkpoints.time.time_ns", lambda: now + 10**10)
    expected = weights_hash(path, cache)
    next(cache.iterdir()).write_text(damage)
    assert weights_hash(path, cache) == expected


def test_an_unwritable_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = settled(tmp_path / "blocked", b"a file where a directory should be")
    now = time.time_ns()
    monkeypatch.setattr("pipeline.encoders.checkpoints.time.time_ns", lambda: now + 10**10)
    assert weights_hash(settled(tmp_path / "a.bin", b"one"), blocked).startswith("sha256:")


def test_hashing_does_not_import_torch(tmp_path: Path) -> None:
    path = settled(tmp_path / "a.bin", b"one")
    code = ("import sys; from pathlib import Path; from pipeline.encoders.checkpoints import weights_hash;"
            f"weights_hash(Path({str(path)!r})); print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_source_is_a_file_or_a_seed_and_not_both(tmp_path: Path) -> None:
    path = str(settled(tmp_path / "a.bin", b"one"))
    assert source_identity(path, None) == {"weights": "sha256:" + sha256(b"one").hexdigest()}
    assert source_identity(None, 3)["seed"] == 3 and "torch" in source_identity(None, 3)
    for weights, seed in ((None, None), (path, 0)):
        with pytest.raises(UserError, match="exactly one"):
            source_identity(weights, seed)


# files

def test_find_file_looks_below_configs() -> None:
    assert find_file("encoders/architectures/tiny_clip.json", "architecture").is_file()


@pytest.mark.parametrize("reader", [weights_hash, load_state])
def test_missing_file_and_directory_are_user_errors(tmp_path: Path, reader: Any) -> None:
    with pytest.raises(UserError, match="not found"):
        reader(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="directory"):
        reader(tmp_path)


# reading

@pytest.mark.parametrize("payload", [
    STATE,
    OrderedDict(STATE),
    {"state_dict": STATE, "epoch": 3},
    {"model": STATE, "optimizer": {"state": {0: {"step": torch.tensor(1)}}}, "epoch": 3, "scaler": None},
    {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}},
    {"model": STATE, "config": OmegaConf.create({"a": {"b": [1, 2.5, None, "x"]}, "ref": "${a.b}"})},
])
def test_plain_and_training_checkpoints_load(tmp_path: Path, payload: Any) -> None:
    torch.save(payload, tmp_path / "zip.pt")
    torch.save(payload, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert same(load_state(tmp_path / "zip.pt")) and same(load_state(tmp_path / "legacy.pt"))


def test_safetensors_load(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    assert same(load_state(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["top", "config", "weights"])
def test_a_malicious_pickle_is_refused_and_never_runs(tmp_path: Path, zipped: bool, place: str) -> None:
    trace = tmp_path / "intruder_was_here"
    intruder = Intruder(f"touch {trace}")
    payload = {"top": intruder, "config": {"model": STATE, "config": intruder},
               "weights": {"model": {**STATE, "extra": intruder}}}[place]
    torch.save(payload, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="refused: it asks for 'posix.system'") as error:
        load_state(tmp_path / "bad.pth")
    assert "save_file" in str(error.value) and "bad.pth" in str(error.value)
    assert not trace.exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert trace.exists()  # the control: this pickle does run where nobody guards


def test_the_allowed_types_are_allowed_only_while_reading(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save(STATE, tmp_path / "a.pt")
    load_state(tmp_path / "a.pt")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_truncated_file_is_a_user_error_at_every_length(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_file(STATE, path) if path.suffix == ".safetensors" else torch.save({"model": STATE}, path)
    whole = path.read_bytes()
    for length in {0, 1, 8, 100, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a (whole|readable)"):
            load_state(path)


@pytest.mark.parametrize("content", [b"", b"<html>" * 50, b"\x80\x02.", b"PK\x03\x04 no zip", bytes(500)])
def test_what_is_no_checkpoint_is_a_user_error(tmp_path: Path, content: bytes) -> None:
    for name in ("a.pt", "a.bin", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError):
            load_state(tmp_path / name)


@pytest.mark.parametrize("payload", [{}, [STATE], 3, {"epoch": 1}, {"model": {}}, {1: torch.ones(1)},
                                     {"model": {"a": torch.ones(1), "b": 3}}, defaultdict(int)])
def test_a_checkpoint_without_weights_is_a_user_error(tmp_path: Path, payload: Any) -> None:
    torch.save(payload, tmp_path / "a.pt")
    with pytest.raises(UserError, match="no model weights"):
        load_state(tmp_path / "a.pt")


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "a.pt"))
    with pytest.raises(UserError, match="TorchScript"):
        load_state(tmp_path / "a.pt")


# fitting

def test_load_strictly_copies_and_casts() -> None:
    model = torch.nn.Linear(3, 2)
    load_strictly(model, {name: tensor.half() for name, tensor in STATE.items()}, Path("w.pt"))
    assert torch.equal(model.weight, STATE["weight"]) and model.weight.dtype == torch.float32


@pytest.mark.parametrize("change, message", [
    ({"bias": None}, "'bias' is missing"),
    ({"gain": torch.ones(1)}, "'gain' is not part of the architecture"),
    ({"weight": torch.ones(3, 2)}, r"'weight' has shape \(3, 2\), not \(2, 3\)"),
    ({"weight": None, "scale": torch.ones(1), "bias": torch.ones(5)}, r"'weight' is missing[^$]*3 of 3"),
])
def test_the_first_misfit_is_named_and_nothing_is_loaded(change: dict[str, Any], message: str) -> None:
    model = torch.nn.Linear(3, 2)
    before = model.weight.clone()
    state = {name: tensor for name, tensor in {**STATE, **change}.items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        load_strictly(model, state, Path("w.pt"))
    assert torch.equal(model.weight, before)
