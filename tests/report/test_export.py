"""Exports: others can read them, they repeat what the tables say, and a second export does nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import artifacts
from pipeline.artifacts import Artifact, Identity
from pipeline.config import Experiment, load
from pipeline.embeddings import read_table, write_table
from pipeline.loading import choose_prompts
from pipeline.plan import Plan, Scored, make_plan
from pipeline.report import retrieved, uniir
from pipeline.report.export import export
from pipeline.report.retrieved import write_retrieved
from pipeline.report.tables import score_rows
from pipeline.report.trec import read_trec_run
from pipeline.report.uniir import metric_name, result_table, task_number
from pipeline.stages.score import Job, tables_of
from pipeline.tables import CANDIDATES, QRELS, QUERIES, RUN, Candidate, Qrel, Query, table_of
from tests.runs import run_table

DEPTH = 7
TASKS = ["quiz_task6", "digits_task3"]


@pytest.fixture
def plan(quick_run: Experiment, small_arguments: list[str], request: pytest.FixtureRequest) -> Plan:
    """The artifacts of the finished quick start, exported under another name."""
    return planned(quick_run, small_arguments, f"name={request.node.name.replace('[', '-').replace(']', '')}")


def planned(quick_run: Experiment, small_arguments: list[str], *more: str) -> Plan:
    return make_plan(load("quickstart", [f"work_dir={quick_run.work_dir}", f"tasks=[{','.join(TASKS)}]",
                                         f"export.depth={DEPTH}", *small_arguments, *more]))


def directory(plan: Plan) -> Path:
    return plan.experiment.directory / "retrieval_results"


def names(plan: Plan, written: list[Path]) -> set[str]:
    return {str(path.relative_to(directory(plan))) for path in written}


def test_every_cell_gets_its_files(plan: Plan) -> None:
    cells = [f"quickstart_clip.{task}.{pool}" for task in TASKS for pool in ("local", "union")]
    runs = {f"run_files/{cell}.txt" for cell in cells}
    lists = {f"retrieved_candidates/{cell}.jsonl" for cell in cells}
    tables = {"final_tsv/README.txt", "final_tsv/quickstart_clip.tsv"}
    assert names(plan, export(plan)) == runs | lists | tables


def test_only_the_formats_asked_for(quick_run: Experiment, small_arguments: list[str]) -> None:
    plan = planned(quick_run, small_arguments, "name=formats", "export.formats=[tsv]")
    assert names(plan, export(plan)) == {"final_tsv/README.txt", "final_tsv/quickstart_clip.tsv"}


def cell_file(plan: Plan, scored: Scored, folder: str, suffix: str) -> Path:
    return directory(plan) / folder / f"{scored.encoder}.{scored.task.name}.{scored.pool}.{suffix}"


def test_run_files_are_the_runs(plan: Plan) -> None:
    export(plan)
    for scored in plan.scored:
        path = cell_file(plan, scored, "run_files", "txt")
        run = run_table(scored.job.run).replace_schema_metadata(None)
        assert read_trec_run(path).equals(run.filter(run["rank"].to_numpy() <= DEPTH))
        lines = [line.split(" ") for line in path.read_text().splitlines()]
        assert {len(line) for line in lines} == {6} and {line[5] for line in lines} == {"quickstart_clip"}


def objects(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def expected_objects(job: Job, depth: int, rule: str) -> list[dict[str, Any]]:
    """The same, slowly: a dictionary for everything."""
    content = {row["candidate_id"]: row
               for pool in job.pools for row in tables_of(pool, CANDIDATES.names).to_pylist()}
    judged: dict[tuple[str, str], int] = {}
    for row in read_table(job.task.path("qrels.parquet"), None).to_pylist():
        pair = row["query_id"], row["candidate_id"]
        judged[pair] = max(row["relevance"], judged.get(pair, row["relevance"]))
    hits: dict[str, list[dict[str, Any]]] = {}
    for hit in run_table(job.run).to_pylist():
        if hit["rank"] <= depth:
            hits.setdefault(hit["query_id"], []).append(
                {**content[hit["candidate_id"]], "rank": hit["rank"], "score": np.float32(hit["score"]),
                 "relevance": judged.get((hit["query_id"], hit["candidate_id"]))})
    expected = []
    for row in tables_of(job.task, QUERIES.names).to_pylist():
        prompts = [None if prompt is None else row["instructions"][prompt]
                   for prompt in choose_prompts(rule, row["query_id"], len(row["instructions"]))]
        several = rule == "all" and row["instructions"]
        query: dict[str, Any] = {key: row[key] for key in ("query_id", "text", "image", "modality")}
        query["instruction"] = prompts if several else prompts[0]
        expected.append({"query": query, "candidates": hits.get(row["query_id"], [])})
    return expected


def test_retrieved_candidates_repeat_the_tables(plan: Plan) -> None:
    export(plan)
    for scored in plan.scored:
        found = objects(cell_file(plan, scored, "retrieved_candidates", "jsonl"))
        for query in found:
            for candidate in query["candidates"]:
                candidate["score"] = np.float32(candidate["score"])
        assert found == expected_objects(scored.job, DEPTH, "hashed")
        assert len(found) > 0 and all(len(query["candidates"]) == DEPTH for query in found)


@pytest.mark.parametrize("hits_per_block, hits_per_write", [(1, 1), (60, 20), (10**6, 13)])
def test_blocks_change_memory_and_nothing_else(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               hits_per_block: int, hits_per_write: int) -> None:
    job = plan.scored[1].job
    write_retrieved(job, tmp_path / "whole", DEPTH, "hashed")
    monkeypatch.setattr(retrieved, "HITS_PER_BLOCK", hits_per_block)
    monkeypatch.setattr(retrieved, "HITS_PER_WRITE", hits_per_write)
    write_retrieved(job, tmp_path / "blocks", DEPTH, "hashed")
    assert (tmp_path / "blocks").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_second_export_does_nothing(plan: Plan) -> None:
    assert export(plan)
    before = {path: path.stat().st_mtime_ns for path in directory(plan).rglob("*")}
    assert export(make_plan(plan.experiment)) == []
    assert {path: path.stat().st_mtime_ns for path in directory(plan).rglob("*")} == before
    assert len(export(plan, again=True)) == 10


def test_what_changed_is_written_again(plan: Plan, quick_run: Experiment, small_arguments: list[str]) -> None:
    export(plan)
    deleted, cut, *_ = sorted((directory(plan) / "run_files").iterdir())
    deleted.unlink()
    cut.write_bytes(cut.read_bytes()[:-10])
    assert set(export(plan)) == {deleted, cut}
    deeper = planned(quick_run, small_arguments, f"name={plan.experiment.name}", f"export.depth={DEPTH + 1}")
    folders = {name.split("/")[0] for name in names(plan, export(deeper))}
    assert folders == {"run_files", "retrieved_candidates"}


def test_files_of_other_cells_are_left_alone(plan: Plan, quick_run: Experiment,
                                             small_arguments: list[str]) -> None:
    export(plan)
    fewer = planned(quick_run, small_arguments, f"name={plan.experiment.name}", f"tasks=[{TASKS[0]}]")
    assert names(plan, export(fewer)) == {"final_tsv/quickstart_clip.tsv"}
    assert names(plan, export(plan)) == {"final_tsv/quickstart_clip.tsv"}


def test_a_damaged_record_costs_only_time(plan: Plan) -> None:
    export(plan)
    (directory(plan) / "exported.json").write_text("[1")
    assert len(export(plan)) == 10


@dataclass(frozen=True)
class _Params(artifacts.Params):
    name: str


def artifact(root: Path, name: str) -> Artifact:
    return Artifact(root, name, Identity("collect", 1, _Params(name), {}))


ODD = ['quote " and \\ backslash', "line\nend\r\ttab", "\u2028 \u00e9 \U0001f600 \x00", "}], {", ""]


@pytest.fixture
def odd_job(tmp_path: Path) -> Job:
    """A task by hand: odd texts, a query without hits, pairs judged twice, relevance 0 and below."""
    task, pool, run = (artifact(tmp_path, name) for name in ("task", "pool", "run"))
    queries = [Query(f"q{number}", text, None, "text", ["one", "two"], ["one x", "two x"])
               for number, text in enumerate(ODD)]
    queries.append(Query("bare", None, "a/b.png", "image", [], []))
    candidates = [Candidate(f'c"{number}', text, None, "text") for number, text in enumerate(ODD)]
    hits = [("q0", 1, 'c"0', 1e-8), ("q0", 2, 'c"2', -0.5), ("q2", 1, 'c"1', 1.0), ("bare", 1, 'c"3', 1 / 3),
            ("bare", 2, 'c"0', 0.0)]
    qrels = [Qrel("q0", 'c"2', 0), Qrel("q0", 'c"2', 3), Qrel("q0", 'c"2', 1), Qrel("bare", 'c"0', 0),
             Qrel("q0", "elsewhere", 1), Qrel("unknown", 'c"0', 1)]
    for owner, schema, rows, files in ((task, QUERIES, queries, 2), (pool, CANDIDATES, candidates, 3)):
        shards = []
        for number, part in enumerate(np.array_split(np.arange(len(rows)), files)):
            file = f"rows-{number:05d}.parquet"
            write_table(owner.path(file), table_of([rows[row] for row in part], schema), owner.fingerprint)
            shards.append({"file": file, "rows": len(part)})
        if owner is task:
            write_table(task.path("qrels.parquet"), table_of(qrels, QRELS), task.fingerprint)
        owner.seal({"shards": shards})
    for number, found in enumerate((hits[:3], hits[3:])):
        write_table(run.path(f"run-{number:05d}.parquet"), table_of(found, RUN), run.fingerprint)
    run.seal({"shards": 2})
    return Job(artifact(tmp_path, "score"), run, task, (pool,), artifact(tmp_path, "audit"))


@pytest.mark.parametrize("rule", ["none", "first", "hashed", "all"])
def test_odd_texts_and_odd_judgements(odd_job: Job, tmp_path: Path, rule: str) -> None:
    write_retrieved(odd_job, tmp_path / "file.jsonl", 10, rule)
    found = objects(tmp_path / "file.jsonl")
    for query in found:
        for hit in query["candidates"]:
            hit["score"] = np.float32(hit["score"])
    assert found == expected_objects(odd_job, 10, rule)
    assert [hit["relevance"] for hit in found[0]["candidates"]] == [None, 3]
    assert [hit["relevance"] for hit in found[-1]["candidates"]] == [None, 0]
    assert found[1]["candidates"] == [] and found[-1]["query"]["instruction"] is None


def test_odd_keys_are_those_promised(odd_job: Job, tmp_path: Path) -> None:
    write_retrieved(odd_job, tmp_path / "file.jsonl", 1, "first")
    first = objects(tmp_path / "file.jsonl")[0]
    assert list(first["query"]) == ["query_id", "text", "image", "modality", "instruction"]
    assert list(first["candidates"][0]) == [
        "candidate_id", "rank", "score", "relevance", "text", "image", "modality"]
    assert len(first["candidates"]) == 1


def cells(text: str) -> list[dict[str, str]]:
    head, *lines = [line.split("\t") for line in text.splitlines()]
    assert tuple(head) == uniir.COLUMNS and {len(line) for line in lines} == {9}
    return [dict(zip(head, line)) for line in lines]


def test_tsv_is_what_uniir_writes(plan: Plan) -> None:
    rows = score_rows(plan)
    *lines, last = cells(result_table(rows, plan.experiment))
    local, union = rows[0], rows[1]
    assert lines[1] == {
        "TaskID": "6", "Task": "image,text -> text", "Dataset": "quiz_task6", "Split": "test",
        "Metric": "Recall@5", "CandPool": "quiz_task6", "Value": f"{local.metrics['hit@5'].mean:.4f}",
        "UnionPool": "union", "UnionValue": f"{union.metrics['hit@5'].mean:.4f}"}
    assert len(lines) == len(TASKS) * len(rows[0].metrics)
    mean = sum(row.value.mean for row in rows if row.pool == "union") / len(TASKS)
    assert (last["Dataset"], last["Metric"]) == ("average of 2 tasks", "Recall@5")
    assert last["UnionValue"] == f"{mean:.4f}"


def test_tsv_names_hit_and_recall_apart(plan: Plan) -> None:
    rows = score_rows(plan)
    lines = cells(result_table(rows, plan.experiment))
    found = {line["Metric"]: line["Value"] for line in lines if line["Dataset"] == rows[0].task}
    assert found["SetRecall@5"] == f"{rows[0].metrics['recall@5'].mean:.4f}"
    names = {name: metric_name(name) for name in ("hit@10", "recall@10", "ndcg@10", "map")}
    assert list(names.values()) == ["Recall@10", "SetRecall@10", "ndcg@10", "map"]


def test_tsv_of_a_union_alone_has_lines(plan: Plan) -> None:
    lines = cells(result_table([row for row in score_rows(plan) if row.pool == "union"], plan.experiment))
    assert {line["CandPool"] for line in lines} == {line["Value"] for line in lines} == {""}
    assert all(float(line["UnionValue"]) >= 0 for line in lines)


def test_tsv_of_local_pools_alone(plan: Plan) -> None:
    lines = cells(result_table([row for row in score_rows(plan) if row.pool == "local"], plan.experiment))
    assert {line["UnionPool"] for line in lines} == {line["UnionValue"] for line in lines} == {""}


def test_tsv_has_lines_for_every_union(plan: Plan) -> None:
    rows = [row for row in score_rows(plan) if row.task == "quiz_task6"]
    both = [*rows, replace(rows[1], pool="wiki")]
    lines = cells(result_table(both, plan.experiment))
    assert [line["UnionPool"] for line in lines[:2]] == ["union", "wiki"]
    assert len(lines) == 2 * len(rows[0].metrics) + 2


def test_task_numbers() -> None:
    numbers = [task_number(name) for name in ("cirr_task7", "a_task12", "task7", "flickr")]
    assert numbers == ["7", "12", "", ""]
