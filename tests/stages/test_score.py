"""Scores of a whole run against pytrec_eval, fed with the TREC files that the same run exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import pytrec_eval

from pipeline.config import Experiment, load
from pipeline.embeddings import read_table
from pipeline.plan import Scored, make_plan
from pipeline.stages import score
from pipeline.support.errors import UserError
from pipeline.tables import RUN
from pipeline.workers import run_stage
from tests.runs import run_table
from tests.small_mbeir import SmallMbeir

NAMES = {"hit@5": "success_5", "recall@10": "recall_10", "precision@5": "P_5", "mrr": "recip_rank", "map": "map",
         "ndcg@10": "ndcg_cut_10"}


@pytest.fixture(scope="module")
def cell(quick_run: Experiment) -> Callable[[str, str], Scored]:
    found = {(scored.task.name, scored.pool): scored for scored in make_plan(quick_run).scored}
    return lambda task, pool: found[task, pool]


@pytest.mark.parametrize("task, pool", [
    ("quiz_task8", "local"), ("quiz_task8", "union"), ("streets_task3", "union"), ("digits_task4", "local")])
def test_every_query_agrees_with_pytrec_eval(cell: Callable[[str, str], Scored], task: str, pool: str) -> None:
    job = cell(task, pool).job
    qrels: dict[str, dict[str, int]] = {}
    for row in read_table(job.task.path("qrels.parquet"), job.task.fingerprint).to_pylist():
        qrels.setdefault(row["query_id"], {})[row["candidate_id"]] = row["relevance"]
    run: dict[str, dict[str, float]] = {}
    for row in run_table(job.run).to_pylist():  # rank as score: pytrec_eval must not break our ties its own way
        run.setdefault(row["query_id"], {})[row["candidate_id"]] = 1000.0 - row["rank"]
    measures = {"success", "recall", "P", "recip_rank", "map", "ndcg_cut"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    ours = read_table(job.artifact.path(score.PER_QUERY), job.artifact.fingerprint).to_pylist()
    assert len(ours) == len(theirs) > 0
    for row in ours:
        for name, theirs_name in NAMES.items():
            assert row[name] == pytest.approx(theirs[row["query_id"]][theirs_name], abs=1e-6), (row["query_id"], name)


def test_means_intervals_and_headline(cell: Callable[[str, str], Scored]) -> None:
    job = cell("scenes_task0", "local").job
    scores = job.artifact.manifest()["scores"]
    table = read_table(job.artifact.path(score.PER_QUERY), job.artifact.fingerprint)
    assert scores["headline"] == "hit@5" and scores["queries"] == len(table)
    for name, value in scores["metrics"].items():
        assert value["mean"] == pytest.approx(np.mean(table[name].to_numpy()), abs=1e-6)
        assert value["low"] <= value["mean"] <= value["high"]


def test_distractors_cannot_raise_a_score(quick_run: Experiment) -> None:
    """A union only adds candidates, and relevant ones only for the task whose positives lie in another pool too."""
    by_cell = {(scored.task.name, scored.pool): scored.job.artifact.manifest()["scores"]["metrics"]
               for scored in make_plan(quick_run).scored}
    for task, pool in by_cell:
        if pool == "union" and task != "quiz_task8":
            for name in ("hit@5", "hit@10", "mrr"):
                assert by_cell[task, "union"][name]["mean"] <= by_cell[task, "local"][name]["mean"]


def test_wrong_modality_is_the_share_of_first_candidates(
        cell: Callable[[str, str], Scored], quick_run: Experiment) -> None:
    assert cell("scenes_task0", "local").job.artifact.manifest()["scores"]["wrong_modality_at_1"] == 0
    job = cell("scenes_task3", "union").job  # seeks text
    pools = [score.tables_of(pool, ["candidate_id", "modality"]).to_pylist() for pool in job.pools]
    modality = {row["candidate_id"]: row["modality"] for pool in pools for row in pool}
    first = [row["candidate_id"] for row in run_table(job.run).to_pylist() if row["rank"] == 1]
    expected = np.mean([modality[candidate] != "text" for candidate in first])
    assert job.artifact.manifest()["scores"]["wrong_modality_at_1"] == pytest.approx(expected)


def test_a_query_without_qrels_is_counted_and_scores_zero(tmp_path: Path) -> None:
    small = SmallMbeir(tmp_path)
    small.qrels = small.qrels[:3]
    experiment = load(str(small.write().experiment), ["pools=[local]"])
    for stage in ("collect", "embed", "index", "retrieve", "score"):
        run_stage(experiment, stage)
    scores = make_plan(experiment).scored[0].job.artifact.manifest()["scores"]
    assert scores["queries"] == 4 and scores["queries_without_relevant"] == 1
    assert scores["metrics"]["hit@2"]["mean"] <= 0.75


def test_the_order_of_work_changes_nothing_and_what_is_there_stays(
        quick_run: Experiment, cell: Callable[[str, str], Scored]) -> None:
    jobs = [cell(task, pool).job for pool in ("union", "local") for task in ("quiz_task8", "digits_task4")]
    before = [job.artifact.path(file).read_bytes() for job in jobs for file in (score.SCORES, score.PER_QUERY)]
    jobs[1].artifact.path(score.SCORES).unlink()
    landed = list(score.make([(job, score.SCORES) for job in jobs], score.Runtime()))
    assert [done.name for done in landed] == [jobs[1].artifact.name]
    assert before == [job.artifact.path(file).read_bytes() for job in jobs for file in (score.SCORES, score.PER_QUERY)]


def test_a_run_is_the_same_in_parts_and_as_a_whole(cell: Callable[[str, str], Scored]) -> None:
    run = cell("quiz_task8", "union").job.run
    parts = list(score.run_tables(run, ["query_id", "rank", "candidate_id"]))
    joined = pa.concat_tables(part.cast(pa.schema([RUN.field(name) for name in part.column_names])) for part in parts)
    assert joined.equals(run_table(run).select(["query_id", "rank", "candidate_id"]))


def test_first_candidates_that_the_pools_lack_are_refused_with_their_number(cell: Callable[[str, str], Scored]) -> None:
    """A run over other pools than those that are looked up; scenes and streets have no candidate in common."""
    job, other = cell("scenes_task0", "local").job, cell("streets_task0", "local").job
    first: list[pa.Array] = []
    assert list(score._noting_first(score.run_tables(job.run), first))
    count = sum(map(len, first))
    with pytest.raises(UserError, match=f"^{count} retrieved candidates are in none of the pools"):
        score._wrong_modality(job, first, score._Pools(other.pools))
    assert score._wrong_modality(job, first, score._Pools([*other.pools, *job.pools])) == 0
    assert score._wrong_modality(job, [], score._Pools([])) is None
