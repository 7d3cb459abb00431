"""pipeline.rag: records, messages and other libraries' types, from real results; mistakes are named."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.complements.making import Wanted, make_complements
from pipeline.config import Experiment, load
from pipeline.images import ImageStore
from pipeline.rag import Result, load_results, message_lines, to_hf_dataset, to_langchain, to_llama_index, to_messages
from pipeline.rag.records import Picture
from pipeline.report.results import Cells, write_results
from pipeline.support.errors import UserError
from tests.fault_server import KEY, running
from tests.generation.chat_server import ChatServer, completion

ROOT = Path(__file__).resolve().parents[2]
PNG_START = b"\x89PNG"


@pytest.fixture(scope="module")
def experiment(quick_run: Experiment, small_arguments: list[str],
               tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Image -> text, its results and complements, in a work directory of this module's own."""
    directory = tmp_path_factory.mktemp("rag") / "work"
    shutil.copytree(quick_run.work_dir, directory)
    found = load("quickstart", [f"work_dir={directory}", *small_arguments, "tasks=[scenes_task3, scenes_task0]",
                                "pools=[union]", "export.depth=12", "name=rag"])
    make_complements(found, Wanted(Cells()), say=lambda *_: None)
    for layout in ("jsonl", "uniir"):
        list(write_results(found, Cells(), None, layout, None))
    return found


@pytest.fixture
def path(experiment: Experiment) -> Path:
    return experiment.directory / "retrieval_results/retrieved_candidates/quickstart_clip.scenes_task3.union.jsonl"


@pytest.fixture
def results(path: Path) -> list[Result]:
    return list(load_results(path))


def data_of(part: dict[str, Any]) -> bytes:
    kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", part["image_url"]["url"]).groups()  # type: ignore
    assert kind in ("png", "jpeg")
    return base64.b64decode(data)


def test_records_say_what_the_file_says(path: Path, results: list[Result]) -> None:
    for line, result in zip(path.open(), results, strict=True):
        row = json.loads(line)
        assert result.query.query_id == row["query"]["query_id"]
        assert result.query.instructions == (row["query"]["instruction"],)
        for ours, theirs in zip(result.candidates, row["candidates"], strict=True):
            assert {**theirs, "score": pytest.approx(theirs["score"])} == {
                **{name: getattr(ours, name) for name in theirs}, "image": ours.image and ours.image.reference}


def test_pictures_are_opened_when_they_are_asked_for(path: Path, tmp_path: Path, experiment: Experiment) -> None:
    nowhere = next(iter(load_results(path, images=tmp_path)))
    with pytest.raises(UserError, match="picture"):
        nowhere.query.image.open()  # type: ignore[union-attr]
    picture = next(iter(load_results(path))).query.image
    assert picture is not None
    with Image.open(Path(experiment.benchmark.root, picture.reference)) as expected:
        assert picture.open().tobytes() == expected.convert("RGB").tobytes()


def test_captioning_messages_are_unirag_s(results: list[Result]) -> None:
    result = results[0]
    system, user = to_messages(result, 3)
    assert system["role"] == "system" and user["role"] == "user"
    pairs = list(result.pairs())[:3]
    assert [part["type"] for part in user["content"]] == ["image_url", "text"] * 4
    assert [part["text"] for part in user["content"][1:6:2]] == [
        f"Caption [{number}]: {pair.text}" for number, pair in enumerate(pairs, 1)]
    assert user["content"][-1]["text"].startswith("I have provided you 3 image(s) and their corresponding caption(s)")
    assert data_of(user["content"][-2]) == result.query.image.read()  # type: ignore[union-attr]
    assert [data_of(part) for part in user["content"][0:6:2]] == [pair.image.read() for pair in pairs]
    alone = to_messages(result, 0)[1]["content"]
    assert len(alone) == 2 and alone[1]["text"].startswith("I have provided you an image.")


