"""Metrics against their definitions written out naively, pytrec_eval and hand-worked cases."""

from __future__ import annotations

import math
import numpy as np
import pyarrow as pa
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import judging, ranking
from pipeline.metrics.ranking import Judged, Metric, best_possible, evaluate, judge, known_metrics, order_run
from pipeline.support.errors import UserError
from pipeline.tables import QRELS, RUN
from tests.metrics.ways import way  # noqa: F401

Run = dict[str, list[str]]
Qrels = dict[str, dict[str, int]]

pytestmark = pytest.mark.usefixtures("way")
untimed = settings(deadline=None, max_examples=40)  # no deadline: the first call pays for imports

CUTS = [None, 1, 2, 3, 5, 10, 50]
EVERY_METRIC = [Metric(name, k) for name in known_metrics() for k in CUTS]


def run_table(run: Run) -> pa.Table:
    rows = [(query, rank, candidate, -float(rank))
            for query, candidates in run.items() for rank, candidate in enumerate(candidates, start=1)]
    return pa.table(list(zip(*rows)) or [()] * 4, names=RUN.names).cast(RUN)


def qrels_table(qrels: Qrels) -> pa.Table:
    rows = [(query, candidate, relevance)
            for query, judged in qrels.items() for candidate, relevance in judged.items()]
    return pa.table(list(zip(*rows)) or [()] * 3, names=QRELS.names).cast(QRELS)


def judge_all(run: Run, qrels: Qrels, queries: list[str]) -> Judged:
    return judge(run_table(run), qrels_table(qrels), pa.array(queries, pa.string()))


def naive(name: str, hits: list[str], judged: dict[str, int], k: int | None, depth: int) -> float:
    """One query's value, as the textbook has it."""
    top = hits[:k]
    gains = [max(0, judged.get(candidate, 0)) for candidate in top]
    ideal = sorted((relevance for relevance in judged.values() if relevance > 0), reverse=True)
    relevant_ranks = [rank for rank, gain in enumerate(gains, start=1) if gain]
    if name == "precision":
        return len(relevant_ranks) / ((depth if k is None else k) or 1)
    if not relevant_ranks:
        return 0.0
    if name == "hit":
        return 1.0
    if name == "recall":
        return len(relevant_ranks) / len(ideal)
    if name == "mrr":
        return 1 / relevant_ranks[0]
    if name == "map":
        return sum(found / rank for found, rank in enumerate(relevant_ranks, start=1)) / len(ideal)
    assert name == "ndcg", f"{name} has no naive definition here: write one"
    gain = sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))
    return gain / sum(gain / math.log2(rank + 1) for rank, gain in enumerate(ideal[:k], start=1))


CANDIDATES = [f"c{number}" for number in range(12)] + ["NA", "\u00e9", "c 1"]
QUERIES = ["q1", "q2", "q10", "null"]
queries_in_any_order = st.permutations(QUERIES)
runs = st.dictionaries(
    st.sampled_from(QUERIES), st.lists(st.sampled_from(CANDIDATES), unique=True, max_size=8))
graded_qrels = st.dictionaries(
    st.sampled_from(QUERIES + ["another"]),
    st.dictionaries(st.sampled_from(CANDIDATES), st.integers(-1, 4), max_size=9))


@untimed
@given(runs, graded_qrels, queries_in_any_order)
def test_every_metric_is_its_naive_definition(run: Run, qrels: Qrels, queries: list[str]) -> None:
    values = evaluate(judge_all(run, qrels, queries), EVERY_METRIC)
    depth = max(map(len, run.values()), default=0)
    for metric in EVERY_METRIC:
        expected = [naive(metric.name, run.get(query, []), qrels.get(query, {}), metric.k, depth)
                    for query in queries]
        np.testing.assert_allclose(values[str(metric)], expected, rtol=1e-12, atol=0, err_msg=str(metric))


