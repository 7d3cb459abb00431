"""Retrieved candidates in every layout: the schema holds, all layouts say the same, UniIR's keys are UniIR's."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import pipeline
from pipeline.cli import main
from pipeline.config import Experiment, load
from pipeline.plan import make_plan
from pipeline.rag import Result, load_results
from pipeline.report import retrieved
from pipeline.report.results import Cells, result_path, write_results
from pipeline.report.retrieved import write_retrieved
from pipeline.report.retrieved_parquet import write_parquet
from pipeline.support.errors import NotReady, UserError

TASKS = ["quiz_task6", "scenes_task3"]
SCHEMA = json.loads((Path(pipeline.__file__).parent / "report" / "retrieved.schema.json").read_text())


@pytest.fixture
def experiment(quick_copy: Path, small_arguments: list[str], request: pytest.FixtureRequest) -> Experiment:
    name = request.node.name.replace("[", "-").replace("]", "")
    return load("quickstart", [f"work_dir={quick_copy}", f"name={name}", f"tasks=[{','.join(TASKS)}]",
                               *small_arguments])


def written(experiment: Experiment, layout: str = "jsonl", depth: int | None = None,
            compression: str | None = None) -> list[Path]:
    return [each.path for each in write_results(experiment, Cells(), depth, layout, compression)]


def lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_every_line_follows_the_schema(experiment: Experiment) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator, paths = jsonschema.Draft202012Validator(SCHEMA), written(experiment, depth=30)
    assert len(paths) == 4
    for path in paths:
        for line in lines(path):
            validator.validate(line)
            assert [candidate["rank"] for candidate in line["candidates"]] == list(
                range(1, len(line["candidates"]) + 1))
            scores = [candidate["score"] for candidate in line["candidates"]]
            assert scores == sorted(scores, reverse=True)


def test_the_schema_holds_for_several_prompts_and_for_none(experiment: Experiment, tmp_path: Path) -> None:
    job = make_plan(experiment).scored[0].job
    for rule in ("all", "none"):
        write_retrieved(job, tmp_path / rule, 3, rule)
        for line in lines(tmp_path / rule):
            jsonschema.validate(line, SCHEMA)


def _drop_score(line: dict[str, Any]) -> None:
    del line["candidates"][0]["score"]


def _rank_zero(line: dict[str, Any]) -> None:
    line["candidates"][0]["rank"] = 0


def _odd_modality(line: dict[str, Any]) -> None:
    line["query"]["modality"] = "text,image"


def _foreign_key(line: dict[str, Any]) -> None:
    line["query"]["qid"] = "1"


def _picture_of_a_text(line: dict[str, Any]) -> None:
    line["candidates"][0].update(modality="text", image="a.png")


@pytest.mark.parametrize("spoil", [_drop_score, _rank_zero, _odd_modality, _foreign_key, _picture_of_a_text])
def test_the_schema_refuses_what_is_not_so(experiment: Experiment, spoil: Callable[[dict[str, Any]], None]) -> None:
    line = copy.deepcopy(lines(written(experiment, depth=2)[0])[0])
    spoil(line)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(line, SCHEMA)


def comparable(results: list[Result]) -> list[Any]:
    return [(result.query, result.candidates) for result in results]


@pytest.mark.parametrize("hits_per_block, hits_per_write", [(1, 1), (60, 20), (10**6, 50_000)])
def test_parquet_says_what_json_says(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     hits_per_block: int, hits_per_write: int) -> None:
    monkeypatch.setattr(retrieved, "HITS_PER_BLOCK", hits_per_block)
    monkeypatch.setattr(retrieved, "HITS_PER_WRITE", hits_per_write)
    for scored in make_plan(experiment).scored:
        for rule in ("hashed", "all"):
            count = write_retrieved(scored.job, tmp_path / "a.jsonl", 7, rule)
            assert write_parquet(scored.job, tmp_path / "a.parquet", 7, rule) == count > 0
            expected, found = (list(load_results(tmp_path / name)) for name in ("a.jsonl", "a.parquet"))
            assert comparable(found) == comparable(expected) and len(expected) == count


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_compressed_files_hold_the_same_bytes(experiment: Experiment, compression: str) -> None:
    plain, packed = written(experiment), written(experiment, compression=compression)
    for one, other in zip(plain, packed):
        assert other.stat().st_size < one.stat().st_size / 3
        if compression == "gzip":
            assert gzip.decompress(other.read_bytes()) == one.read_bytes()
        assert comparable(list(load_results(one))) == comparable(list(load_results(other)))


def test_any_depth_and_other_depths_beside(experiment: Experiment) -> None:
    for depth in (1, 9, 100):
        for path in written(experiment, depth=depth):
            assert path.name.endswith(f".k{depth}.jsonl")
            counts = {len(line["candidates"]) for line in lines(path)}
            assert max(counts) <= depth and (depth == 100 or counts == {depth})
    assert all(".k" not in path.name for path in written(experiment))
    for depth in (0, 101):
        with pytest.raises(UserError, match="depth"):
            written(experiment, depth=depth)


def test_uniir_s_layout(experiment: Experiment) -> None:
    for ours, theirs in zip(written(experiment, depth=5), written(experiment, "uniir", depth=5)):
        assert theirs.name.startswith("mbeir_") and theirs.name.endswith("_test_k5_retrieved.jsonl")
        for expected, line in zip(lines(ours), lines(theirs), strict=True):
            assert list(line) == ["query", "candidates"]
            assert list(line["query"]) == ["qid", "query_txt", "query_img_path", "query_modality",
                                           "query_src_content", "pos_cand_list", "neg_cand_list", "task_id"]
            assert line["query"]["task_id"] in (6, 3) and line["query"]["query_txt"] == expected["query"]["text"]
            assert [candidate["did"] for candidate in line["candidates"]] == [
                candidate["candidate_id"] for candidate in expected["candidates"]]
            for candidate in line["candidates"]:
                assert set(candidate) == {"txt", "img_path", "modality", "did", "src_content"}


def test_uniir_s_positives_are_those_of_the_query_file(experiment: Experiment) -> None:
    path = result_path(experiment, make_plan(experiment).scored[0], "uniir", None, 5)
    written(experiment, "uniir", depth=5)
    files = Path(experiment.benchmark.root, "query/test").glob("*.jsonl")
    raw = {row["qid"]: row for file in files if TASKS[0] in file.name for row in lines(file)}
    found = [line["query"] for line in lines(path)]
    assert [{**row, "neg_cand_list": [], "query_src_content": None} for row in raw.values()] == found


def test_the_command_writes_what_it_names(experiment: Experiment, small_arguments: list[str],
                                          capsys: pytest.CaptureFixture[str]) -> None:
    command = ["results", "quickstart", f"work_dir={experiment.work_dir}", "name=by-command", *small_arguments]
    assert main([*command, "--task", TASKS[0], "--pool", "union", "--depth", "4", "--compress", "zstd"]) == 0
    path, summary = capsys.readouterr().out.splitlines()
    assert path.endswith(f"quickstart_clip.{TASKS[0]}.union.k4.jsonl.zst") and " queries, " in summary
    result, *_ = load_results(path)
    assert len(result.candidates) == 4 and result.candidates[0].image is None
    assert main([*command, "--task", "nothing"]) == 2
    assert "no task 'nothing'" in capsys.readouterr().err


def test_mistakes_are_named(experiment: Experiment, small_arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no task 'quiz_task7'"):
        list(write_results(experiment, Cells(tasks=["quiz_task7"]), None, "jsonl", None))
    with pytest.raises(NotReady):
        written(load("quickstart", [f"work_dir={tmp_path}", *small_arguments]))
