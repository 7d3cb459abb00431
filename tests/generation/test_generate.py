"""`generate` from a finished quick start: what is sent, kept, scored, and asked again, through the command line."""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.config import Experiment
from pipeline.generate_commands import add_parsers
from pipeline.generation.text_scores import cider, bleu_of_all, exact_match, rouge_l
from tests.fault_server import KEY, answering, running
from tests.generation.chat_server import ChatServer

CELL = ["--task", "scenes_task3", "--pool", "local"]


@pytest.fixture(scope="module")
def work(quick_run: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished quick start, to write into."""
    directory = tmp_path_factory.mktemp("generate") / "work"
    subprocess.run(["cp", "-r", str(quick_run.work_dir), str(directory)], check=True)
    return directory


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    with running(ChatServer(lambda messages: "A red circle."), monkeypatch) as found:
        yield found


class Generate:
    """The command over that copy; `label` keeps the answers of tests apart."""

    def __init__(self, work: Path, arguments: list[str], server: ChatServer, label: str):
        self.work, self.server = work, server
        self.fixed = ["generate", "quickstart", "--url", server.url, "--model", "lab/a-model", "--service", label,
                      f"work_dir={work}", *arguments]

    def __call__(self, *more: str) -> int:
        return main([*self.fixed, *more])


@pytest.fixture
def generate(work: Path, small_arguments: list[str], server: ChatServer, request: pytest.FixtureRequest) -> Generate:
    return Generate(work, small_arguments, server, request.node.name)


def results(work: Path, cell: str = "scenes_task3.local") -> list[dict[str, Any]]:
    folder = work / "experiments" / "quickstart" / "retrieval_results" / "retrieved_candidates"
    return [json.loads(line) for line in (folder / f"quickstart_clip.{cell}.jsonl").read_text().splitlines()]


def truth(data: Path, task: str) -> dict[str, list[str]]:
    """Texts of relevant candidates, from the benchmark's own files."""
    pool = [json.loads(line) for line in (data / f"cand_pool/local/mbeir_{task}_cand_pool.jsonl").open()]
    texts = {row["did"]: row["txt"] for row in pool}
    found: dict[str, list[str]] = {}
    for line in (data / f"qrels/test/mbeir_{task}_test_qrels.txt").read_text().splitlines():
        query_id, _, candidate_id, relevance, _ = line.split()
        if relevance != "0" and candidate_id in texts:
            found.setdefault(query_id, []).append(texts[candidate_id])
    return found


def test_captions_are_asked_for_kept_and_scored(generate: Generate, mini_data: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    options = [*CELL, "--style", "captioning", "--top", "2", "--price-input", "1000", "--price-output", "3", "--json"]
    assert generate(*options) == 0
    found, expected = json.loads(capsys.readouterr().out), results(generate.work)
    assert found["queries"] == found["answered"] == len(expected) == len(generate.server.bodies)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (7 * len(expected), 2 * len(expected))
    assert found["cost"] == pytest.approx((7 * 1000 + 2 * 3) * len(expected) / 1e6)
    rows = [json.loads(line) for path in sorted(Path(found["answers"]).glob("answers-*")) for line in path.open()]
    assert [row["query_id"] for row in rows] == [row["query"]["query_id"] for row in expected]
    references = truth(mini_data, "scenes_task3")
    own = [references[row["query_id"]] for row in rows]
    said, scores = ["A red circle."] * len(rows), found["scores"]["scores"]
    assert scores["bleu"]["value"] == bleu_of_all(said, own)[0]
    for name, values_Q in (("rouge_l", rouge_l(said, own)), ("cider", cider(said, own))):
        assert scores[name]["mean"] == pytest.approx(values_Q.mean()) and values_Q.mean() > 0
        assert scores[name]["low"] <= scores[name]["mean"] <= scores[name]["high"]
    assert set(found["scores"]["libraries"]) == {"sacrebleu", "rouge-score", "pycocoevalcap", "nltk"}
    asked = len(generate.server.bodies)
    assert generate(*options) == 0 and len(generate.server.bodies) == asked, "there is nothing more to ask"
    assert json.loads(capsys.readouterr().out) == found


def test_messages_show_what_was_retrieved_and_the_query(generate: Generate, mini_data: Path) -> None:
    assert generate(*CELL, "--top", "2", "--prompt", "Well?", "--max-tokens", "9", "--request", '{"seed": 1}',
                    "--metric", "exact_match") == 0
    rows, bodies = results(generate.work), generate.server.bodies
    sent = {_picture(body): body for body in bodies}
    assert len(rows) == len(bodies)
    for row in rows:
        body = sent[_pixels(mini_data / row["query"]["image"])]
        texts = [part["text"] for part in body["messages"][1]["content"] if part["type"] == "text"]
        assert [row["candidates"][place]["text"] in texts[place] for place in (0, 1)] == [True, True]
        assert body["messages"][0] == {"role": "system", "content": "Well?"} and len(texts) == 3
        assert (body["model"], body["temperature"], body["max_tokens"], body["seed"]) == ("lab/a-model", 0.0, 9, 1)


def _picture(body: dict[str, Any]) -> bytes:
    url = next(part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url")
    head, data = url.split(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").tobytes()


def _pixels(path: Path) -> bytes:
    return Image.open(path).convert("RGB").tobytes()


def test_questions_are_scored_against_a_file_and_scored_again_without_asking(
        generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [row["query"]["query_id"] for row in results(generate.work, "quiz_task6.local")]
    path, options = tmp_path / "references.jsonl", ["--task", "quiz_task6", "--pool", "local", "--top", "0", "--json"]
    found = []
    for text in ("the red circle", "blue"):
        path.write_text("".join(json.dumps({"query_id": query_id, "references": ["x", text]}) + "\n"
                                for query_id in ids[:-1]))
        assert generate(*options, "--references", str(path)) == 0
        found.append(json.loads(capsys.readouterr().out)["scores"])
    assert len(generate.server.bodies) == len(ids)
    assert [each["scores"]["exact_match"]["mean"] for each in found] == [1, 0]
    assert found[0]["scored"] == len(ids) - 1 and found[0]["without_references"] == 1


def test_a_query_without_an_answer_counts_as_wrong(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    failing = answering(400, {"error": {"message": "too long"}})
    generate.server.faults, count = [None, failing], len(results(generate.work))
    options = [*CELL, "--metric", "exact_match", "--metric", "rouge_l", "--json"]
    assert generate(*options) == 2
    assert "1 queries have no answer, 0 tolerated" in (told := capsys.readouterr().err) and "too long" in told
    generate.server.faults = [failing]
    assert generate(*options, "--tolerate", "1") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["failed"]["count"] == 1 and found["scores"]["without_answer"] == 1
    scored = Path(found["answers"] + ".scored.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in scored]
    assert len(rows) == count and [row["rouge_l"] for row in rows if row["answer"] is None] == [0]
    assert found["scores"]["scores"]["rouge_l"]["mean"] == pytest.approx(np.mean([row["rouge_l"] for row in rows]))
    assert exact_match(["A red circle."], [rows[0]["references"]])[0] == rows[0]["exact_match"]
    assert generate(*options) == 0, "one that is tolerated no more is asked again"


def test_other_messages_are_other_answers(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    places = []
    for more in ([], ["--prompt", "Well?"], ["--top", "1"], ["--temperature", "none"],
                 ["--image-max-side", "30"], ["--concurrency", "1"]):
        assert generate(*CELL, *more, "--json", "--metric", "exact_match") == 0
        places.append(json.loads(capsys.readouterr().out)["answers"])
    assert len(set(places)) == 5 and places[0] == places[-1]


def test_mistakes_are_told_before_anything_is_asked(generate: Generate, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [([], "--encoder quickstart_clip --task scenes_task0 --pool local"), (["--task", "nothing"], "no result"),
             ([*CELL, "--top", "51"], "0 to 50"), ([*CELL, "--metric", "meteor"], "one of: bleu"),
             ([*CELL, "--request", "{"], "--request"), ([*CELL, "--key-variable", "NO_SUCH"], "NO_SUCH"),
             ([*CELL, "--concurrency", "0"], "concurrency is 0"), (["--messages", "none.jsonl"], "no file none.jsonl")]
    (tmp_path / "bad.jsonl").write_text('{"query_id": "a", "messages": "Hello"}\n')
    wrong.append((["--messages", str(tmp_path / "bad.jsonl")], "bad.jsonl:1"))
    (tmp_path / "references.jsonl").write_text('{"query_id": "a", "references": "Hello"}\n')
    wrong.append(([*CELL, "--references", str(tmp_path / "references.jsonl")], "references.jsonl:1"))
    for options, told in wrong:
        assert generate(*options) == 2, options
        assert told in capsys.readouterr().err, options
    assert generate.server.bodies == []


def test_without_exported_results_there_is_nothing_to_send_yet(generate: Generate, tmp_path: Path) -> None:
    assert generate(*CELL, f"work_dir={tmp_path}") == 3
    assert generate(*CELL, "name=elsewhere") == 3


def test_no_key_stands_in_any_file(generate: Generate) -> None:
    assert generate(*CELL, "--key-variable", "TEST_KEY") == 0
    files = [path for path in (generate.work / "experiments").rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_the_page_names_options_that_exist() -> None:
    page = (Path(__file__).parents[2] / "docs" / "generate.md").read_text()
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    known = {option for command in parser._subparsers._group_actions[0].choices.values()  # type: ignore
             for option in command._option_string_actions}
    assert len(named := set(re.findall(r"--[a-z][a-z-]+", page))) > 12 and named <= known