@untimed
@given(runs, graded_qrels, queries_in_any_order)
def test_values_lie_between_zero_and_one_and_grow_where_they_must(
        run: Run, qrels: Qrels, queries: list[str]) -> None:
    values = evaluate(judge_all(run, qrels, queries), EVERY_METRIC)
    for values_Q in values.values():
        assert values_Q.dtype == np.float64 and ((values_Q >= 0) & (values_Q <= 1)).all()
    for name in ("hit", "recall", "mrr", "map"):
        growing = [values[str(Metric(name, k))] for k in (1, 2, 3, 5, 10, 50)]
        assert all((low <= high).all() for low, high in zip(growing, growing[1:]))
    assert (values["recall@5"] <= values["hit@5"]).all()


@untimed
@given(runs, graded_qrels, queries_in_any_order)
def test_judged_counts_what_it_was_given(run: Run, qrels: Qrels, queries: list[str]) -> None:
    judged = judge_all(run, qrels, queries)
    relevant = [sum(relevance > 0 for relevance in qrels.get(query, {}).values()) for query in queries]
    assert judged.relevant_Q.tolist() == relevant
    assert judged.unjudged == relevant.count(0)
    assert judged.unanswered == sum(not run.get(query) for query in queries)
    assert judged.gains_QK.dtype == judged.ideal_QR.dtype == judged.relevant_Q.dtype == np.int32
    assert judged.gains_QK.shape == (len(queries), judged.depth)


@untimed
@given(runs, graded_qrels, queries_in_any_order, st.integers(1, 7), st.integers(1, 3))
def test_blocks_change_nothing(run: Run, qrels: Qrels, queries: list[str], hits: int, block: int) -> None:
    whole = judge_all(run, qrels, queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "BLOCK_HITS", hits)
        patch.setattr(ranking, "BLOCK_QUERIES", block)
        parts = judge_all(run, qrels, queries)
        values = evaluate(parts, EVERY_METRIC)
    assert np.array_equal(parts.gains_QK, whole.gains_QK)
    for name, values_Q in evaluate(whole, EVERY_METRIC).items():
        assert np.array_equal(values[name], values_Q), name


TREC_NAMES = {"map": "map", "ndcg": "ndcg", "mrr": "recip_rank"}
TREC_CUT_NAMES = {"hit": "success", "recall": "recall", "precision": "P", "map": "map_cut",
                  "ndcg": "ndcg_cut"}


def random_scores(rng: np.random.Generator, queries: list[str], kinds: int) -> dict[str, dict[str, float]]:
    """Runs of different lengths with tied scores, some of which are ties in float32 only."""
    candidates = [f"c{number}" for number in range(60)]
    return {query: {str(candidate): float(rng.integers(kinds)) / 3 + float(rng.integers(2)) * 1e-12
                    for candidate in rng.choice(candidates, rng.integers(1, 40), replace=False)}
            for query in queries}


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_pytrec_eval_on_graded_qrels_and_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries = [f"q{number}" for number in range(30)]
    scores = random_scores(rng, queries, kinds=3 + 20 * (seed % 2))
    qrels = {query: {f"c{candidate}": int(rng.integers(-1, 4)) for candidate in range(rng.integers(1, 60))}
             for query in queries}
    ordered = order_run(score_table(scores), "trec_eval")
    judged = judge(ordered, qrels_table(qrels), pa.array(queries))
    cut = {f"{trec}_{k}": Metric(name, k) for name, trec in TREC_CUT_NAMES.items() for k in (1, 5, 10, 100)}
    metrics = {**cut, **{trec: Metric(name) for name, trec in TREC_NAMES.items()}}
    values = evaluate(judged, list(metrics.values()))
    measures = {f"{trec}.1,5,10,100" for trec in TREC_CUT_NAMES.values()} | set(TREC_NAMES.values())
    reference = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(scores)
    for trec, metric in metrics.items():
        expected = [reference[query][trec] for query in queries]
        np.testing.assert_allclose(values[str(metric)], expected, rtol=1e-15, atol=0, err_msg=trec)


def score_table(scores: dict[str, dict[str, float]]) -> pa.Table:
    rows = [(query, candidate, score) for query, hits in scores.items() for candidate, score in hits.items()]
    return pa.table(list(zip(*rows)) or [()] * 3, names=["query_id", "candidate_id", "score"])


