"""Tables, their digests and the audit, on data small enough to count by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Experiment, load
from pipeline.embeddings import read_table
from pipeline.plan import make_plan
from pipeline.stages import collect
from pipeline.workers import run_stage
from tests.small_mbeir import SmallMbeir


def collected(small: SmallMbeir, *overrides: str) -> dict[str, Any]:
    """Jobs of the finished stage by the name of their artifact."""
    experiment = load(str(small.experiment), list(overrides))
    run_stage(experiment, "collect")
    return {job.artifact.name: job for job in make_plan(experiment).jobs["collect"]}


def test_shards_cut_the_table_and_the_manifest_counts_it(tmp_path: Path) -> None:
    jobs = collected(SmallMbeir(tmp_path).write(), "collect.rows_per_shard=3")
    pool = jobs["small.pool.toys_task0"].artifact
    manifest = pool.manifest()
    assert manifest["rows"] == 4 and manifest["modalities"] == {"image": 4}
    assert [shard["rows"] for shard in manifest["shards"]] == [3, 1]
    tables = [read_table(pool.path(shard["file"]), pool.fingerprint) for shard in manifest["shards"]]
    assert [table["candidate_id"].to_pylist() for table in tables] == [["7:1", "7:2", "7:3"], ["7:4"]]


def test_queries_carry_every_prompt_and_every_full_text(tmp_path: Path) -> None:
    task = collected(SmallMbeir(tmp_path).write())["small.toys_task0"].artifact
    row = read_table(task.path("queries-00000.parquet"), task.fingerprint).to_pylist()[0]
    assert row == {"query_id": "7:1", "text": "A red toy.", "image": None, "modality": "text",
                   "instructions": ["Find the picture.", "Which picture is meant?"],
                   "instructed_texts": ["Find the picture. A red toy.", "Which picture is meant? A red toy."]}


def test_the_audit_counts_what_cannot_be_found(tmp_path: Path) -> None:
    small = SmallMbeir(tmp_path)
    small.qrels = ["7:1 0 7:1 1 0", "7:1 0 5:99 1 0", "7:2 0 5:98 1 0", "7:3 0 7:3 0 0", "7:4 0 7:4 1 0",
                   "7:4 0 7:1 1 0", "7:77 0 7:1 1 0"]
    audit = collected(small.write())["small.toys_task0.local.audit"].artifact.manifest()
    assert audit["relevant"] == 5 and audit["relevant_outside_pool"] == 2 and audit["qrels_of_unknown_queries"] == 1
    assert audit["unanswerable_queries"] == {"count": 2, "first": ["7:2", "7:3"]}
    ceiling = audit["ceiling"]  # by hand: query 1 can reach 1 of 2, queries 2 and 3 nothing, query 4 both of 2
    assert ceiling["hit@1"] == pytest.approx(2 / 4) and ceiling["recall@1"] == pytest.approx((1 / 2 + 1 / 2) / 4)
    assert ceiling["recall@2"] == pytest.approx((1 / 2 + 1) / 4)
    assert ceiling["precision@2"] == pytest.approx((1 / 2 + 1) / 4)
    assert ceiling["mrr"] == pytest.approx(2 / 4) and ceiling["map"] == pytest.approx((1 / 2 + 1) / 4)


def test_a_union_with_one_id_twice_is_refused(tmp_path: Path) -> None:
    small = SmallMbeir(tmp_path).write()
    for kind in ("queries", "candidates", "qrels"):
        path = small.path(kind)
        path.with_name(path.name.replace("task0", "task3")).write_text(path.read_text())
    text = small.benchmark.read_text()
    small.benchmark.write_text(text + "  toys_task3: {headline: hit@1}\n")
    with pytest.raises(Exception, match="more than one pool of this union"):
        collected(small, "tasks=[toys_task0]")


def test_collect_streams(quick_run: Experiment) -> None:
    """No shard is longer than asked, and together they are the table."""
    for job in make_plan(quick_run).jobs["collect"]:
        if not isinstance(job, collect.AuditJob):
            manifest = job.artifact.manifest()
            rows = [shard["rows"] for shard in manifest["shards"]]
            assert all(count == 25 for count in rows[:-1]) and sum(rows) == manifest["rows"]
