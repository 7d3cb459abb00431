"""Members of tar archives, read in place through the image store: their bytes, damage, links, processes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import images
from pipeline.images import Flaw, ImageStore
from pipeline.support.errors import UserError

RED, BLUE = b"the bytes of a red image", b"the bytes of a blue one"


def place(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place(tmp_path / "root" / "pictures" / "red.png", RED)
    place(tmp_path / "outside" / "secret.png", BLUE)
    return tmp_path / "root"


@pytest.fixture
def store(root: Path, tmp_path: Path) -> ImageStore:
    return ImageStore(root, cache_dir=tmp_path / "cache")


def flaw_of(store: ImageStore, reference: str) -> Flaw:
    with pytest.raises(Flaw) as caught:
        store.read(reference)
    return caught.value


def test_a_member_is_read_in_place_by_its_archives_name(store: ImageStore, root: Path) -> None:
    write_tar(root / "shard.tar", {"a/one.png": RED, "./a/two.png": BLUE})
    assert store.read("shard.tar!a/one.png") == RED
    assert store.read("shard.tar!a/two.png") == store.read("shard.tar!./a/two.png") == BLUE
    assert store.size("shard.tar!a/none.png") is None and store.size("none.tar!a/one.png") is None
    assert flaw_of(store, "shard.tar!a/none.png").kind == "missing_image"


def test_configured_archives_come_before_files_in_their_order(root: Path, tmp_path: Path) -> None:
    write_tar(root / "first.tar", {"a.png": b"first", "pictures/red.png": b"from the archive"})
    second = write_tar(tmp_path / "second.tar", {"a.png": b"second", "b.png": b"second"})
    place(root / "c.png", b"file")
    store = ImageStore(root, archives=["first.tar", str(second)], cache_dir=tmp_path / "cache")
    assert [store.read(name) for name in ("a.png", "b.png", "c.png")] == [b"first", b"second", b"file"]
    assert store.read("pictures/red.png") == b"from the archive"
    assert store.size("d.png") is None


def test_an_archive_that_a_reference_names_must_lie_in_the_root(root: Path, tmp_path: Path) -> None:
    outside = write_tar(tmp_path / "outside" / "x.tar", {"a.png": RED})
    (root / "x.tar").symlink_to(outside)
    with pytest.raises(UserError, match="trusted_roots"):
        ImageStore(root, cache_dir=tmp_path).read("x.tar!a.png")
    trusting = ImageStore(root, trusted_roots=[str(tmp_path / "outside")], cache_dir=tmp_path)
    assert trusting.read("x.tar!a.png") == RED


@settings(max_examples=30, deadline=None)
@given(members=st.dictionaries(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=150).filter(
        lambda name: ".." not in name and not name.startswith(("/", "./")) and not name.endswith("/")),
    st.binary(max_size=2000), max_size=8), format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_every_member_has_its_bytes(
        tmp_path_factory: Any, members: dict[str, bytes], format: int) -> None:
    root = tmp_path_factory.mktemp("tar")
    write_tar(root / "x.tar", members, format)
    store = ImageStore(root, archives=["x.tar"], cache_dir=root / "cache")
    assert {name: store.read(name) for name in members} == members


def test_of_members_with_one_name_the_last_counts_as_in_unpacking(store: ImageStore, root: Path) -> None:
    with tarfile.open(root / "x.tar", "w") as archive:
        for content in (b"old", b"newer"):
            header = tarfile.TarInfo("a.png")
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    assert store.read("x.tar!a.png") == b"newer"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_archives_are_not_followed(root: Path, tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(root / "x.tar", "w") as archive:
        header = tarfile.TarInfo("pictures/red.png")
        header.type, header.linkname = kind, "/etc/passwd"
        archive.addfile(header)
    for store, reference in ((ImageStore(root, cache_dir=tmp_path), "x.tar!pictures/red.png"),
                             (ImageStore(root, ["x.tar"], cache_dir=tmp_path), "pictures/red.png")):
        assert store.size(reference) is None
        assert "not followed" in flaw_of(store, reference).detail


def test_directories_and_foreign_names_in_an_archive_do_no_harm(store: ImageStore, root: Path) -> None:
    with tarfile.open(root / "x.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        for name in ("folder/", "\xe9.png", "a.png"):
            header = tarfile.TarInfo(name)
            header.type = tarfile.DIRTYPE if name == "folder/" else tarfile.REGTYPE
            archive.addfile(header, io.BytesIO())
    assert store.size("x.tar!folder") is None
    assert store.size("x.tar!a.png") == 0


@pytest.mark.parametrize("name, compress", [
    ("x.tar.gz", gzip.compress), ("x.tgz", gzip.compress), ("x.tar", gzip.compress),
    ("x.tar.bz2", bz2.compress), ("x.tar.xz", lzma.compress)])
def test_compressed_archives_are_refused_with_advice(
        root: Path, tmp_path: Path, name: str, compress: Callable[[bytes], bytes]) -> None:
    place(root / name, compress(write_tar(tmp_path / "plain", {"a.png": RED}).read_bytes()))
    for store, reference in ((ImageStore(root, [name], cache_dir=tmp_path), "a.png"),
                             (ImageStore(root, cache_dir=tmp_path), f"{name}!a.png")):
        with pytest.raises(UserError) as caught:
            store.size(reference)
        assert "compressed" in caught.value.what and "gunzip" in str(caught.value.do)
        assert caught.value.where == str(root / name)


def test_damaged_and_absent_archives_are_refused(root: Path, tmp_path: Path) -> None:
    whole = write_tar(root / "x.tar", {f"{number}.png": RED * 20 for number in range(4)}).read_bytes()
    stride = 512 + -(-len(RED * 20) // 512) * 512
    broken = {"cut.tar": whole[:stride + 700], "half.tar": whole[:2 * stride + 100], "empty.tar": b"",
              "header.tar": whole[:stride] + b"?" * 512 + whole[stride + 512:], "noise.tar": os.urandom(4096)}
    for name, content in broken.items():
        place(root / name, content)
    for name in (*broken, "absent.tar", "pictures"):
        with pytest.raises(UserError) as caught:
            ImageStore(root, [name], cache_dir=tmp_path / "cache").size("0.png")
        assert caught.value.where == str(root / name), name
    assert not list((tmp_path / "cache").iterdir()), "no index, whole or half, of a broken archive is left"


def test_a_changed_archive_is_indexed_again_and_an_unchanged_one_is_not(root: Path, tmp_path: Path) -> None:
    write_tar(root / "x.tar", {"a.png": b"old"})
    cache = tmp_path / "cache"
    assert ImageStore(root, ["x.tar"], cache_dir=cache).read("a.png") == b"old"
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert ImageStore(root, ["x.tar"], cache_dir=cache).read("a.png") == b"old"
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before and len(before) == 1
    write_tar(root / "x.tar", {"b.png": b"other", "a.png": b"new"})
    assert ImageStore(root, ["x.tar"], cache_dir=cache).read("a.png") == b"new"


def test_an_index_that_cannot_be_written_is_the_users_to_mend(root: Path, tmp_path: Path) -> None:
    write_tar(root / "x.tar", {"a.png": b"a"})
    place(tmp_path / "file", b"")
    with pytest.raises(UserError, match="cannot be written"):
        ImageStore(root, ["x.tar"], cache_dir=tmp_path / "file" / "cache").read("a.png")


def test_without_a_cache_directory_the_users_own_is_used(
        root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(root / "x.tar", {"a.png": b"a"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home cache?#%"))
    assert ImageStore(root, ["x.tar"]).read("a.png") == b"a"
    assert len(list((tmp_path / "home cache?#%").rglob("*.sqlite"))) == 1


def test_only_so_many_archives_stay_open(
        store: ImageStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_KNOWN_ARCHIVES", 2)
    for number in [*range(5), 0]:
        write_tar(root / f"{number}.tar", {"a.png": bytes([number])})
        assert store.read(f"{number}.tar!a.png") == bytes([number])
    assert len(store._known_archives) == 2


def _read_all(store: ImageStore, names: list[str], answers: Any) -> None:
    contents = [store.read(name) for name in names]
    opened = store._archives[0]._opened  # SQLite forgives most of the time what it forbids: so look inside
    assert opened and opened[0] == os.getpid(), "an index opened before the fork is in use after it"
    answers.put(contents)


@pytest.mark.parametrize("is_warm", [True, False])
def test_forked_processes_read_side_by_side(root: Path, tmp_path: Path, is_warm: bool) -> None:
    members = {f"{number}.png": os.urandom(3000) for number in range(200)}
    write_tar(root / "x.tar", members)
    store = ImageStore(root, ["x.tar"], cache_dir=tmp_path / "cache")
    if is_warm:
        assert store.read("0.png") == members["0.png"]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    names = list(members)
    children = [context.Process(target=_read_all, args=(store, names[first:] + names[:first], answers))
                for first in (0, 70, 140)]
    for child in children:
        child.start()
    assert [store.read(name) for name in names] == list(members.values())
    received = [sorted(answers.get(timeout=10)) for _ in children]
    for child in children:
        child.join(timeout=10)
    assert received == [sorted(members.values())] * 3
    assert len(list((tmp_path / "cache").iterdir())) == 1, "one index, and no temporary file"


def test_a_store_with_open_archives_can_be_pickled(root: Path, tmp_path: Path) -> None:
    write_tar(root / "x.tar", {"a.png": BLUE})
    store = ImageStore(root, ["x.tar"], cache_dir=tmp_path / "cache")
    assert store.size("a.png") and store.size("x.tar!a.png")  # now both hold what cannot be pickled
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read("a.png") == copy.read("x.tar!a.png") == BLUE
