"""Images by reference: the right bytes and pixels from files and archives, and nothing from anywhere else."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import images
from pipeline.images import Flaw, ImageStore
from pipeline.support.errors import UserError

RED, BLUE = (250, 20, 30), (10, 40, 240)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(colour: tuple[int, int, int] = RED, size: tuple[int, int] = (8, 6)) -> bytes:
    return encoded(Image.new("RGB", size, colour))


def place(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place(tmp_path / "root" / "pictures" / "red.png", png(RED))
    place(tmp_path / "outside" / "secret.png", png(BLUE))
    return tmp_path / "root"


@pytest.fixture
def store(root: Path, tmp_path: Path) -> ImageStore:
    return ImageStore(root, cache_dir=tmp_path / "cache")


def flaw_of(store: ImageStore, reference: str) -> Flaw:
    with pytest.raises(Flaw) as caught:
        store.open(reference)
    return caught.value


def test_a_file_is_sized_read_and_opened(store: ImageStore) -> None:
    image = store.open("pictures/red.png")
    assert store.read("pictures/red.png") == png(RED)
    assert store.size("pictures/red.png") == len(png(RED))
    assert (image.mode, image.size, image.getpixel((3, 3))) == ("RGB", (8, 6), RED)


def test_a_root_may_be_relative_or_a_link(
        root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(root)
    assert ImageStore(tmp_path / "link").size("pictures/red.png") == len(png())
    monkeypatch.chdir(tmp_path)
    relative = ImageStore(Path("root"))
    monkeypatch.chdir("/")
    assert relative.size("pictures/red.png") == len(png())


@pytest.mark.parametrize("reference", [
    "pictures/none.png", "nowhere/red.png", "pictures", "pictures/", "", ".", "pictures/red.png/deeper.png",
    "x" * 300 + ".png"])
def test_what_is_not_there_or_not_a_file_is_missing(store: ImageStore, reference: str) -> None:
    assert store.size(reference) is None
    assert flaw_of(store, reference).kind == "missing_image"


def test_a_pipe_is_missing_and_does_not_hang(store: ImageStore, root: Path) -> None:
    os.mkfifo(root / "pictures" / "pipe.png")
    assert store.size("pictures/pipe.png") is None
    assert flaw_of(store, "pictures/pipe.png").kind == "missing_image"


def test_a_file_that_may_not_be_read_is_a_flaw(
        store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:  # chmod would not stop a superuser
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    flaw = flaw_of(store, "pictures/red.png")
    assert flaw.kind == "missing_image" and "Permission denied" in flaw.detail


def test_a_failing_disk_is_an_error_and_not_a_flaw(
        store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error", str(path))
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        store.open("pictures/red.png")


@pytest.mark.parametrize("reference", [
    "/etc/passwd", "../outside/secret.png", "pictures/../../outside/secret.png",
    "pictures/../pictures/red.png", "..", "a\0b.png", "\ud800.png", "/etc/x.tar!a.png", "../x.tar!a.png",
    "x.tar!../a.png"])
def test_malformed_references_are_refused(store: ImageStore, reference: str) -> None:
    for ask in (store.size, store.read, store.open):
        with pytest.raises(UserError) as caught:
            ask(reference)
        assert repr(reference) in caught.value.what


def link_file(root: Path, target: Path) -> str:
    (root / "pictures" / "link.png").symlink_to(target)
    return "pictures/link.png"


def link_directory(root: Path, target: Path) -> str:
    (root / "linked").symlink_to(target.parent)
    return "linked/secret.png"


def link_twice(root: Path, target: Path) -> str:
    (root / "first").symlink_to(root / "second")
    (root / "second").symlink_to(target.parent.parent)
    return "first/outside/secret.png"


@pytest.mark.parametrize("link", [link_file, link_directory, link_twice])
def test_links_lead_only_to_trusted_roots(
        root: Path, tmp_path: Path, link: Callable[[Path, Path], str]) -> None:
    reference = link(root, tmp_path / "outside" / "secret.png")
    (tmp_path / "out").mkdir()  # a prefix of `outside` as a string, not as a directory
    for store in (ImageStore(root), ImageStore(root, trusted_roots=[str(tmp_path / "out")])):
        for _ in range(2):  # the second time the directory is known
            with pytest.raises(UserError, match="benchmark.trusted_roots") as caught:
                store.size(reference)
            assert repr(reference) in caught.value.what
    for trusted in (str(tmp_path / "outside"), "../outside"):
        assert ImageStore(root, trusted_roots=[trusted]).read(reference) == png(BLUE)


def test_a_known_good_directory_does_not_vouch_for_links_in_it(
        store: ImageStore, root: Path, tmp_path: Path) -> None:
    assert store.size("pictures/red.png")
    with pytest.raises(UserError):
        store.read(link_file(root, tmp_path / "outside" / "secret.png"))


def test_links_inside_the_root_are_followed_and_loops_are_missing(store: ImageStore, root: Path) -> None:
    (root / "alias").symlink_to("pictures")
    (root / "loop").symlink_to("loop")
    assert store.read("alias/red.png") == png(RED)
    assert store.size("loop") is None and store.size("loop/red.png") is None


def test_many_directories_are_not_remembered_for_ever(
        store: ImageStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_KNOWN_DIRECTORIES", 3)
    for number in range(10):
        place(root / str(number) / "a.png", png())
        assert store.size(f"{number}/a.png") == len(png())
    assert len(store._known_directories) <= 3


def test_stores_and_flaws_survive_pickling(store: ImageStore) -> None:
    assert pickle.loads(pickle.dumps(store)).read("pictures/red.png") == png(RED)
    flaw = pickle.loads(pickle.dumps(Flaw("missing_image", "a.png: gone")))
    assert (flaw.kind, flaw.detail) == ("missing_image", "a.png: gone")
    assert str(flaw) == "missing_image: a.png: gone"


def gradient() -> np.ndarray:
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def opened(root: Path, content: bytes) -> np.ndarray:
    place(root / "x.bin", content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.asarray(ImageStore(root).open("x.bin"))


def test_grey_becomes_rgb(root: Path) -> None:
    assert (opened(root, encoded(Image.fromarray(gradient()))) == gradient()[:, :, None]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_upper_bits_and_is_not_clipped(root: Path, kind: str) -> None:
    deep = gradient().astype(np.uint16) * 256 + 77
    assert (opened(root, encoded(Image.fromarray(deep), kind)) == gradient()[:, :, None]).all()


def test_alpha_is_dropped_and_not_blended(root: Path) -> None:
    assert (opened(root, encoded(Image.new("RGBA", (4, 4), (*RED, 0)))) == RED).all()


@pytest.mark.parametrize("transparency", [0, bytes([0, 128])])
def test_a_palette_gives_its_colours_without_a_warning(root: Path, transparency: int | bytes) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    pixels = opened(root, encoded(image, transparency=transparency))
    assert tuple(pixels[0, 0]) == RED and tuple(pixels[0, 1]) == BLUE


def test_a_cmyk_jpeg_becomes_rgb(root: Path) -> None:
    pixels = opened(root, encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 10


def test_of_an_animation_the_first_frame_is_taken(root: Path) -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in (RED, BLUE)]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        pixels = opened(root, encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
        assert (pixels == RED).all(), kind


def test_the_exif_orientation_is_not_applied(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert opened(root, encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).shape == (10, 20, 3)


@settings(max_examples=30, deadline=None)
@given(pixels=st.binary(min_size=105, max_size=105), kind=st.sampled_from(["PNG", "BMP", "PPM", "TIFF"]))
def test_lossless_formats_give_back_their_pixels(
        tmp_path_factory: Any, pixels: bytes, kind: str) -> None:
    array = np.frombuffer(pixels, np.uint8).reshape(5, 7, 3)
    assert (opened(tmp_path_factory.mktemp("x"), encoded(Image.fromarray(array), kind)) == array).all()


def noise(kind: str, **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("kept", [0.99, 0.5, 0.1])
def test_truncated_images_are_undecodable(store: ImageStore, root: Path, kind: str, kept: float) -> None:
    content = noise(kind)
    place(root / "x.img", content[:int(len(content) * kept)])
    assert flaw_of(store, "x.img").kind == "undecodable_image"


def test_others_who_tolerate_truncated_images_do_not_change_that(
        store: ImageStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    place(root / "x.jpg", noise("JPEG")[:2000])
    assert flaw_of(store, "x.jpg").kind == "undecodable_image"


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n",
                                     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_is_undecodable(store: ImageStore, root: Path, content: bytes) -> None:
    place(root / "x.jpg", content)
    flaw = flaw_of(store, "x.jpg")
    assert flaw.kind == "undecodable_image" and "x.jpg" in flaw.detail and "0x" not in flaw.detail


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255),
       kind=st.sampled_from(["JPEG", "PNG", "GIF"]))
def test_a_damaged_image_is_a_picture_or_a_flaw_and_nothing_else(
        tmp_path_factory: Any, position: int, value: int, kind: str) -> None:
    root = tmp_path_factory.mktemp("x")
    content = bytearray(noise(kind))
    content[position % len(content)] = value
    place(root / "x.img", bytes(content))
    try:
        assert ImageStore(root).open("x.img").mode == "RGB"
    except Flaw as flaw:
        assert flaw.kind in ("undecodable_image", "oversized_image")


def claimed_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(50_000, 50_000), (10_001, 10_000), (13_000, 10_000), (2**31 - 1, 1)])
def test_a_bomb_is_oversized_and_not_a_warning(store: ImageStore, root: Path, size: tuple[int, int]) -> None:
    place(root / "x.png", claimed_png(*size))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert flaw_of(store, "x.png").kind == "oversized_image"
    assert not caught


def test_below_the_bound_there_is_no_warning_either(store: ImageStore, root: Path) -> None:
    place(root / "x.png", claimed_png(9_999, 10_000))  # more than PIL's own bound; its data end early
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert flaw_of(store, "x.png").kind == "undecodable_image"
    assert not caught


def test_a_file_too_large_to_be_an_image_is_not_read(store: ImageStore, root: Path) -> None:
    with open(root / "huge.png", "wb") as file:
        file.truncate(images.MAX_BYTES + 1)  # sparse: takes no room
    assert store.size("huge.png") == images.MAX_BYTES + 1
    assert flaw_of(store, "huge.png").kind == "oversized_image"


def test_planning_does_not_import_pillow() -> None:
    program = "import sys, pipeline.images; assert 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("size, at_least, expected", [
    ((640, 480), (224, 224), (320, 240)), ((640, 480), (60, 60), (80, 60)), ((640, 480), (61, 61), (160, 120)),
    ((480, 640), (100, 300), (480, 640)), ((641, 483), (100, 100), (161, 121)), ((100, 90), (224, 224), (100, 90))])
def test_a_draft_is_smaller_but_not_too_small(size: tuple[int, int], at_least: tuple[int, int],
                                              expected: tuple[int, int]) -> None:
    found = images.decode(encoded(Image.new("RGB", size, RED), "JPEG"), "red.jpg", at_least)
    assert found.size == expected and found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - RED).max() < 10
    whole = images.decode(encoded(Image.new("RGB", size, RED)), "red.png", at_least)
    assert whole.size == size, "only JPEG is scaled while it is decoded"


def test_an_image_outlives_what_it_was_read_from(root: Path) -> None:
    """Of an RGB file no copy is made: it must be loaded, and its file closed."""
    found = images.decode(png(), "red.png")
    assert found.getpixel((0, 0)) == RED and getattr(found, "fp", None) is None
    assert found.resize((4, 4)).crop((0, 0, 2, 2)).getpixel((1, 1)) == RED
