"""Identity, atomic commit, manifests, tampering."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.artifacts import Artifact, Identity, atomic_path, damages, read_manifest, sweep_temporaries
from pipeline.support.errors import UserError


@dataclass(frozen=True)
class Params(artifacts.Params):
    precision: str
    depth: int


@dataclass(frozen=True)
class Speed(artifacts.Runtime):
    batch_size: int


def identity(precision: str = "fp32", version: int = 1, **inputs: str) -> Identity:
    return Identity("embed", version, Params(precision, 10), inputs)


def test_fingerprint_is_pinned() -> None:
    """If this changes, every artifact of every user is made again: it must be meant."""
    assert identity(table="abc").fingerprint == "9516269ff75c"


def test_fingerprint_sees_params_version_and_inputs_and_no_order() -> None:
    base = identity(a="1", b="2").fingerprint
    assert identity(b="2", a="1").fingerprint == base
    assert len({base, identity("bf16", a="1", b="2").fingerprint, identity(version=2, a="1", b="2").fingerprint,
                identity(a="1", b="3").fingerprint}) == 4


def test_runtime_is_not_accepted_in_a_fingerprint() -> None:
    with pytest.raises(AssertionError):
        Identity("embed", 1, Speed(8), {}).fingerprint  # type: ignore[type-var]


def sealed(root: Path) -> Artifact:
    artifact = Artifact(root, "toy", identity())
    for name in ("b.bin", "a.bin"):
        with atomic_path(artifact.path(name)) as path:
            path.write_bytes(name.encode() * 100)
    artifact.seal({"rows": 2})
    return artifact


def test_equal_work_gives_equal_manifests(tmp_path: Path) -> None:
    first, second = sealed(tmp_path / "one"), sealed(tmp_path / "two")
    assert first.path("manifest.json").read_bytes() == second.path("manifest.json").read_bytes()
    assert [entry["file"] for entry in first.manifest()["files"]] == ["a.bin", "b.bin"]


@pytest.mark.parametrize("harm", ["edit", "truncate", "delete"])
def test_damage_is_found(tmp_path: Path, harm: str) -> None:
    artifact = sealed(tmp_path)
    assert damages(artifact.directory) == []
    path = artifact.path("a.bin")
    if harm == "edit":
        path.write_bytes(b"X" + path.read_bytes()[1:])
    elif harm == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    assert len(damages(artifact.directory)) == 1 and "a.bin" in damages(artifact.directory)[0]


def test_damaged_manifest_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"files": [')
    with pytest.raises(UserError, match="damaged"):
        read_manifest(tmp_path)


def test_an_exception_leaves_neither_file_nor_temporary(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "x.bin") as path:
        path.write_bytes(b"half")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk is full"), atomic_path(tmp_path / "x.bin") as path:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_really_full_disk(tmp_path: Path) -> None:
    """/dev/full answers every write as a full disk does."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with pytest.raises(UserError, match="disk is full"), atomic_path(tmp_path / "x.bin"):
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)


_WRITER = """
import sys, os, pathlib
from pipeline.artifacts import atomic_path
target = pathlib.Path(sys.argv[1])
for number in range(10**6):
    with atomic_path(target) as path:
        with open(path, "wb") as file:
            for _ in range(64):
                file.write(number.to_bytes(8, "big") * 1024)
    print(number, flush=True)
"""


def test_killed_writer_leaves_whole_files(tmp_path: Path) -> None:
    """SIGKILL at arbitrary moments: under the final name there is always one whole version."""
    target, kills = tmp_path / "x.bin", 8
    for kill in range(kills):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(target)], stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline()  # the first version is there
        time.sleep(0.003 * kill)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        content = target.read_bytes()
        assert len(content) == 64 * 8 * 1024 and len(set(content[i:i + 8] for i in range(0, len(content), 8))) == 1


def test_only_old_temporaries_are_swept(tmp_path: Path) -> None:
    old, young = tmp_path / ".a.bin.tmp-host-1", tmp_path / ".b.bin.tmp-host-2"
    old.write_bytes(b"")
    young.write_bytes(b"")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    assert sweep_temporaries(tmp_path) == 1 and young.exists() and not old.exists()


def test_a_temporary_of_a_process_that_died_here_is_swept_at_once(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getpid()):
        (tmp_path / f".a.bin.tmp-{socket.gethostname()}-{process}").write_bytes(b"")
    assert sweep_temporaries(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == [f".a.bin.tmp-{socket.gethostname()}-{os.getpid()}"]


def test_the_first_of_two_workers_wins(tmp_path: Path) -> None:
    """A second worker on the same unit, on another device perhaps, must not change what is sealed."""
    for content in (b"first", b"second"):
        with atomic_path(tmp_path / "x.bin", first_wins=True) as path:
            path.write_bytes(content)
    assert (tmp_path / "x.bin").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1