def test_examples_never_show_the_query(results: list[Result]) -> None:
    own = [candidate for result in results for candidate in result.candidates
           if candidate.image and result.query.image and candidate.image.reference == result.query.image.reference]
    shown = [pair.image.reference for result in results for pair in result.pairs()
             if pair.image == result.query.image]
    assert own and not shown
    assert all(sum(1 for _ in result.pairs()) > 5 for result in results)


def test_image_prompt_messages_end_with_the_query_s_text(experiment: Experiment, path: Path) -> None:
    result = next(iter(load_results(path.with_name(path.name.replace("task3", "task0")))))
    message, = to_messages(result, 2, "image-prompt")
    assert [part["type"] for part in message["content"]] == ["text", "image_url", "text", "image_url", "text"]
    assert message["content"][-1]["text"] == result.query.text
    assert to_messages(result, 1, "image-prompt", prompt="Draw.")[0] == {"role": "system", "content": "Draw."}
    with pytest.raises(UserError, match="cannot be captioned"):
        to_messages(result, 2)


def test_question_messages_number_the_candidates(results: list[Result]) -> None:
    content = to_messages(results[0], 2, "question")[1]["content"]
    texts = [part["text"] for part in content if part["type"] == "text"]
    assert [text.split(" ")[0] for text in texts] == ["[1]", "[2]", "Question:"]
    assert content[-1]["type"] == "image_url"


def test_lines_of_messages(results: list[Result]) -> None:
    for result, line in zip(results, message_lines(results, 2), strict=True):
        assert json.loads(json.dumps(line)) == line and line["query_id"] == result.query.query_id
        assert line["examples"] == [pair.candidate.candidate_id for pair in list(result.pairs())[:2]]
        assert line["messages"] == to_messages(result, 2)


