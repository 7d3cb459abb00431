"""Images by reference: a file below a benchmark's root, or a member of a tar archive, read in place.

A reference is `folder/name.jpg` or `archive.tar!folder/name.jpg`. It comes from data and is not trusted: what
leaves the root is refused (UserError), what is missing or broken is a value to be counted (Flaw). Pixels are
those of PIL's `convert("RGB")`: transparency is dropped, of an animation the first frame is taken, the EXIF
orientation is not applied (UniIR does the same). The one exception is 16-bit grey, which PIL would clip to
white: its upper eight bits are kept. A directory is resolved once: links must not change meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.support.cache import user_cache
from pipeline.support.errors import UserError
from pipeline.tar_archive import Member, TarArchive

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000  # 300 MB as RGB, in each loader process; PIL's own bound, 89 M, would only warn
MAX_BYTES = 512 * 1024 * 1024  # the encoded image, which is read whole; no honest one of MAX_PIXELS is larger

# Ghostscript, fonts and scientific containers stay out: decoders nobody needs here are doors nobody watches.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_CLIMBS = re.compile(r"^/|(?:^|[/!])\.\.(?:/|$)")
_IN_ARCHIVE = re.compile(r"(.+?\.(?:tar(?:\.\w+)?|tgz))!(.+)", re.DOTALL)
# Any other error (a stale network mount, a dying disk) may pass: it ends the job, it does not become a flaw.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM,
           errno.ELOOP, errno.ENAMETOOLONG}
_KNOWN_DIRECTORIES = 65_536  # kept in memory: about 20 MB at the most
_KNOWN_ARCHIVES = 64  # two open files each; a usual limit is 1,024 for a process


class Flaw(Exception):
    """One image cannot be used: `kind` is missing_image, undecodable_image or oversized_image."""

    def __init__(self, kind: str, detail: str):
        super().__init__(kind, detail)  # both, so that the flaw survives pickling between processes
        self.kind, self.detail = kind, detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


class _Place(NamedTuple):
    """Where the bytes of an image lie: a whole file, or a member of an archive."""

    path: str
    size: int
    archive: TarArchive | None = None
    member: Member | None = None


class ImageStore:
    """The images of one benchmark. `archives` (tar files, absolute or relative to root) are searched first.

    A symbolic link may lead anywhere below `root` and `trusted_roots`, and nowhere else. Indexes of archives
    are kept in `cache_dir` (default: the user's cache directory) and built on first use, so ask for one size
    before forking many loader processes. Picklable; may be used on both sides of a fork.
    """

    def __init__(self, root: Path, archives: Sequence[str] = (), trusted_roots: Sequence[str] = (),
                 cache_dir: Path | None = None):
        self._root = os.path.realpath(root)
        self._allowed = tuple(os.path.join(os.path.realpath(self._below_root(directory)), "")
                              for directory in (".", *trusted_roots))
        self._cache_dir = Path(os.path.abspath(cache_dir)) if cache_dir else user_cache("archives")
        self._archives = tuple(TarArchive(self._below_root(name), self._cache_dir) for name in archives)
        self._known_archives: dict[str, TarArchive] = {}
        self._known_directories: dict[str, str] = {}

    def size(self, reference: str) -> int | None:
        """Bytes of the encoded image, None if it is missing; UserError if the reference leaves the root."""
        try:
            return self._locate(reference).size
        except Flaw:
            return None

    def read(self, reference: str) -> bytes:
        """The encoded image. Flaw if it is missing, may not be read, or is larger than MAX_BYTES."""
        place = self._locate(reference)
        if place.size > MAX_BYTES:
            raise Flaw("oversized_image", f"{reference}: {place.size:,} bytes, of at most {MAX_BYTES:,}")
        if place.archive and place.member:
            return place.archive.read(place.member)
        with _absence_is_a_flaw(reference):
            return Path(place.path).read_bytes()

    def open(self, reference: str) -> Image:
        """The image in mode RGB, fully loaded. Flaw if missing, broken, truncated or beyond MAX_PIXELS."""
        return decode(self.read(reference), reference)

    def _below_root(self, path: str) -> str:
        return os.path.join(self._root, os.path.expanduser(path))

    def _locate(self, reference: str) -> _Place:
        _refuse_malformed(reference)
        if inside := _IN_ARCHIVE.fullmatch(reference):
            archive_name, name = inside.groups()
            place = _member(self._archive(archive_name), name, reference)
            if place is None:
                raise Flaw("missing_image", f"{reference}: the archive has no such member")
            return place
        members = (_member(archive, reference, reference) for archive in self._archives)
        return next((place for place in members if place), None) or self._file(reference)

    def _archive(self, name: str) -> TarArchive:
        """The archive that a reference names: unlike a configured one, it must lie below the roots."""
        if name not in self._known_archives:
            archive = TarArchive(self._file(name).path, self._cache_dir)
            if len(self._known_archives) >= _KNOWN_ARCHIVES:
                self._known_archives.pop(next(iter(self._known_archives)))
            self._known_archives[name] = archive
        return self._known_archives[name]

    def _file(self, reference: str) -> _Place:
        with _absence_is_a_flaw(reference):
            directory, name = os.path.split(reference)
            path = os.path.join(self._real_directory(directory, reference), name)
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                path = self._confined(os.path.realpath(path), reference)
                status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a directory; or a pipe, which blocks
            raise Flaw("missing_image", f"{reference}: not a file")
        return _Place(path, status.st_size)

    def _real_directory(self, directory: str, reference: str) -> str:
        """The directory without symbolic links, known to be allowed; resolved once for all images in it."""
        if directory not in self._known_directories:
            real = self._confined(os.path.realpath(os.path.join(self._root, directory)), reference)
            if len(self._known_directories) >= _KNOWN_DIRECTORIES:
                self._known_directories.clear()
            self._known_directories[directory] = real
        return self._known_directories[directory]

    def _confined(self, real_path: str, reference: str) -> str:
        if os.path.join(real_path, "").startswith(self._allowed):
            return real_path
        raise UserError(f"image reference {reference!r} leaves the benchmark's root", self._root, (
            f"it leads to {real_path}\nif that is meant, name its directory in benchmark.trusted_roots"))


def _member(archive: TarArchive, name: str, reference: str) -> _Place | None:
    member = archive.find(name)
    if member and member.size < 0:
        raise Flaw("missing_image", f"{reference}: a link or special file in the archive, not followed")
    return _Place(archive.path, member.size, archive, member) if member else None


def _refuse_malformed(reference: str) -> None:
    if _CLIMBS.search(reference):
        raise UserError(f"image reference {reference!r} is absolute or climbs with '..'", do=(
            "references are relative to benchmark.root; for images elsewhere, link their folder into the\n"
            "root and name the folder in benchmark.trusted_roots"))
    if not _is_file_name(reference):
        raise UserError(f"image reference {reference!r} cannot be a file's name", do="mend the data")


def _is_file_name(reference: str) -> bool:
    try:
        return b"\0" not in reference.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False


@contextlib.contextmanager
def _absence_is_a_flaw(reference: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        raise Flaw("missing_image", f"{reference}: {error.strerror}") from None


def decode(data: bytes, reference: str, at_least: tuple[int, int] | None = None) -> Image:
    """What `ImageStore.open` promises, of bytes that were read.

    `at_least` (height, width): a JPEG may come smaller by 2, 4 or 8, but not below this. Its decoder then does the
    first half of the scaling: faster, and other pixels.
    """
    pillow, formats = _pillow()
    try:
        with pillow.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Flaw("oversized_image", f"{reference}: {image.width} x {image.height} pixels")
            if at_least is not None:
                image.draft(None, at_least[::-1])
            return _to_rgb(image)
    except (Flaw, MemoryError):
        raise
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise Flaw("oversized_image", f"{reference}: {error}") from None
    except pillow.UnidentifiedImageError:  # its own message is the address of a buffer
        raise Flaw("undecodable_image", f"{reference}: not an image of a known format") from None
    except Exception as error:  # PIL's decoders raise whatever the broken bytes lead them to
        raise Flaw("undecodable_image", f"{reference}: {error}") from None


def _to_rgb(image: Image) -> Image:
    image.load()
    image.info.pop("transparency", None)  # no pixel depends on it, but PIL would warn that it is dropped
    if image.mode.startswith("I;16"):
        import numpy as np
        from PIL import Image as pillow
        return pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # without a copy, where nothing is to convert


def _pillow() -> tuple[Any, list[str]]:
    """PIL.Image, and those of our formats that it was built with.

    Its switches belong to the process and others turn them, so they are set for each image: our bound on
    pixels (checked by `decode`, so no warning), and no grey filled in for what is cut off.
    """
    from PIL import Image, ImageFile
    Image.init()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return Image, [name for name in _FORMATS if name in Image.OPEN]
