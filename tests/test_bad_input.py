"""What users get wrong, and what data get wrong: each is named with its item, exits with 2, and loses nothing."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cli import main
from tests.small_mbeir import SmallMbeir


@pytest.fixture
def small(tmp_path: Path) -> SmallMbeir:
    return SmallMbeir(tmp_path)


class Cli:
    """Runs commands on one experiment; keeps what the last one printed on stderr and stdout."""

    def __init__(self, small: SmallMbeir, capsys: pytest.CaptureFixture[str]):
        self.small, self.capsys = small, capsys

    def __call__(self, command: str, *arguments: str) -> int:
        self.capsys.readouterr()
        code = main([command, str(self.small.experiment), *arguments])
        captured = self.capsys.readouterr()
        self.out, self.errors = captured.out, captured.err
        return code

    def refuses(self, *words: object, command: str = "run", arguments: tuple[str, ...] = ()) -> None:
        assert self(command, *arguments) == 2, self.errors
        for word in words:
            assert str(word) in self.errors
        assert "Traceback" not in self.errors


@pytest.fixture
def cli(small: SmallMbeir, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(small.write(), capsys)


def test_sound_input_runs_and_runs_again_without_work(cli: Cli) -> None:
    assert cli("run") == 0 and "toys_task0" in cli.out
    assert cli("run") == 0 and "nothing to do" in cli.out


def test_missing_directory(cli: Cli) -> None:
    cli.refuses("/no/where", arguments=("benchmark.root=/no/where",))


def test_unknown_task(cli: Cli) -> None:
    cli.refuses("no task 'toys_task1'", "nearest: toys_task0", arguments=("tasks=[toys_task1]",))


def test_an_index_that_faiss_cannot_make_is_refused_before_anything_is_embedded(cli: Cli) -> None:
    cli.refuses("'HNWS32' is not an index", "HNSW32", arguments=("index.factory=HNWS32",))
    assert not list(cli.small.experiment.parent.rglob("embeddings-*.parquet"))
    cli.refuses("nprobe=0", arguments=("index.factory=IVF4,Flat", "retrieve.faiss_parameters=nprobe=0"))


def test_empty_pool(cli: Cli, small: SmallMbeir) -> None:
    small.path("candidates").write_text("")
    cli.refuses("pool toys_task0 is empty")


def test_no_qrels(cli: Cli, small: SmallMbeir) -> None:
    small.path("qrels").write_text("")
    cli.refuses("task toys_task0 has no qrels")


def test_malformed_json(cli: Cli, small: SmallMbeir) -> None:
    small.candidates.insert(2, '{"did": "7:9", "txt": ')  # type: ignore[arg-type]
    small.write()
    cli.refuses(f"{small.path('candidates')}:3")


@pytest.mark.parametrize("kind, noun", [("queries", "query"), ("candidates", "candidate")])
def test_duplicate_id(cli: Cli, small: SmallMbeir, kind: str, noun: str) -> None:
    getattr(small, kind).append(getattr(small, kind)[1])
    small.write()
    cli.refuses(f"duplicate {noun} id '7:2'")


@pytest.mark.parametrize("line, words", [("7:1 0 7:1 1", "5 columns, not 4"), ("7:1 0 7:1 good 0", "whole numbers")])
def test_broken_qrels(cli: Cli, small: SmallMbeir, line: str, words: str) -> None:
    small.qrels.insert(1, line)
    small.write()
    cli.refuses(words, f"{small.path('qrels')}:2")


def test_missing_instruction_row(cli: Cli, small: SmallMbeir) -> None:
    small.instructions[1] = small.instructions[1].replace("\t7\t", "\t8\t")
    small.write()
    cli.refuses("7", "text", "image", small.path("instructions"))


def test_missing_image_is_named_tolerated_on_request_and_then_made_whole(cli: Cli, small: SmallMbeir) -> None:
    hidden = small.image("green").rename(small.root / "green.png")
    cli.refuses("1 images are missing, 0 tolerated", "7:2: mbeir_images/green.png", "collect.max_missing_images=1")
    tolerant = ("collect.max_missing_images=1", "embed.max_flawed=1")
    assert cli("run", *tolerant) == 0 and "1 images are missing" in cli.out and "7:2" in cli.out
    cli.refuses("1 images are missing, 0 tolerated", "after mending: rm -r")
    hidden.rename(small.image("green"))
    directory = next((small.experiment.parent / "work/artifacts/collect").glob("small.pool.*"))
    for path in [*directory.iterdir(), directory]:
        path.rmdir() if path.is_dir() else path.unlink()
    assert cli("run") == 0 and "1 made" in cli.out  # the vectors were made without it, and are made again


def _truncated(path: Path) -> None:
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-900])


def _bomb(path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize("spoil, kind", [
    (_truncated, "undecodable_image"), (lambda path: path.write_text("not an image"), "undecodable_image"),
    (_bomb, "oversized_image")])
def test_broken_image(cli: Cli, small: SmallMbeir, spoil: Any, kind: str) -> None:
    spoil(small.image("blue"))
    spoil(small.image("grey"))
    cli.refuses("2 items have a broken image, 0 tolerated", f"7:3: {kind}", f"7:4: {kind}", "embed.max_flawed=2")
    assert cli("status") == 3  # what was done stays done
    assert cli("run", "embed.max_flawed=2") == 0 and "2 items are flawed" in cli.out


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "LA", "RGBA", "1", "I;16"])
def test_unusual_images_are_read(cli: Cli, small: SmallMbeir, mode: str) -> None:
    picture = Image.new("RGB", (20, 20), (200, 30, 30))
    converted = Image.new("I;16", (20, 20), 40_000) if mode == "I;16" else picture.convert(mode)
    converted.save(small.image("red"), format="TIFF" if mode == "CMYK" else "PNG")
    assert cli("run") == 0


@pytest.mark.parametrize("reference", ["/etc/hostname", "../outside.png", "mbeir_images/../../outside.png"])
def test_image_outside_the_root(cli: Cli, small: SmallMbeir, reference: str) -> None:
    Image.new("RGB", (8, 8)).save(small.root.parent / "outside.png")
    small.candidates[0]["img_path"] = reference
    small.write()
    cli.refuses(reference)


def test_link_that_leaves_the_root(cli: Cli, small: SmallMbeir) -> None:
    outside = small.root.parent / "elsewhere"
    outside.mkdir()
    small.image("red").rename(outside / "red.png")
    os.symlink(outside / "red.png", small.image("red"))
    cli.refuses("mbeir_images/red.png", "trusted_roots")
    assert cli("run", f"benchmark.trusted_roots=[{outside}]") == 0


def test_shard_of_a_different_encoder(cli: Cli) -> None:
    assert cli("run", "encoders.tests_toy_encoder.dimension=5") == 0 and cli("embed") == 0
    pools = (cli.small.experiment.parent / "work/artifacts/embed").glob("*.pool.*")
    embedded = sorted(pools, key=lambda path: path.stat().st_mtime)
    shard = embedded[1] / "embeddings-00000.parquet"
    shard.write_bytes((embedded[0] / "embeddings-00000.parquet").read_bytes())
    cli.refuses("belongs to artifact", shard, command="index")


@pytest.mark.parametrize("harm", ["truncate", "edit"])
def test_damaged_shard_is_found_when_it_is_read_and_by_status_deep(cli: Cli, harm: str) -> None:
    assert cli("embed") == 3 and cli("collect") == 0 and cli("embed") == 0
    shard = next((cli.small.experiment.parent / "work/artifacts/embed").glob("*.pool.*")) / "embeddings-00000.parquet"
    whole = shard.read_bytes()
    if harm == "truncate":
        shard.write_bytes(whole[:-20])
    else:
        offset = pq.read_metadata(shard).row_group(0).column(1).data_page_offset + 60
        shard.write_bytes(whole[:offset] + bytes([whole[offset] ^ 255]) + whole[offset + 1:])
    assert cli("status", "--deep") == 1 and str(shard) in cli.out
    cli.refuses("damaged", shard, "make it again", command="index")
    shard.unlink()
    (shard.parent / "manifest.json").unlink()
    assert cli("run") == 0 and shard.read_bytes() == whole


def test_malicious_pickle(cli: Cli, small: SmallMbeir, tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/owned",)
    checkpoint, stream = tmp_path / "clip.pth", io.BytesIO()
    pickle.dump({"model": Malice()}, stream)
    checkpoint.write_bytes(stream.getvalue())
    encoder = tmp_path / "evil.yaml"
    encoder.write_text("encoder: uniir_clip\narchitecture: encoders/architectures/tiny_clip.json\n"
                       f"weights: {checkpoint}\n")
    cli.refuses(checkpoint, arguments=(f"encoders=[{encoder}]",))
    assert not (tmp_path / "owned").exists()


def test_encoder_that_returns_nan(cli: Cli) -> None:
    cli.refuses("NaN or infinity", "7:1", arguments=("encoders.tests_toy_encoder.scale=.nan",))


def test_vectors_too_large_for_float16(cli: Cli) -> None:
    cli.refuses("too large for float16", "embed.storage=float32", arguments=("encoders.tests_toy_encoder.scale=1e6",))
    assert cli("run", "encoders.tests_toy_encoder.scale=1e6", "embed.storage=float32") == 0


def test_cutoff_beyond_depth(cli: Cli) -> None:
    cli.refuses("hit@2 needs 2 candidates", "retrieve.depth=2", arguments=("retrieve.depth=1",))


def test_full_disk(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up while a shard is written: nothing half-made stays, and the same command goes on later."""
    assert cli("collect") == 0
    real = pq.write_table

    def full(table: Any, where: Any, **options: Any) -> None:
        Path(where).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(pq, "write_table", full)
    cli.refuses("the disk is full", "embeddings-00000.parquet", "what is done stays done", command="embed")
    assert not [path for path in (cli.small.experiment.parent / "work/artifacts/embed").rglob("*") if path.is_file()]
    monkeypatch.setattr(pq, "write_table", real)
    assert cli("run") == 0


def test_a_later_stage_says_what_it_waits_for(cli: Cli) -> None:
    assert cli("score") == 3 and "waits for collect" in cli.errors
    assert cli("status") == 3 and cli("plan") == 0
