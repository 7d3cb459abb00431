"""Foreign runs are scored as trec_eval scores them (an independent judge: pytrec_eval)."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.foreign import DEFAULT_METRICS, score_run
from pipeline.support.errors import UserError

THEIRS = {"map": "map", "mrr": "recip_rank", "ndcg@10": "ndcg_cut_10", "precision@10": "P_10",
          "recall@10": "recall_10", "hit@10": "success_10"}

RUN = "q1 Q0 a 1 0.5 t\nq1 Q0 b 2 0.4 t\nq2 Q0 c 1 0.5 t\n"
QRELS = "q1 0 b 1\nq2 0 c 2\nq3 0 d 1\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    run, qrels = tmp_path / "run.txt", tmp_path / "qrels.txt"
    run.write_text(RUN)
    qrels.write_text(QRELS)
    return run, qrels


def parsed(text: str) -> dict[tuple[str, str], str]:
    lines = [line.split("\t") for line in text.splitlines()]
    assert all(len(line) == 3 for line in lines)
    return {(metric, query): value for metric, query, value in lines}


def test_means_by_hand(files: tuple[Path, Path]) -> None:
    """q1: rank 2, q2: rank 1, q3: no hits, which counts 0."""
    found = parsed(score_run(*files, ["mrr", "hit@1"]))
    assert found == {("mrr", "all"): "0.5000", ("hit@1", "all"): "0.3333"}


def test_default_metrics_in_their_order(files: tuple[Path, Path]) -> None:
    assert [metric for metric, _ in parsed(score_run(*files))] == list(DEFAULT_METRICS)


def test_values_per_query_come_first(files: tuple[Path, Path]) -> None:
    text = score_run(*files, ["mrr"], per_query=True)
    assert text.splitlines() == ["mrr\tq1\t0.5000", "mrr\tq2\t1.0000", "mrr\tq3\t0.0000", "mrr\tall\t0.5000"]


def test_aliases_are_one_metric(files: tuple[Path, Path]) -> None:
    assert list(parsed(score_run(*files, ["success@5", "hit@5"]))) == [("hit@5", "all")]


def test_ties_follow_the_rule_asked_for(tmp_path: Path) -> None:
    run, qrels = tmp_path / "run.txt", tmp_path / "qrels.txt"
    run.write_text("q Q0 a 1 1.0 t\nq Q0 b 2 1.0 t\n")
    qrels.write_text("q 0 a 1\n")
    assert parsed(score_run(run, qrels, ["mrr"]))["mrr", "all"] == "1.0000"
    assert parsed(score_run(run, qrels, ["mrr"], ties="trec_eval"))["mrr", "all"] == "0.5000"


def test_queries_without_qrels_are_counted(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch,
                                           caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    before = score_run(*files)
    files[0].write_text(RUN + "q8 Q0 a 1 0.5 t\nq9 Q0 a 1 0.5 t\n")
    assert score_run(*files) == before
    assert "2 queries without qrels" in caplog.text


@pytest.mark.parametrize("run, qrels, what", [
    ("", QRELS, "no lines"), (RUN, "", "no lines"), ("x Q0 a 1 0.5 t\n", QRELS, "no query of this run"),
    ("q1 Q0 a 1 0.5\n", QRELS, "columns"), (RUN + "q1 Q0 a 3 0.1 t\n", QRELS, "more than once")])
def test_mistakes_are_named(files: tuple[Path, Path], run: str, qrels: str, what: str) -> None:
    files[0].write_text(run)
    files[1].write_text(qrels)
    with pytest.raises(UserError, match=what):
        score_run(*files)


def test_unknown_metric(files: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="not known"):
        score_run(*files, ["bleu@4"])


ids = st.sampled_from([f"c{number}" for number in range(25)])
queries = st.sampled_from("uvwxyz")
runs = st.dictionaries(queries, st.dictionaries(ids, st.integers(0, 5), min_size=1), min_size=1)
judgements = st.dictionaries(queries, st.dictionaries(ids, st.integers(0, 3), min_size=1), min_size=1)


@given(runs, judgements)
def test_same_values_as_trec_eval(tmp_path_factory: pytest.TempPathFactory, run: dict[str, dict[str, int]],
                                  qrels: dict[str, dict[str, int]]) -> None:
    if not run.keys() & qrels.keys():
        return
    directory = tmp_path_factory.mktemp("foreign")
    (directory / "run").write_text("".join(
        f"{query} Q0 {name} 0 {score} t\n" for query, hits in run.items() for name, score in hits.items()))
    (directory / "qrels").write_text("".join(
        f"{query} 0 {name} {value}\n" for query, pairs in qrels.items() for name, value in pairs.items()))
    found = parsed(score_run(directory / "run", directory / "qrels", ties="trec_eval", per_query=True))
    scores = {query: {name: float(score) for name, score in hits.items()} for query, hits in run.items()}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, set(THEIRS.values())).evaluate(scores)
    for query in qrels:
        for ours, name in THEIRS.items():
            assert found[ours, query] == f"{theirs.get(query, {}).get(name, 0.0):.4f}", (ours, query)
