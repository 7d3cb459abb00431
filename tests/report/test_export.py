"""Exports: others can read them, they repeat what the tables say, and a second export does nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import artifacts
from pipeline.artifacts import Artifact, Identity
from pipeline.config import Experiment, load
from pipeline.embeddings import read_table, write_table
from pipeline.loading import choose_prompts
from pipeline.plan import Plan, Scored, make_plan
from pipeline.report import mteb_json, retrieved, uniir
from pipeline.report.export import export
from pipeline.report.exported import files_of
from pipeline.report.per_query import write_parquet
from pipeline.report.retrieved import write_retrieved
from pipeline.report.tables import score_rows
from pipeline.report.trec import read_trec_qrels, read_trec_run
from pipeline.report.uniir import metric_name, result_table, task_number
from pipeline.settings import FORMATS
from pipeline.stages.score import PER_QUERY, Job, tables_of
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


def fewer_tasks(plan: Plan, quick_run: Experiment, small_arguments: list[str], *more: str) -> Plan:
    return planned(quick_run, small_arguments, f"name={plan.experiment.name}", f"tasks=[{TASKS[0]}]", *more)


def files(plan: Plan) -> set[str]:
    return {str(path.relative_to(directory(plan))) for path in directory(plan).rglob("*")
            if path.is_file() and path.name != "exported.json"}


def test_files_of_cells_that_left_are_removed_and_nothing_else(plan: Plan, quick_run: Experiment,
                                                               small_arguments: list[str]) -> None:
    written = names(plan, export(plan))
    runs = directory(plan) / "run_files"
    own, edited = runs / "mine.txt", runs / f"quickstart_clip.{TASKS[1]}.local.txt"
    own.write_text("not in the record")
    edited.write_text("changed by hand")
    export(fewer_tasks(plan, quick_run, small_arguments))
    left = {name for name in written if TASKS[1] in name}
    assert len(left) == 4
    assert files(plan) == written - left | {str(path.relative_to(directory(plan))) for path in (own, edited)}
    recorded = json.loads((directory(plan) / "exported.json").read_text())
    assert set(recorded) == written - left
    assert names(plan, export(plan)) == {"final_tsv/quickstart_clip.tsv", *left}


def test_current_files_of_another_format_stay_and_outdated_ones_go(plan: Plan, quick_run: Experiment,
                                                                   small_arguments: list[str]) -> None:
    written = names(plan, export(plan))
    name = f"name={plan.experiment.name}"
    export(planned(quick_run, small_arguments, name, "export.formats=[tsv]"))
    assert files(plan) == written
    export(planned(quick_run, small_arguments, name, "export.formats=[tsv]", f"export.depth={DEPTH - 1}"))
    assert files(plan) == {file for file in written if file.startswith("final_tsv/")}


def test_a_forged_record_removes_nothing_elsewhere(plan: Plan, tmp_path: Path) -> None:
    export(plan)
    names = ["../../outside.txt", str(tmp_path / "outside.txt")]
    for name in names:
        (directory(plan) / name).write_text("keep")
    record = directory(plan) / "exported.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **dict.fromkeys(names, {"bytes": 4}), "odd": 3}))
    export(plan)
    for name in names:
        assert (directory(plan) / name).read_text() == "keep" and name not in record.read_text()


def test_every_format_that_may_be_asked_for_is_there(plan: Plan) -> None:
    assert set(files_of(plan, score_rows(plan))) == set(FORMATS)


def test_qrels_are_those_of_the_tables(quick_run: Experiment, small_arguments: list[str]) -> None:
    plan = planned(quick_run, small_arguments, "name=qrels", "export.formats=[qrels]")
    assert names(plan, export(plan)) == {f"qrels/{task}.txt" for task in TASKS} and not export(plan)
    for scored in plan.scored:
        qrels = read_table(scored.job.task.path("qrels.parquet"), None).replace_schema_metadata(None)
        assert read_trec_qrels(directory(plan) / f"qrels/{scored.task.name}.txt").equals(qrels)


def test_values_per_query_are_those_that_are_kept(quick_run: Experiment, small_arguments: list[str]) -> None:
    plan = planned(quick_run, small_arguments, "name=per_query", "export.formats=[per_query, per_query_csv]")
    assert len(export(plan)) == 1 + 4 and not export(plan)
    whole = pq.read_table(directory(plan) / "per_query/per_query.parquet").to_pandas()
    assert list(whole.columns[:4]) == ["encoder", "task", "pool", "query_id"]
    for scored in plan.scored:
        kept = read_table(scored.job.artifact.path(PER_QUERY), None).to_pandas()
        kinds = {name: np.float32 for name in kept.columns[1:]}
        text = pd.read_csv(cell_file(plan, scored, "per_query", "csv"), dtype=kinds)
        here = whole[(whole.task == scored.task.name) & (whole.pool == scored.pool)].reset_index(drop=True)
        for table in (text, here):
            assert set(table.encoder) == {scored.encoder} and set(table.pool) == {scored.pool}
            pd.testing.assert_frame_equal(table[list(kept.columns)], kept, check_exact=True, check_dtype=False)


def test_metrics_that_a_task_does_not_have_are_null(tmp_path: Path, plan: Plan) -> None:
    first, *_, last = plan.scored
    other = tmp_path / "other"
    artifact = replace(last.job.artifact, root=other, identity=replace(
        last.job.artifact.identity, params=replace(last.job.artifact.params, metrics=("hit@3",))))
    table = pa.table({"query_id": ["1", "2"], "hit@3": pa.array([0.5, 1], pa.float32())})
    write_table(artifact.path(PER_QUERY), table, artifact.fingerprint)
    write_parquet([first, replace(last, job=replace(last.job, artifact=artifact))], tmp_path / "all.parquet")
    whole = pq.read_table(tmp_path / "all.parquet")
    assert whole["hit@5"].null_count == 2 and whole["hit@3"].null_count == len(whole) - 2
    assert whole["hit@3"].to_pylist()[-2:] == [0.5, 1]


def test_mteb_loads_what_is_written_for_it(quick_run: Experiment, small_arguments: list[str]) -> None:
    mteb = pytest.importorskip("mteb")
    from mteb.models.model_meta import ModelMeta
    from mteb.results.task_result import TaskResult
    plan = planned(quick_run, small_arguments, "name=mteb", "export.formats=[mteb]")
    written = export(plan)
    assert len(written) == 1 + 4 and not export(plan)
    meta, *results = written
    revision = meta.parent.name
    assert ModelMeta.model_validate_json(meta.read_text()).name == "plumbline/quickstart_clip"
    for path, row in zip(results, score_rows(plan)):
        found = TaskResult.from_disk(path)
        assert found.task_name == (row.task if row.pool == "local" else f"{row.task}.union") == path.stem
        assert found.get_score() == found.main_score == round(row.value.mean, 6)
        scores = found.scores["test"][0]
        assert scores["hit_rate_at_5"] == round(row.metrics["hit@5"].mean, 6)
        assert scores["map"] == round(row.metrics["map"].mean, 6) and len(scores) == len(row.metrics) + 4
    loaded = mteb.ResultCache(directory(plan) / "mteb").load_results(include_remote=False)
    model, = loaded.model_results
    assert (model.model_name, model.model_revision) == ("plumbline/quickstart_clip", revision)
    assert len(model.task_results) == 4


def test_the_revision_of_a_model_changes_with_what_makes_its_vectors(plan: Plan) -> None:
    made = score_rows(plan)[0].made
    others = [replace(made, precision="bf16"), replace(made, storage="float32"), replace(made, instruction="none"),
              replace(made, identity={**made.identity, "weights": "sha256:0"})]
    assert len({mteb_json.revision(each) for each in (made, *others, *others)}) == 5
    assert mteb_json.revision(replace(made, versions={})) == mteb_json.revision(made)


def test_tables_for_people(quick_run: Experiment, small_arguments: list[str]) -> None:
    plan = planned(quick_run, small_arguments, "name=tables", "export.formats=[markdown, latex]")
    assert names(plan, export(plan)) == {"tables/scores.md", "tables/scores.tex"} and not export(plan)
    rows = score_rows(plan)
    for name in ("scores.md", "scores.tex"):
        text = (directory(plan) / "tables" / name).read_text()
        assert all(f"{row.value.mean:.4f}" in text for row in rows)


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
