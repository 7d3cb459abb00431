"""Runs and qrels that are exported here load in ranx and in ir_measures, which find the same values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import load
from pipeline.embeddings import read_table
from pipeline.plan import Scored, make_plan
from pipeline.report.export import export
from pipeline.stages.score import PER_QUERY

TASKS = ("quiz_task8", "digits_task3")  # the first has several relevant candidates per query


@pytest.fixture(scope="module")
def exported(quick_copy: Path, small_arguments: list[str]) -> list[tuple[Scored, Path, Path]]:
    """(cell, its run, its qrels), whole runs."""
    experiment = load("quickstart", [f"work_dir={quick_copy}", *small_arguments, "name=interoperability",
                                     f"tasks=[{','.join(TASKS)}]", "export.depth=100"])
    formats = replace(experiment.settings.export, formats=["trec", "qrels"])
    plan = make_plan(replace(experiment, settings=replace(experiment.settings, export=formats)))
    export(plan)
    folder = experiment.directory / "retrieval_results"
    return [(scored, folder / f"run_files/{scored.encoder}.{scored.task.name}.{scored.pool}.txt",
             folder / f"qrels/{scored.task.name}.txt") for scored in plan.scored]


def kept(scored: Scored, metric: str) -> dict[str, float]:
    table = read_table(scored.job.artifact.path(PER_QUERY), None)
    return dict(zip(table["query_id"].to_pylist(), table[metric].to_pylist()))


def test_ir_measures_finds_the_same_values(exported: list[tuple[Scored, Path, Path]]) -> None:
    ir_measures = pytest.importorskip("ir_measures", reason="ir_measures is missing: pip install ir-measures")
    ours = {"Success@5": "hit@5", "R@10": "recall@10", "P@5": "precision@5", "nDCG@10": "ndcg@10", "RR": "mrr",
            "AP": "map"}
    measures = [ir_measures.parse_measure(name) for name in ours]
    for scored, run_file, qrels_file in exported:
        qrels = list(ir_measures.read_trec_qrels(str(qrels_file)))
        run = list(ir_measures.read_trec_run(str(run_file)))
        assert len(run) == sum(1 for _ in run_file.open()) and len(qrels) == sum(1 for _ in qrels_file.open())
        expected = {name: kept(scored, own) for name, own in ours.items()}
        found = list(ir_measures.iter_calc(measures, qrels, run))
        assert len(found) == len(measures) * len(expected["RR"])
        for each in found:
            assert each.value == pytest.approx(expected[str(each.measure)][each.query_id], abs=1e-6), each


def test_ranx_finds_the_same_values(exported: list[tuple[Scored, Path, Path]],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """ranx says hit_rate for hit; its kernels would take a minute to compile and a moment to run."""
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    ranx = pytest.importorskip("ranx", reason="ranx is missing: pip install ranx")
    ours = {"hit_rate@5": "hit@5", "recall@10": "recall@10", "precision@5": "precision@5", "ndcg@10": "ndcg@10",
            "mrr": "mrr", "map": "map"}
    for scored, run_file, qrels_file in exported:
        qrels = ranx.Qrels.from_file(str(qrels_file), kind="trec")
        run = ranx.Run.from_file(str(run_file), kind="trec")
        assert run.name == scored.encoder
        means = ranx.evaluate(qrels, run, list(ours))
        for name, own in ours.items():
            expected = kept(scored, own)
            assert means[name] == pytest.approx(np.mean(list(expected.values())), abs=1e-6), name
            assert dict(run.scores[name]) == pytest.approx(expected, abs=1e-6), name