def test_a_case_worked_by_hand() -> None:
    run = {"q": ["x", "a", "y", "b", "z"]}
    qrels = {"q": {"a": 1, "b": 3, "lost": 2, "y": 0}}
    values = evaluate(judge_all(run, qrels, ["q"]), [Metric.parse(name) for name in (
        "hit@1", "hit@2", "recall@2", "recall", "precision@4", "precision@10", "mrr", "mrr@1", "map",
        "ndcg@4")])
    expected = {
        "hit@1": 0, "hit@2": 1, "recall@2": 1 / 3, "recall": 2 / 3, "precision@4": 2 / 4,
        "precision@10": 2 / 10,
        "mrr": 1 / 2, "mrr@1": 0, "map": (1 / 2 + 2 / 4) / 3,
        "ndcg@4": (1 / math.log2(3) + 3 / math.log2(5)) / (3 + 2 / math.log2(3) + 1 / math.log2(4)),
    }
    assert {name: value.item() for name, value in values.items()} == pytest.approx(expected, abs=1e-15)


def test_ndcg_without_a_cut_counts_relevant_candidates_beyond_the_run() -> None:
    judged = judge_all({"q": ["a"]}, {"q": {"a": 1, "b": 1}}, ["q"])
    assert ranking.ndcg(judged, 1).item() == 1
    assert ranking.ndcg(judged).item() == pytest.approx(1 / (1 + 1 / math.log2(3)))


def test_an_ideal_run_scores_exactly_one() -> None:
    relevance = {f"c{number}": number % 7 + 1 for number in range(40)}
    ideal = sorted(relevance, key=lambda candidate: -relevance[candidate])
    judged = judge_all({"q": ideal + ["x", "y"]}, {"q": relevance}, ["q"])
    for name in ("hit", "recall", "mrr", "map", "ndcg"):
        assert evaluate(judged, [Metric(name)])[name].item() == 1.0, name
    assert all(ranking.ndcg(judged, k).item() == 1.0 for k in range(1, 43))


def test_nothing_retrieved_scores_zero_and_is_counted() -> None:
    judged = judge_all({}, {"q": {"a": 1}}, ["q", "unknown"])
    assert (judged.depth, judged.unanswered, judged.unjudged) == (0, 2, 1)
    assert all((values_Q == 0).all() for values_Q in evaluate(judged, EVERY_METRIC).values())


def test_no_qrels_and_no_queries() -> None:
    assert judge_all({"q": ["a", "b"]}, {}, ["q"]).gains_QK.tolist() == [[0, 0]]
    nothing = judge_all({}, {"q": {"a": 1}}, [])
    assert len(nothing) == 0
    assert all(values_Q.shape == (0,) for values_Q in evaluate(nothing, EVERY_METRIC).values())


def test_negative_relevance_is_not_relevant() -> None:
    judged = judge_all({"q": ["a", "b"]}, {"q": {"a": -2, "b": 0}}, ["q"])
    assert judged.gains_QK.tolist() == [[0, 0]]
    assert judged.relevant_Q.tolist() == [0]


def test_of_two_judgements_of_a_pair_the_higher_counts_once() -> None:
    qrels = pa.table([["q"] * 4, ["a", "b", "a", "a"], [1, 1, 3, 2]], names=QRELS.names).cast(QRELS)
    judged = judge(run_table({"q": ["b", "a"]}), qrels, pa.array(["q"]))
    assert judged.gains_QK.tolist() == [[1, 3]]
    assert judged.ideal_QR.tolist() == [[3, 1]]
    assert judged.relevant_Q.tolist() == [2]


def test_any_string_encoding_and_chunking_will_do() -> None:
    run = run_table({"q1": ["a", "b"], "q2": ["b", "c"]})
    qrels = qrels_table({"q1": {"b": 2}, "q2": {"c": 1}})
    chunked = pa.concat_tables([run.slice(0, 1), run.slice(1, 2), run.slice(3)])
    encoded = chunked.set_column(2, "candidate_id", chunked.column("candidate_id").dictionary_encode())
    encoded = encoded.set_column(0, "query_id", encoded.column("query_id").cast(pa.large_string()))
    judged = judge(encoded, qrels, pa.chunked_array([["q2"], ["q1"]]))
    assert judged.gains_QK.tolist() == [[0, 1], [0, 2]]