def test_pictures_are_made_smaller_and_others_become_png(results: list[Result], tmp_path: Path, path: Path) -> None:
    picture = results[0].query.image
    assert picture is not None
    with Image.open(io.BytesIO(data_of({"image_url": {"url": picture.data_uri(20)}}))) as image:
        assert max(image.size) == 20
    reference = picture.reference
    (tmp_path / reference).parent.mkdir(parents=True)
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / reference, "BMP")
    odd = next(iter(load_results(path, images=tmp_path))).query.image
    assert data_of({"image_url": {"url": odd.data_uri()}}).startswith(PNG_START)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_pictures_that_fit_are_passed_on_as_they_are_stored(tmp_path: Path, kind: str) -> None:
    stored = tmp_path / "picture"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(stored, kind)
    picture = Picture("picture", lambda: ImageStore(tmp_path))
    unchanged = f"data:image/{kind.lower()};base64,{base64.b64encode(stored.read_bytes()).decode()}"
    assert [picture.data_uri(side) for side in (None, 40, 41)] == [unchanged] * 3
    with Image.open(io.BytesIO(data_of({"image_url": {"url": picture.data_uri(39)}}))) as image:
        assert image.size == (39, 29)
    stored.write_bytes(stored.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be used"):
        picture.data_uri(40)


def test_uniir_s_files_are_read_with_their_complements_in_place(experiment: Experiment, results: list[Result]) -> None:
    path = experiment.directory / "retrieval_results/uniir/quickstart_clip"
    found = list(load_results(path / "mbeir_scenes_task3_union_pool_test_k12_retrieved.jsonl"))
    assert [[candidate.candidate_id for candidate in result.candidates] for result in found] == [
        [candidate.candidate_id for candidate in result.candidates] for result in results]
    for ours, theirs in zip(results, found):
        for one, other in zip(ours.candidates, theirs.candidates):
            assert (one.complement and one.complement.candidate_id) == (
                other.complement and other.complement.candidate_id)
    modalities = {candidate.modality for result in found for candidate in result.candidates}
    assert modalities == {"text", "image", "image,text"}
    assert found[0].query.image.open().size == (64, 64)  # type: ignore[union-attr]


def test_datasets(path: Path, results: list[Result], tmp_path: Path) -> None:
    for streaming in (False, True):
        options: dict[str, Any] = {} if streaming else {"cache_dir": str(tmp_path)}
        rows = list(to_hf_dataset(path, with_images=not streaming, streaming=streaming, **options))
        assert [row["query_id"] for row in rows] == [result.query.query_id for result in results]
        assert [each["score"] for each in rows[0]["candidates"]] == [
            each.score for each in results[0].candidates]
    assert rows[0]["image"] == results[0].query.image.reference  # type: ignore[union-attr]


def test_langchain_documents(results: list[Result]) -> None:
    pytest.importorskip("langchain_core", reason="langchain-core is not installed")
    from langchain_core.documents import Document
    for document, candidate in zip(to_langchain(results[0]), results[0].candidates, strict=True):
        assert isinstance(document, Document) and document.id == candidate.candidate_id
        assert document.page_content == (candidate.text or candidate.complement.text)  # type: ignore[union-attr]
        assert document.metadata["rank"] == candidate.rank and document.metadata["image"].endswith(".png")
        assert document.metadata["score"] == candidate.score


def test_llama_index_nodes(results: list[Result]) -> None:
    pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")
    nodes = to_llama_index(results[0])
    assert [node.node.id_ for node in nodes] == [candidate.candidate_id for candidate in results[0].candidates]
    assert [node.score for node in nodes] == [candidate.score for candidate in results[0].candidates]


@pytest.mark.skipif(importlib.util.find_spec("llama_index") is not None, reason="llama-index-core is installed")
def test_a_library_that_is_missing_is_named(results: list[Result]) -> None:
    with pytest.raises(UserError, match="llama-index-core is not installed"):
        to_llama_index(results[0])


def test_mistakes_are_named(path: Path, results: list[Result], tmp_path: Path) -> None:
    copied = tmp_path / "retrieval_results/retrieved_candidates/file.jsonl"
    copied.parent.mkdir(parents=True)
    first, second, *_ = path.read_text().splitlines()
    copied.write_text(f"{first}\n{second[:50]}\n")
    with pytest.raises(UserError, match=r"cannot be read(.|\n)*file.jsonl:2"):
        list(load_results(copied))
    copied.write_text('{"queries": 1}\n')
    with pytest.raises(UserError, match=r"not a line of retrieval results(.|\n)*:1"):
        list(load_results(copied))
    copied.write_text(f"{first}\n")
    with pytest.raises(UserError, match="is not known"):
        next(iter(load_results(copied))).query.image.open()  # type: ignore[union-attr]
    with pytest.raises(UserError, match="complements are those of other results"):
        list(load_results(copied, complements=path.parents[1] / "complements/quickstart_clip.scenes_task0.union.jsonl"))
    for wrong in ({"style": "poem"}, {"k": -1}):
        with pytest.raises(UserError):
            to_messages(**{"result": results[0], "k": 1, **wrong})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="there are no results"):
        list(load_results(tmp_path / "nothing.jsonl"))


class _Counting(ChatServer):
    """Answers with the number of images that it was shown."""

    def defined(self, body: Any) -> dict[str, Any]:
        images = sum(part["type"] == "image_url" for part in body["messages"][-1]["content"])
        return completion(f"{body['model']} saw {images} images")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with running(_Counting(), monkeypatch) as found:
        yield found.address


def test_the_script_of_the_documentation_gets_answers(path: Path, server: str, results: list[Result],
                                                      tmp_path: Path) -> None:
    pytest.importorskip("httpx", reason="httpx is not installed")
    script, = re.findall(r"```python\n# answers.py\n(.*?)```", (ROOT / "docs/rag.md").read_text(), re.DOTALL)
    assert len([line for line in script.splitlines() if line.strip()]) < 20
    (tmp_path / "answers.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "answers.py", path, server, "tiny"], text=True,
                          capture_output=True, timeout=100,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY})
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["query_id"] for answer in answers] == [result.query.query_id for result in results]
    assert {answer["answer"] for answer in answers} == {"tiny saw 4 images"}
