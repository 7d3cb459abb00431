"""Artifacts: what one job makes, named by a fingerprint, committed by a manifest.

Promise: a file under its final name is whole, and a manifest exists only when all its files do. Progress is
the set of files present; there is no lock, no daemon and no database, so two workers on one unit waste work
and damage nothing. The price: code is versioned by hand (`VERSION` of a stage), never hashed, because reruns
after a renamed variable are worse than a version that somebody has to remember.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline import __version__
from pipeline.support.errors import UserError

MANIFEST = "manifest.json"
MADE = "made.json"
_DAY = 86400.0
_RECORDED = ("numpy", "pyarrow", "torch", "torchvision", "open_clip_torch", "faiss-cpu")


class Params:
    """Base of what may change the bytes of an artifact. `Runtime` (what only changes speed) is not one of these."""


class Runtime:
    """Base of what changes only speed: batch size, workers, devices, memory. Never part of a fingerprint."""


P = TypeVar("P", bound=Params)


@dataclass(frozen=True)
class Identity(Generic[P]):
    """Everything that may change an artifact's bytes, and nothing else."""

    stage: str
    version: int
    params: P
    inputs: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        assert isinstance(self.params, Params), "only Params enter a fingerprint"
        params = asdict(self.params)  # type: ignore[call-overload]
        return {"stage": self.stage, "version": self.version, "params": params, "inputs": dict(self.inputs)}

    @cached_property
    def fingerprint(self) -> str:
        """First 12 hex digits of sha256 over canonical JSON."""
        return sha256(canonical_json(self.as_json()).encode()).hexdigest()[:12]


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


@dataclass(frozen=True)
class Artifact(Generic[P]):
    """A directory `<root>/<stage>/<name>-<fingerprint>` and what is in it."""

    root: Path
    name: str
    identity: Identity[P]

    @property
    def fingerprint(self) -> str:
        return self.identity.fingerprint

    @property
    def params(self) -> P:
        return self.identity.params

    @property
    def label(self) -> str:
        return f"{self.identity.stage}/{self.name}-{self.fingerprint}"

    @property
    def directory(self) -> Path:
        return self.root / self.label

    def path(self, file: str) -> Path:
        return self.directory / file

    def is_complete(self) -> bool:
        return self.path(MANIFEST).exists()

    def present(self) -> set[str]:
        """Names of the files that are there, temporaries left out."""
        try:
            return {entry.name for entry in os.scandir(self.directory) if not entry.name.startswith(".")}
        except FileNotFoundError:
            return set()

    def manifest(self) -> dict[str, Any]:
        """The manifest; UserError if it is absent or damaged."""
        return read_manifest(self.directory)

    def seal(self, facts: Mapping[str, Any]) -> None:
        """Write the manifest over all files that are there: the commit.

        Where and when it was made stands in a file of its own, so that manifests of equal work are equal byte for
        byte, wherever and whenever they were made.
        """
        entries = [{"file": file, "bytes": self.path(file).stat().st_size, "sha256": file_sha256(self.path(file))}
                   for file in sorted(self.present() - {MANIFEST, MADE})]
        write_json(self.path(MADE), _made())
        write_json(self.path(MANIFEST), {"artifact": self.label, **self.identity.as_json(), "files": entries, **facts})


def read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError("this artifact is not complete: it has no manifest", str(directory),
                        "run the stage that makes it") from None
    except (ValueError, UnicodeDecodeError):
        raise UserError("the manifest is damaged", str(path), f"delete it and run again: rm {path}") from None


def damages(directory: Path) -> list[str]:
    """Files of a complete artifact that are absent or differ from their recorded checksum, with the reason."""
    found = []
    for entry in read_manifest(directory)["files"]:
        path = directory / entry["file"]
        if not path.exists():
            found.append(f"{path}: is missing")
        elif path.stat().st_size != entry["bytes"]:
            found.append(f"{path}: has {path.stat().st_size} bytes, the manifest says {entry['bytes']}")
        elif file_sha256(path) != entry["sha256"]:
            found.append(f"{path}: was changed after it was written (sha256 differs)")
    return found


def _made() -> dict[str, Any]:
    found = {}
    for package in _RECORDED:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return {"host": socket.gethostname(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "python": platform.python_version(), "plumbline": __version__, "versions": found}


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path, first_wins: bool = False) -> Iterator[Path]:
    """A hidden temporary beside `path` to write to; it becomes `path` at the end, whole, or not at all.

    The temporary is in the same directory because a rename is atomic only within one file system. `first_wins` leaves
    a file that is there already as it is: a shard may be sealed, and what comes after it made from its bytes.
    """
    temporary = path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        _commit(temporary, path, first_wins)
        flush(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full while writing {path.name}", str(path.parent),
                            "free some space and run the same command again; what is done stays done") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _commit(temporary: Path, path: Path, first_wins: bool) -> None:
    if first_wins:
        try:
            return os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links: the last one wins there
            pass
    os.replace(temporary, path)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def sweep_temporaries(directory: Path, older_than: float = _DAY) -> int:
    """Remove temporaries of workers that died here, and old ones: a young one may belong to a worker elsewhere."""
    removed = 0
    for path in directory.glob(".*.tmp-*"):
        with suppress(FileNotFoundError):
            if _is_ours_and_dead(path.name) or time.time() - path.stat().st_mtime > older_than:
                path.unlink()
                removed += 1
    return removed


def _is_ours_and_dead(name: str) -> bool:
    host, _, process = name.rsplit(".tmp-", 1)[1].rpartition("-")
    if host != socket.gethostname() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def shard_file(noun: str, number: int) -> str:
    return f"{noun}-{number:05d}.parquet"


def shard_number(file: str) -> int:
    return int(file.rsplit("-", 1)[1].split(".")[0])