def test_a_hit_of_an_unknown_query_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="query stranger"):
        judge_all({"q": ["a"], "stranger": ["a"]}, {"q": {"a": 1}}, ["q"])


def test_a_candidate_twice_under_one_query_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="candidate twice") as refusal:
        judge_all({"q": ["a"], "p": ["twice", "b", "twice"]}, {"q": {"a": 1}}, ["q", "p"])
    assert refusal.value.where == "query p"


@pytest.mark.parametrize("queries, ranks", [
    (["q", "q"], [2, 1]), (["q", "q"], [1, 1]), (["q", "q"], [1, 3]), (["q", "q"], [0, 1]),
    (["q", "p", "q"], [1, 1, 2]), (["q", "p", "q"], [1, 1, 1]), (["q", "p"], [1, 2]),
])
def test_a_run_out_of_order_is_refused(queries: list[str], ranks: list[int]) -> None:
    candidates = [f"c{number}" for number in range(len(ranks))]
    run = pa.table([queries, ranks, candidates, [0.0] * len(ranks)], names=RUN.names).cast(RUN)
    with pytest.raises(UserError, match="not in order"):
        judge(run, qrels_table({}), pa.array(["q", "p"]))


def test_a_query_listed_twice_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="query q appears"):
        judge_all({}, {}, ["p", "q", "q"])


@untimed
@given(runs, graded_qrels, st.sets(st.sampled_from(CANDIDATES)))
def test_no_run_over_the_pool_beats_the_best_possible(run: Run, qrels: Qrels, pool: set[str]) -> None:
    inside = {query: [candidate for candidate in hits if candidate in pool] for query, hits in run.items()}
    judged = judge_all(inside, qrels, QUERIES)
    table = qrels_table(qrels)
    reachable = np.array([candidate in pool for candidate in table.column("candidate_id").to_pylist()], bool)
    bounds = evaluate(best_possible(table, reachable, pa.array(QUERIES), judged.depth), EVERY_METRIC)
    for name, values_Q in evaluate(judged, EVERY_METRIC).items():
        assert (values_Q <= bounds[name] + 1e-12).all(), name


@untimed
@given(graded_qrels, st.sets(st.sampled_from(CANDIDATES)))
def test_the_best_possible_is_reached_by_the_run_that_knows_the_qrels(qrels: Qrels, pool: set[str]) -> None:
    table = qrels_table(qrels)
    reachable = np.array([candidate in pool for candidate in table.column("candidate_id").to_pylist()], bool)
    run = {query: sorted((candidate for candidate in pool if qrels.get(query, {}).get(candidate, 0) > 0),
                         key=lambda candidate: -qrels[query][candidate]) for query in QUERIES}
    best = evaluate(best_possible(table, reachable, pa.array(QUERIES)), EVERY_METRIC)
    for name, values_Q in evaluate(judge_all(run, qrels, QUERIES), EVERY_METRIC).items():
        assert np.array_equal(values_Q, best[name]), name


def test_the_best_possible_counts_what_the_pool_lacks() -> None:
    qrels = qrels_table({"q": {"in": 1, "out": 1}, "p": {"out": 2}})
    best = best_possible(qrels, np.array([True, False, False]), pa.array(["q", "p"]), depth=5)
    assert best.depth == 5
    assert ranking.recall(best).tolist() == [0.5, 0]
    assert ranking.hit(best, 1).tolist() == [1, 0]


def test_ties_are_broken_by_candidate_id() -> None:
    run = score_table({"q2": {"b": 1.0, "a": 1.0, "\u00e9": 1.0, "c": 2.0}, "q1": {"x": -0.0, "y": 0.0}})
    ours, theirs = order_run(run), order_run(run, "trec_eval")
    assert ours.schema.equals(RUN) and theirs.schema.equals(RUN)
    assert ours.column("query_id").to_pylist() == ["q2"] * 4 + ["q1"] * 2
    assert ours.column("rank").to_pylist() == [1, 2, 3, 4, 1, 2]
    assert ours.column("candidate_id").to_pylist() == ["c", "a", "b", "\u00e9", "x", "y"]
    assert theirs.column("candidate_id").to_pylist() == ["c", "\u00e9", "b", "a", "y", "x"]


