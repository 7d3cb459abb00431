"""`caption`: a benchmark of pictures becomes text retrieval, and the pipeline scores it as such."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.cli import main
from tests.fault_server import running
from tests.generation.chat_server import ChatServer
from tests.small_mbeir import COLOURS, TASK, SmallMbeir


def sees(messages: list[dict[str, Any]]) -> str:
    """A model that names the colour of a picture."""
    url = messages[1]["content"][0]["image_url"]["url"]
    pixel = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB").getpixel((3, 3))
    assert isinstance(pixel, tuple)
    distances = {sum(abs(a - b) for a, b in zip(pixel, value)): name for name, value in COLOURS.items()}
    return f"A {distances[min(distances)]} toy."


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    with running(ChatServer(sees), monkeypatch) as found:
        yield found


def caption(small: SmallMbeir, server: ChatServer, *more: str) -> int:
    return main(["caption", str(small.experiment), "--url", server.url, "--model", "seer", *more])


def files(small: SmallMbeir) -> Path:
    return small.experiment.parent / "work" / "experiments" / "experiment" / "captioned"


def test_pictures_become_captions_and_are_found_by_their_text(
        tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]) -> None:
    small = SmallMbeir(tmp_path).write()
    assert caption(small, server) == 0
    folder, colours = files(small) / TASK, list(COLOURS)
    assert [json.loads(line) for line in (folder / "corpus.jsonl").open()] == [
        {"_id": f"7:{number}", "text": f"A {colour} toy."} for number, colour in enumerate(colours, 1)]
    assert [json.loads(line) for line in (folder / "queries.jsonl").open()] == [
        {"_id": f"7:{number}", "text": f"A {colour} toy."} for number, colour in enumerate(colours, 1)]
    assert (folder / "qrels" / "test.tsv").read_text() == "query-id\tcorpus-id\tscore\n" + "".join(
        f"7:{number}\t7:{number}\t1\n" for number in range(1, 5))
    assert len(server.bodies) == 4
    assert [part["type"] for part in server.bodies[0]["messages"][1]["content"]] == ["image_url"]
    capsys.readouterr()
    assert main(["run", str(small.experiment), f"benchmark={files(small) / 'benchmark.yaml'}", "name=as_text",
                 "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert {score["pool"]: score["metrics"]["hit@1"]["mean"] for score in scores} == {"local": 1.0, "union": 1.0}


def test_a_second_call_asks_nothing_and_writes_the_same(tmp_path: Path, server: ChatServer) -> None:
    small = SmallMbeir(tmp_path).write()
    assert caption(small, server) == 0
    before = {path: path.read_bytes() for path in files(small).rglob("*") if path.is_file()}
    assert len(before) == 5 and caption(small, server) == 0 and len(server.bodies) == 4
    assert {path: path.read_bytes() for path in files(small).rglob("*") if path.is_file()} == before


def test_a_picture_that_cannot_be_sent_is_counted_and_asked_for_once_it_is_there(
        tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]) -> None:
    small = SmallMbeir(tmp_path).write()
    shutil.copy(small.image("grey"), tmp_path / "grey.png")
    small.image("grey").write_bytes(b"\x89PNG broken" + bytes(small.image("grey").stat().st_size - 11))
    assert caption(small, server) == 2
    assert "not an image of a known format" in capsys.readouterr().err and not files(small).exists()
    assert caption(small, server, "--tolerate", "1") == 0
    assert "1 queries have no answer; 7:4" in capsys.readouterr().out
    corpus = [json.loads(line) for line in (files(small) / TASK / "corpus.jsonl").open()]
    assert [row["text"] for row in corpus][2:] == ["A blue toy.", ""]
    shutil.copy(tmp_path / "grey.png", small.image("grey"))
    assert caption(small, server) == 0 and len(server.bodies) == 4
    corpus = [json.loads(line) for line in (files(small) / TASK / "corpus.jsonl").open()]
    assert corpus[3]["text"] == "A grey toy."


def test_queries_with_pictures_are_described_too_and_texts_stay(tmp_path: Path, server: ChatServer) -> None:
    """Task 7: image and text -> image, on the same pool as task 0: the pool is described and written once."""
    small = SmallMbeir(tmp_path).write()
    query = {**small.queries[0], "qid": "7:9", "query_txt": "Same, but blue.", "query_modality": "image,text",
             "query_img_path": "mbeir_images/red.png", "task_id": 7}
    for kind, row in (("queries", json.dumps(query)), ("qrels", "7:9 0 7:3 1 7")):
        path = small.path(kind)
        path.with_name(path.name.replace("task0", "task7")).write_text(f"{row}\n")
    small.benchmark.write_text(small.benchmark.read_text()
                               + "  toys_task7: {pool: toys_task0, headline: hit@1, cutoffs: [1]}\n")
    small.path("instructions").write_text(small.path("instructions").read_text() + "image,text\timage\tToys\t7\tHm.\n")
    assert caption(small, server) == 0 and len(server.bodies) == 5
    asked = json.loads((files(small) / "toys_task7" / "queries.jsonl").read_text())
    assert asked == {"_id": "7:9", "text": "Same, but blue. A red toy."}
    assert not (files(small) / "toys_task7" / "corpus.jsonl").exists()
    assert main(["run", str(small.experiment), f"benchmark={files(small) / 'benchmark.yaml'}", "name=as_text"]) == 0


def test_a_task_that_is_not_there_is_named(tmp_path: Path, server: ChatServer,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert caption(SmallMbeir(tmp_path).write(), server, "--task", "toys_task9") == 2
    assert f"all: {TASK}" in capsys.readouterr().err
