"""What a run's hits are worth, whatever form the run comes in and however badly its ids hash."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import identifiers, judging
from pipeline.metrics.judging import judge
from pipeline.metrics.ranking import Judged
from pipeline.support.errors import UserError
from pipeline.tables import QRELS, RUN
from tests.metrics.ways import way  # noqa: F401

Run = dict[str, list[str]]
Qrels = list[tuple[str, str, int]]

pytestmark = pytest.mark.usefixtures("way")
untimed = settings(deadline=None, max_examples=60)

QUERIES = ["q1", "q2", "q10", "", "null"]
CANDIDATES = [f"c{number}" for number in range(9)] + ["", "c1\0", "\u00e9", "a candidate with a long name"]
queries_in_any_order = st.permutations(QUERIES)
runs = st.dictionaries(st.sampled_from(QUERIES), st.lists(st.sampled_from(CANDIDATES), unique=True, max_size=9))
qrels_in_any_order = st.lists(
    st.tuples(st.sampled_from([*QUERIES, "another"]), st.sampled_from(CANDIDATES), st.integers(-1, 4)), max_size=25)
KINDS = {"plain": pa.string(), "large": pa.large_string(), "coded": pa.dictionary(pa.int32(), pa.string()),
         "short codes": pa.dictionary(pa.int8(), pa.large_string())}


def run_table(run: Run) -> pa.Table:
    rows = [(query, rank, candidate, 0.0)
            for query, candidates in run.items() for rank, candidate in enumerate(candidates, start=1)]
    return pa.table(list(zip(*rows)) or [()] * 4, names=RUN.names).cast(RUN)


def qrels_table(qrels: Qrels) -> pa.Table:
    return pa.table(list(zip(*qrels)) or [()] * 3, names=QRELS.names).cast(QRELS)


def expected(run: Run, qrels: Qrels, queries: list[str]) -> list[tuple[list[int], list[int]]]:
    """For each query: the relevance at each rank, and all positive relevances, highest first."""
    found = []
    for query in queries:
        relevance: dict[str, int] = {}
        for other, candidate, value in qrels:
            if other == query:
                relevance[candidate] = max(value, relevance.get(candidate, 0))
        depth = max(map(len, run.values()), default=0)
        gains = [relevance.get(candidate, 0) for candidate in run.get(query, [])]
        found.append((gains + [0] * (depth - len(gains)), sorted(filter(None, relevance.values()), reverse=True)))
    return found


def seen(judged: Judged) -> list[tuple[list[int], list[int]]]:
    return [(gains, [value for value in ideal if value])
            for gains, ideal in zip(judged.gains_QK.tolist(), judged.ideal_QR.tolist())]


def assert_equal(judged: Judged, other: Judged) -> None:
    assert seen(judged) == seen(other)
    assert judged.answered_Q.tolist() == other.answered_Q.tolist() and judged.depth == other.depth


@untimed
@given(runs, qrels_in_any_order, queries_in_any_order)
def test_every_hit_has_the_relevance_it_was_judged_to_have(run: Run, qrels: Qrels, queries: list[str]) -> None:
    judged = judge(run_table(run), qrels_table(qrels), pa.array(queries))
    assert seen(judged) == expected(run, qrels, queries)
    assert judged.answered_Q.tolist() == [bool(run.get(query)) for query in queries]
    assert judged.found.query_F.dtype == judged.ideal.query_F.dtype == np.int64
    assert judged.found.rank_F.dtype == judged.ideal.rank_F.dtype == np.int32


@pytest.fixture(params=[0, 1 << 61, (1 << 40) + 1], ids=["no hash at all", "three bits", "the first bytes"])
def poor_hash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(identifiers, "ODD", request.param)
    yield


@pytest.mark.usefixtures("poor_hash")
@settings(untimed, suppress_health_check=list(settings().suppress_health_check))
@given(runs, qrels_in_any_order, queries_in_any_order, st.integers(1, 9))
def test_ids_whose_hashes_are_equal_are_told_apart(run: Run, qrels: Qrels, queries: list[str], hits: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "BLOCK_HITS", hits)
        judged = judge(run_table(run), qrels_table(qrels), pa.array(queries))
    assert seen(judged) == expected(run, qrels, queries)


@pytest.mark.usefixtures("poor_hash")
def test_duplicates_are_found_by_any_hash() -> None:
    run = run_table({"p": ["a", "b"], "q": ["b", "a", "c", "a", "d"]})
    with pytest.raises(UserError, match="candidate a more than once") as refusal:
        judge(run, qrels_table([("q", "a", 1), ("p", "b", 1)]), pa.array(["p", "q"]))
    assert refusal.value.where == "query q"


@pytest.mark.usefixtures("poor_hash")
def test_a_query_listed_twice_is_found_by_any_hash() -> None:
    judge(run_table({}), qrels_table([]), pa.array(["p", "q", "r"]))
    with pytest.raises(UserError, match="query q appears"):
        judge(run_table({}), qrels_table([]), pa.array(["p", "q", "r", "q"]))


@untimed
@given(runs, qrels_in_any_order, st.data())
def test_encodings_and_chunks_make_no_difference(run: Run, qrels: Qrels, data: st.DataObject) -> None:
    table = run_table(run)
    cuts = data.draw(st.lists(st.integers(0, len(table)), max_size=4))
    edges = [0, *sorted(cuts), len(table)]
    columns = {name: table.column(name).combine_chunks() for name in RUN.names}
    for name in ("query_id", "candidate_id"):
        kind = KINDS[data.draw(st.sampled_from(sorted(KINDS)))]
        chunks = [columns[name][first:last].cast(kind) for first, last in zip(edges, edges[1:])]
        columns[name] = pa.chunked_array(chunks, kind)
    qrel_table = qrels_table(qrels)
    kind = KINDS[data.draw(st.sampled_from(sorted(KINDS)))]
    coded = qrel_table.set_column(1, "candidate_id", qrel_table.column("candidate_id").cast(kind))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "BLOCK_HITS", data.draw(st.integers(1, 20)))
        judged = judge(pa.table(columns), coded, pa.chunked_array([QUERIES[:2], QUERIES[2:]]))
    assert_equal(judged, judge(table, qrel_table, pa.array(QUERIES)))


def test_a_dictionary_that_holds_a_string_twice_means_the_strings() -> None:
    twice = pa.array(["q", "a", "q", "a", "b"])
    query_ids = pa.DictionaryArray.from_arrays(pa.array([0, 2, 0], pa.int32()), twice)
    candidate_ids = pa.DictionaryArray.from_arrays(pa.array([4, 3, 0], pa.int32()), twice)
    run = pa.table({"query_id": query_ids, "rank": pa.array([1, 2, 3], pa.int32()), "candidate_id": candidate_ids})
    assert judge(run, qrels_table([("q", "a", 2)]), pa.array(["q"])).gains_QK.tolist() == [[0, 2, 0]]
    again = pa.DictionaryArray.from_arrays(pa.array([1, 4, 3], pa.int32()), twice)
    with pytest.raises(UserError, match="candidate a more than once"):
        judge(run.set_column(2, "candidate_id", again), qrels_table([]), pa.array(["q"]))


@untimed
@given(runs, qrels_in_any_order, queries_in_any_order, st.lists(st.integers(0, 5), max_size=3))
def test_a_run_may_come_in_several_tables(run: Run, qrels: Qrels, queries: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(run)]
    tables = [run_table(dict(list(run.items())[first:last])) for first, last in zip(edges, edges[1:])]
    assert_equal(judge(iter(tables), qrels_table(qrels), pa.array(queries)),
                 judge(run_table(run), qrels_table(qrels), pa.array(queries)))


def test_no_tables_are_an_empty_run() -> None:
    judged = judge(iter([]), qrels_table([("q", "a", 1)]), pa.array(["q"]))
    assert (judged.depth, judged.unanswered, judged.unjudged) == (0, 1, 0)


def test_a_query_in_two_tables_is_refused_by_name() -> None:
    tables = [run_table({"p": ["a"], "q": ["a"]}), run_table({"q": ["b"]})]
    with pytest.raises(UserError, match="not in order") as refusal:
        judge(tables, qrels_table([]), pa.array(["p", "q"]))
    assert refusal.value.where == "query q"


@untimed
@given(runs.filter(lambda run: any(len(hits) > 1 for hits in run.values())), qrels_in_any_order, st.data())
def test_a_candidate_that_is_repeated_anywhere_is_refused(run: Run, qrels: Qrels, data: st.DataObject) -> None:
    query = data.draw(st.sampled_from(sorted(query for query, hits in run.items() if len(hits) > 1)))
    hits = run[query]
    first = data.draw(st.integers(0, len(hits) - 2))
    second = data.draw(st.integers(first + 1, len(hits) - 1))
    repeated = {**run, query: [*hits[:second], hits[first], *hits[second + 1:]]}
    with pytest.raises(UserError, match="more than once for one query") as refusal:
        judge(run_table(repeated), qrels_table(qrels), pa.array(QUERIES))
    assert refusal.value.where == f"query {query}"
    assert f"candidate {hits[first]} more" in str(refusal.value)


@untimed
@given(runs.filter(lambda run: sum(map(len, run.values())) > 1), st.data())
def test_a_run_that_is_shuffled_is_refused_or_still_in_order(run: Run, data: st.DataObject) -> None:
    table = run_table(run)
    order = data.draw(st.permutations(range(len(table))))
    shuffled = table.take(pa.array(order))
    keys = list(zip(shuffled.column("query_id").to_pylist(), shuffled.column("rank").to_pylist()))
    starts = [place for place, (_, rank) in enumerate(keys) if rank == 1]
    follows = [rank == 1 or (place > 0 and keys[place - 1] == (query, rank - 1))
               for place, (query, rank) in enumerate(keys)]
    if all(follows) and starts[0] == 0:
        assert seen(judge(shuffled, qrels_table([]), pa.array(QUERIES)))
    else:
        with pytest.raises(UserError, match="not in order"):
            judge(shuffled, qrels_table([]), pa.array(QUERIES))


def test_many_relevant_candidates_of_one_query_do_not_widen_all_rows() -> None:
    """A million keys for three thousand hits would be the whole block times the longest row."""
    run = {f"q{number}": ["a", f"c{number}"] for number in range(1500)}
    qrels = [(query, f"c{query[1:]}", 1) for query in run] + [("q7", f"far{number}", 1) for number in range(5000)]
    judged = judge(run_table(run), qrels_table(qrels), pa.array(list(run)))
    assert judged.found.rank_F.tolist() == [2] * 1500
    assert judged.relevant_Q.tolist() == [1] * 7 + [5001] + [1] * 1492
