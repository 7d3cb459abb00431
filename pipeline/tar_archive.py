"""A plain tar file read in place: any member for one look-up and one read, nothing unpacked.

The price is one pass over the headers, once per archive: it writes an index of names, offsets and sizes, an
SQLite file named after the archive's path, size and time. A changed archive is therefore indexed again, and
memory does not grow with the number of members. Links and special files in an archive are never followed. One
that is compressed, cut off or damaged is refused as a whole: half an archive looks like many missing images.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sqlite3
import tarfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pipeline.support.errors import UserError

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_UNPACK = "archives are read in place, which compression and division forbid; make it a plain tar:\n" \
          "cat mbeir_images.tar.gz.part-* | gunzip > mbeir_images.tar"


class Member(NamedTuple):
    """A stretch of the archive, in bytes. `size` is -1 for a link or a special file: nothing to read."""

    offset: int
    size: int


class TarArchive:
    """The members of one archive. Picklable; may be used on both sides of a fork.

    UserError on first use if the archive cannot be read or its index not be written into `cache_dir`.
    """

    def __init__(self, path: str, cache_dir: Path):
        self.path, self._cache_dir = os.path.abspath(path), cache_dir
        self._opened: tuple[int, sqlite3.Connection, BinaryIO] | None = None

    def __del__(self) -> None:
        if self._opened:
            _, index, archive = self._opened
            index.close()
            archive.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def find(self, name: str) -> Member | None:
        """Where a member lies: the last one of this name, which is the one that unpacking would leave."""
        index, _ = self._files()
        row = index.execute("SELECT offset, size FROM members WHERE name = ? ORDER BY rowid DESC LIMIT 1",
                            (_plain(name).encode(),)).fetchone()
        return Member(*row) if row else None

    def read(self, member: Member) -> bytes:
        _, archive = self._files()
        data = os.pread(archive.fileno(), member.size, member.offset)  # no shared position: thread-safe
        if len(data) != member.size:
            raise OSError(errno.EIO, "the archive ends before its member does", self.path)
        return data

    def _files(self) -> tuple[sqlite3.Connection, BinaryIO]:
        """Index and archive; opened anew after a fork: processes must not share an SQLite connection."""
        if self._opened is None or self._opened[0] != os.getpid():
            with contextlib.ExitStack() as on_failure:
                archive = on_failure.enter_context(_open_plain(self.path))
                index = _index_of(self.path, os.fstat(archive.fileno()), self._cache_dir)
                # immutable: an index never changes under its name; so no locks, which network mounts lack
                location = f"{index.absolute().as_uri()}?mode=ro&immutable=1"
                database = sqlite3.connect(location, uri=True, check_same_thread=False)
                self._opened = (os.getpid(), database, archive)
                on_failure.pop_all()
        return self._opened[1:]


def _open_plain(path: str) -> BinaryIO:
    try:
        archive = open(path, "rb", buffering=0)
    except OSError as error:
        do = "check the name of the archive in benchmark.archives or in the image reference"
        raise UserError(f"image archive cannot be read: {error.strerror}", path, do) from None
    start = os.pread(archive.fileno(), 8, 0)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            archive.close()
            raise UserError(f"image archive is compressed ({kind})", path, _UNPACK)
    return archive


def _index_of(path: str, status: os.stat_result, cache_dir: Path) -> Path:
    """The archive's index, built if it is not there. Two processes that build it at once only waste work."""
    key = sha256(f"{path}\n{status.st_size}\n{status.st_mtime_ns}".encode()).hexdigest()[:16]
    index = cache_dir / f"{os.path.basename(path)}-{key}.sqlite"
    if index.exists():
        return index
    temporary = index.with_name(f".{index.name}.{secrets.token_hex(6)}")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _write_index(path, temporary)
        os.replace(temporary, index)
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"the index of an image archive cannot be written: {error}", str(index)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return index


def _write_index(archive: str, index: Path) -> None:
    with contextlib.closing(sqlite3.connect(index, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = OFF")  # the rename makes it atomic, a journal is not needed
        database.execute("CREATE TABLE members (name BLOB, offset INTEGER, size INTEGER)")
        database.execute("BEGIN")
        database.executemany("INSERT INTO members VALUES (?, ?, ?)", _members(archive))
        database.execute("CREATE INDEX by_name ON members (name)")
        database.execute("COMMIT")  # flushed to disk here: PRAGMA synchronous is FULL by default


def _members(path: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size) of all members but directories, in order."""
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # or every header stays in memory
                if member.size < 0:
                    raise tarfile.ReadError(f"member of negative size at byte {member.offset:,}")
                if not member.isdir():
                    has_bytes = member.isreg() and not member.issparse()
                    name = _plain(member.name).encode("utf-8", "surrogateescape")
                    yield name, member.offset_data, member.size if has_bytes else -1
            _refuse_early_end(path, archive.offset)
    except tarfile.TarError as error:
        raise UserError(f"image archive is not a whole, plain tar: {error}", path, _UNPACK) from error


def _refuse_early_end(path: str, end: int) -> None:
    """Zeros or nothing must follow: tarfile takes a broken header for the end without a word."""
    with open(path, "rb") as archive:
        archive.seek(end)
        if any(archive.read(tarfile.BLOCKSIZE)):
            raise UserError(f"image archive is damaged at byte {end:,}", path, "copy it again")


def _plain(name: str) -> str:
    """`./a/b` is the member `a/b`: `tar -cf archive.tar .` writes the former, data sets name the latter."""
    return name.removeprefix("./")