def test_scores_that_differ_only_beyond_float32_are_ties() -> None:
    run = score_table({"q": {"a": 1.0, "b": 1.0 + 1e-9}})
    assert order_run(run).column("candidate_id").to_pylist() == ["a", "b"]
    qrels = {"q": {"b": 1}}
    ordered = judge(order_run(run, "trec_eval"), qrels_table(qrels), pa.array(["q"]))
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"})
    reference = evaluator.evaluate({"q": {"b": 1.0, "a": 1.0 + 1e-9}})
    assert ranking.mrr(ordered).item() == reference["q"]["recip_rank"] == 1.0


@untimed
@given(st.lists(
    st.tuples(st.sampled_from(QUERIES), st.sampled_from(CANDIDATES), st.sampled_from([0.0, 0.5, 1.0])),
    unique_by=lambda hit: hit[:2]))
def test_order_run_sorts_like_python(hits: list[tuple[str, str, float]]) -> None:
    table = pa.table(list(zip(*hits)) or [()] * 3, names=["query_id", "candidate_id", "score"])
    table = table.cast(pa.schema(
        [("query_id", pa.string()), ("candidate_id", pa.string()), ("score", pa.float64())]))
    first = {query: place for place, (query, _, _) in reversed(list(enumerate(hits)))}
    expected = sorted(hits, key=lambda hit: (first[hit[0]], -hit[2], hit[1].encode()))
    ordered = order_run(table).to_pylist()
    assert [(row["query_id"], row["candidate_id"], row["score"]) for row in ordered] == expected


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(UserError, match="query q, candidate bad"):
        order_run(score_table({"q": {"good": 1.0, "bad": math.nan}}))


@pytest.mark.parametrize("text, printed", [
    ("hit@5", "hit@5"), ("HIT@5", "hit@5"), ("success@5", "hit@5"), ("rr", "mrr"), ("MRR@10", "mrr@10"),
    ("nDCG@10", "ndcg@10"), ("P@5", "precision@5"), ("R@5", "recall@5"), ("recall", "recall"),
    ("MAP", "map"), ("AP@100", "map@100"), (" hit@1 ", "hit@1"),
])
def test_metrics_are_read_under_any_alias_and_printed_under_one_name(text: str, printed: str) -> None:
    metric = Metric.parse(text)
    assert str(metric) == printed
    assert Metric.parse(printed) == metric


@pytest.mark.parametrize("text", ["hit@0", "hit@-1", "hit@", "@5", "", "hit@5.0", "hit@x", "hit 5", "h@5@5"])
def test_a_misspelled_metric_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a metric"):
        Metric.parse(text)


def test_an_unknown_metric_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(UserError, match="'recal' is not known") as refusal:
        Metric.parse("recal@5")
    assert refusal.value.do is not None
    assert "nearest: recall" in refusal.value.do
    assert "hit, recall, precision, mrr, map, ndcg" in refusal.value.do


@pytest.mark.parametrize("name", ["judge", "evaluate", "order_run", "known_metrics", "nearest", "_ratio"])
def test_only_metrics_are_metrics(name: str) -> None:
    assert name not in known_metrics()
    with pytest.raises(UserError):
        Metric.parse(name)


def test_a_new_public_function_is_a_new_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(judged: Judged, k: int | None = None) -> np.ndarray:
        """Relevant candidates found."""
        return (judged.gains_QK[:, :k] > 0).sum(axis=1)

    monkeypatch.setattr(ranking, "found", found, raising=False)
    judged = judge_all({"q": ["a", "b"]}, {"q": {"a": 1, "b": 1}}, ["q"])
    assert evaluate(judged, [Metric.parse("found@2")])["found@2"].tolist() == [2]


def test_every_alias_stands_for_a_metric_and_hides_none() -> None:
    assert set(ranking._ALIASES.values()) <= set(known_metrics())
    assert not set(ranking._ALIASES) & set(known_metrics())
