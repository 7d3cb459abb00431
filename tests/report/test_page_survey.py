"""What stands at each rank: the survey against counting by hand, and the examples that are chosen from it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import Experiment, load
from pipeline.embeddings import read_table
from pipeline.plan import Plan, Scored, make_plan
from pipeline.report.cells import Cell, Cells, survey_cells
from pipeline.report.contents import read_contents
from pipeline.report.examples import NEAR, TOPICS, choose
from pipeline.report.survey import FIRST_RANKS, KINDS, NOTHING, PoolIndex, Survey
from pipeline.report.views import error_lines
from pipeline.run import run_experiment
from pipeline.stages.score import tables_of
from pipeline.support.errors import NotReady
from tests.runs import run_table
from tests.small_mbeir import SmallMbeir


@pytest.fixture(scope="module")
def plan(quick_run: Experiment) -> Plan:
    return make_plan(quick_run)


@pytest.fixture(scope="module")
def cells(plan: Plan) -> Cells:
    return survey_cells(plan)


def by_hand(plan: Plan, scored: Scored) -> tuple[dict[str, int], list[Counter[str]]]:
    """First relevant rank of each query (0: none), and the kinds at each rank, by dictionaries and loops."""
    job = scored.job
    qrels = read_table(job.task.path("qrels.parquet"), None).to_pylist()
    relevant = {(row["query_id"], row["candidate_id"]) for row in qrels if row["relevance"] > 0}
    home = f"{plan.experiment.benchmark.name}.pool.{scored.task.pool}"
    facts = {row["candidate_id"]: (row["modality"], pool.name == home)
             for pool in job.pools for row in tables_of(pool).to_pylist()}
    sought = job.task.manifest()["candidate_modality"]
    first = {row["query_id"]: 0 for row in tables_of(job.task).to_pylist()}
    counts = [Counter[str]() for _ in range(job.run.params.depth)]
    for hit in run_table(job.run).to_pylist():
        modality, is_home = facts[hit["candidate_id"]]
        kind = "wrong item" if is_home else "wrong domain"
        kind = kind if sought in (None, modality) else "wrong modality"
        if (hit["query_id"], hit["candidate_id"]) in relevant:
            kind, first[hit["query_id"]] = "relevant", first[hit["query_id"]] or hit["rank"]
        counts[hit["rank"] - 1][kind] += 1
    return first, counts


def test_a_survey_is_what_counting_by_hand_gives(plan: Plan, cells: Cells) -> None:
    seen = Counter[str]()
    for cell, scored in zip(cells, plan.scored):
        first, counts = by_hand(plan, scored)
        assert cell.survey.first_Q.tolist() == list(first.values())
        assert cell.survey.count_KT.tolist() == [[count[kind] for kind in KINDS] for count in counts]
        seen += sum(counts, Counter[str]())
    assert set(seen) == set(KINDS), "every kind occurs in what was compared"


def test_hits_are_those_of_the_scores(cells: Cells) -> None:
    for cell in cells:
        for k in (1, 5, 10):
            assert cell.survey.hit_K[k - 1] == pytest.approx(cell.row.metrics[f"hit@{k}"].mean, abs=1e-12)
            assert cell.survey.is_hit(k).mean() == pytest.approx(cell.survey.hit_K[k - 1])


def test_first_ranks_add_up_to_the_counts(cells: Cells) -> None:
    for cell in cells:
        for rank in range(FIRST_RANKS):
            counted = np.bincount(cell.survey.kind_QR[:, rank], minlength=NOTHING + 1)[:NOTHING]
            assert counted.tolist() == cell.survey.count_KT[rank].tolist()


def test_wrong_modality_is_the_number_of_the_score_table(cells: Cells) -> None:
    for cell in cells:
        share = cell.survey.share_KT[0, KINDS.index("wrong modality")]
        assert share == pytest.approx(cell.row.wrong_modality_at_1)


def test_a_local_pool_has_no_wrong_domain(cells: Cells) -> None:
    at = KINDS.index("wrong domain")
    assert all(cell.survey.count_KT[:, at].sum() == 0 for cell in cells if cell.row.pool == "local")
    assert any(cell.survey.count_KT[:, at].sum() for cell in cells if cell.row.pool == "union")


def test_an_index_confirms_hashes_by_ids(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = plan.scored[1].job.pools
    ids = pa.array(["nowhere", *tables_of(pools[0])["candidate_id"].to_pylist()[:5]])
    expected = PoolIndex(pools).places(ids).tolist()
    assert expected[0] == -1 and min(expected[1:]) >= 0
    monkeypatch.setattr("pipeline.report.survey.hashes", lambda column: np.zeros(len(column), np.uint64))
    assert PoolIndex(pools).places(ids).tolist() == expected, "as if all hashes were equal"


def test_runs_over_several_shards_are_put_together(quick_run: Experiment, cells: Cells) -> None:
    shards = [len(cell.scored.job.task.manifest()["shards"]) for cell in cells]
    rows = [len(cell.survey) for cell in cells]
    assert rows == [cell.row.queries for cell in cells]
    assert max(rows) <= quick_run.settings.collect.rows_per_shard * max(shards)


def test_a_short_run_of_several_shards(tmp_path: Path) -> None:
    small = SmallMbeir(tmp_path).write()
    experiment = load(str(small.experiment), ["collect.rows_per_shard=3", "retrieve.depth=20"])
    run_experiment(experiment, [], say=lambda *_: None)
    cells = survey_cells(make_plan(experiment))
    found = next(iter(cells)).survey
    assert len(found) == 4 and found.count_KT.shape == (20, 4)
    assert found.count_KT.sum(axis=1).tolist() == [4] * 4 + [0] * 16, "four candidates, then nothing"
    assert (found.kind_QR[:, 4:] == NOTHING).all() and found.reachable_Q.all()


def test_nothing_is_surveyed_before_it_is_scored(small_arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(NotReady):
        survey_cells(make_plan(load("quickstart", [f"work_dir={tmp_path}", *small_arguments])))


def made_up(cell: Cell, first: list[int], scores: list[float] | None = None) -> Cell:
    count = len(first)
    return replace(cell, survey=Survey(
        np.array(first, np.int32), np.array(scores or [0.0] * count, np.float32), np.ones(count, bool),
        np.full((count, FIRST_RANKS), 3, np.uint8), np.zeros((100, 4), np.int64)))


def two_pools(cells: Cells, local: list[int], union: list[int], scores: list[float] | None = None) -> Cells:
    encoder, task = cells.encoders[0], cells.tasks[0]
    by_key = {(encoder, task, pool): made_up(cells.of(encoder, task, pool), first, scores)
              for pool, first in (("local", local), ("union", union))}
    return Cells(by_key, (encoder,), (task,), ("local", "union"))


def test_examples_are_the_worst_the_nearest_and_the_lost(cells: Cells) -> None:
    union = [0, 1, 6, 90, 15, 0, 16, 7]
    made = two_pools(cells, [0, 1, 2, 5, 6, 0, 1, 7], union, [.1, .9, .9, .9, .9, .8, .9, .9])
    chosen: dict[str, list[int]] = {}
    for example in choose(made, 3):
        chosen.setdefault(example.topic, []).append(example.query)
    assert chosen["worst"] == [5, 0, 3], "without a hit the surest first, then the farthest"
    assert chosen["near"] == [2, 7, 4] and NEAR == 10
    assert chosen["lost"] == [6, 2, 3], "the greatest difference of reciprocal ranks first"
    assert set(chosen) <= set(TOPICS)


def test_unanswerable_queries_are_no_examples(cells: Cells) -> None:
    made = two_pools(cells, [0, 0], [0, 0])
    for cell in made:
        cell.survey.reachable_Q[0] = False
    assert {example.query for example in choose(made, 5)} == {1}


def test_examples_are_chosen_the_same_way_each_time(plan: Plan, cells: Cells) -> None:
    assert choose(cells, 3) == choose(survey_cells(plan), 3)
    turns = [example.turn for example in choose(cells, 3)]
    assert turns == sorted(turns), "first turns first"


def test_wins_and_losses_need_two_encoders(cells: Cells) -> None:
    task, one = cells.tasks[0], next(iter(cells))
    by_key = {("a", task, "local"): made_up(one, [1, 0, 9]), ("b", task, "local"): made_up(one, [50, 2, 9])}
    found = choose(Cells(by_key, ("a", "b"), (task,), ("local",)), 5)
    pairs = {example.topic: (example.query, [key[0] for key in example.shown])
             for example in found if example.topic in ("win", "loss")}
    assert pairs == {"win": (0, ["a", "b"]), "loss": (1, ["a", "b"])}
    assert not {"win", "loss", "lost"} & {example.topic for example in choose(two_pools(cells, [1], [1]), 5)}


def test_lost_queries_are_counted(cells: Cells) -> None:
    line = error_lines(two_pools(cells, [1, 2, 9, 3], [1, 7, 2, 0]), "union")[0]
    assert (line.lost, line.gained) == (2, 1)
    assert line.instead == [0, 0, 1], "only wrong items stand in these made up runs"


def test_contents_are_rows_of_the_tables(cells: Cells) -> None:
    examples = choose(cells, 2)
    contents = read_contents(cells, examples, 5)
    for example in examples:
        key = example.shown[0]
        cell = cells.by_key[key]
        query = contents.queries[example.task, example.query]
        assert query == tables_of(cell.scored.job.task).slice(example.query, 1).to_pylist()[0]
        run = run_table(cell.scored.job.run).to_pylist()
        own = [row for row in run if row["query_id"] == query["query_id"]]
        first = int(cell.survey.first_Q[example.query])
        shown = [row for row in own if row["rank"] in (*range(6), first)]
        expected = [(row["candidate_id"], row["rank"], row["score"]) for row in shown]
        assert [hit[:3] for hit in contents.hits[key, example.query]] == expected
        for hit in contents.hits[key, example.query]:
            row = contents.candidate(cell, hit.candidate_id)
            assert row is not None and row["candidate_id"] == hit.candidate_id
            is_relevant = hit.candidate_id in contents.relevant[example.task, example.query]
            assert (hit.kind == "relevant") == is_relevant
