"""The compiled search for matches: against a look at every string, against NumPy's way, and how it is done without."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import identifiers, native
from pipeline.metrics.judging import judge
from pipeline.metrics.native import Columns, has_twins
from pipeline.support import native_build
from pipeline.support.errors import UserError
from pipeline.tables import QRELS, RUN
from tests.metrics.ways import EXTRA_FLAGS, library, needs_compiler

ROOT = Path(__file__).resolve().parents[2]
ENOUGH = 1e9  # hits: worth anything

untimed = settings(deadline=None, max_examples=100)
texts = st.one_of(st.sampled_from(["", "a", "a\0", "\0", "1234567", "12345678", "123456789", "\u00e9", "x" * 300]),
                  st.text(max_size=20))
row = st.lists(texts, max_size=9, unique=True)
factors = st.sampled_from([identifiers.ODD, identifiers.ODD, 0, 1, 1 << 61])
kinds = st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()),
                         pa.dictionary(pa.int16(), pa.large_string()), pa.dictionary(pa.int32(), pa.string()),
                         pa.dictionary(pa.int64(), pa.string())])


def tight(ids: pa.Array) -> pa.Array:
    """The same in memory that ends where the data does, so that a memory checker sees who reads on."""
    if isinstance(ids, pa.DictionaryArray):
        codes = pa.py_buffer(np.array(ids.indices.to_numpy()))
        return pa.DictionaryArray.from_arrays(
            pa.Array.from_buffers(ids.indices.type, len(ids), [None, codes]), tight(ids.dictionary))
    encoded = [value.encode() for value in ids.cast(pa.string()).to_pylist()]
    offsets = np.cumsum([0, *map(len, encoded)]).astype(np.int32)
    data = np.frombuffer(b"".join(encoded), np.uint8).copy()
    return pa.Array.from_buffers(pa.string(), len(ids), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def column(data: st.DataObject, values: list[str]) -> pa.ChunkedArray:
    """In chunks, each with a dictionary of its own or none; some begin in the middle of what they are made of."""
    kind, cuts = data.draw(kinds), data.draw(st.lists(st.integers(0, len(values)), max_size=4))
    edges, skipped = [0, *sorted(cuts), len(values)], data.draw(st.integers(0, 2))
    chunks = [tight(pa.array(["skipped"] * skipped + values[first:last], pa.string()).cast(kind))[skipped:]
              for first, last in zip(edges, edges[1:])]
    return pa.chunked_array(chunks)


def naive(rows: list[list[str]], wanted: list[list[str]]) -> tuple[list[int], list[int]]:
    found = []
    for number, (hits, judged) in enumerate(zip(rows, wanted)):
        first, first_judged = (sum(map(len, table[:number])) for table in (rows, wanted))
        found += sorted((first + hits.index(one), first_judged + place)
                        for place, one in enumerate(judged) if one in hits)
    return [hit for hit, _ in found], [judged for _, judged in found]


def starts(rows: list[list[str]]) -> np.ndarray:
    return np.cumsum([0, *map(len, rows)])


@needs_compiler
@untimed
@given(st.lists(st.tuples(row, row), max_size=7), factors, st.data())
def test_matches_are_those_of_the_strings(rows: list[tuple[list[str], list[str]]], factor: int,
                                          data: st.DataObject) -> None:
    hits, wanted = [one for one, _ in rows], [other for _, other in rows]
    ids, judged = ([value for values in table for value in values] for table in (hits, wanted))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identifiers, "ODD", factor)
        columns = Columns(library(), column(data, ids), tight(pa.array(judged, pa.string())))
        found = columns.matches(starts(hits), starts(wanted)[:-1], np.array([*map(len, wanted)], np.int64))
    assert found is not None
    assert (found[0].tolist(), found[1].tolist()) == naive(hits, wanted)


@needs_compiler
@untimed
@given(st.lists(st.lists(texts, max_size=6), max_size=6), factors)
def test_twins_are_found_within_a_row_only(rows: list[list[str]], factor: int) -> None:
    ids = tight(pa.array([value for values in rows for value in values], pa.string()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identifiers, "ODD", factor)
        found = has_twins(library(), ids, np.array([*map(len, rows)], np.int64))
    assert found == any(len(set(values)) < len(values) for values in rows)


def outcome(run: pa.Table, qrels: pa.Table, queries: pa.Array, chosen: native.Native | None) -> Any:
    """What judging found, or what it refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load_for", lambda num_hits: chosen)
        try:
            judged = judge(run, qrels, queries)
        except UserError as error:
            return error.what, error.where, error.do
    return [array.tolist() for side in (judged.found, judged.ideal)
            for array in (side.query_F, side.rank_F, side.relevance_F)] + [judged.answered_Q.tolist(), judged.depth]


@needs_compiler
@settings(untimed, max_examples=200)
@given(st.dictionaries(st.sampled_from("pqr"), row, max_size=3),
       st.lists(st.tuples(st.sampled_from("pqr"), texts, st.integers(-1, 3)), max_size=9), st.data())
def test_both_ways_find_and_refuse_the_same(hits: dict[str, list[str]], judged: list[tuple[str, str, int]],
                                            data: st.DataObject) -> None:
    query_ids = [query for query, ids in hits.items() for _ in ids]
    ranks = [rank for ids in hits.values() for rank in range(1, len(ids) + 1)]
    candidate_ids = [candidate for ids in hits.values() for candidate in ids]
    if ranks:
        place, fault = data.draw(st.integers(0, len(ranks) - 1)), data.draw(st.sampled_from([None, "q", "r", "c"]))
        query_ids[place] = data.draw(st.sampled_from("pqrs")) if fault == "q" else query_ids[place]
        ranks[place] = data.draw(st.integers(0, 4)) if fault == "r" else ranks[place]
        candidate_ids[place] = data.draw(st.sampled_from(candidate_ids)) if fault == "c" else candidate_ids[place]
    run = pa.table({"query_id": column(data, query_ids), "rank": pa.array(ranks, pa.int32()),
                    "candidate_id": column(data, candidate_ids)})
    qrels = pa.table(list(zip(*judged)) or [()] * 3, names=QRELS.names).cast(QRELS)
    ways = [outcome(run, qrels, pa.array(["q", "p", "r"]), chosen) for chosen in (None, library())]
    assert ways[0] == ways[1]


@needs_compiler
@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_query_may_go_on_but_not_change_where_chunks_meet(kind: pa.DataType) -> None:
    ids, none = pa.array(["a", "b", "c"]), np.zeros(1, np.int64)
    for last, is_sound in (("p", True), ("r", False), ("", False)):
        queries = pa.chunked_array([pa.array(["p", "p"]).cast(kind), pa.array([last]).cast(kind)])
        columns = Columns(library(), ids, ids, queries, np.arange(1, 4, dtype=np.int32))
        assert (columns.matches(np.array([0, 3]), none, none) is not None) == is_sound


@needs_compiler
@pytest.mark.parametrize("is_coded", (False, True))
def test_one_huge_row_and_one_long_identifier(is_coded: bool) -> None:
    run = {"a": [f"9:{number}" for number in range(200_000)], "b": ["long" * 100_000, "9:7"], "c": ["9:8"]}
    rows = [(query, rank, candidate, 0.0) for query, ids in run.items() for rank, candidate in enumerate(ids, start=1)]
    table = pa.table(list(zip(*rows)), names=RUN.names).cast(RUN)
    if is_coded:
        table = table.set_column(2, "candidate_id", table["candidate_id"].dictionary_encode())
    judged = [("a", f"9:{number}", 1) for number in range(0, 400_000, 4)]
    judged += [("b", "long" * 100_000, 2), ("c", "9:7", 1)]
    qrels = pa.table(list(zip(*judged)), names=QRELS.names).cast(QRELS)
    ways = [outcome(table, qrels, pa.array(["a", "b", "c"]), chosen) for chosen in (None, library())]
    assert ways[0] == ways[1] and len(ways[0][0]) == 50_001


@needs_compiler
def test_a_row_of_equal_hashes_is_only_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identifiers, "ODD", 0)
    ids = pa.array([f"9:{number}" for number in range(3000)])
    found = Columns(library(), ids, ids[1000:1010]).matches(np.array([0, 3000]), np.array([2]), np.array([5]))
    assert found is not None and found[0].tolist() == [1002, 1003, 1004, 1005, 1006]


@pytest.fixture
def _loaded_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cache in (native.load, native_build._target):
        cache.cache_clear()
    yield
    for cache in (native.load, native_build._target):
        cache.cache_clear()


@needs_compiler
@pytest.mark.usefixtures("_loaded_anew")
def test_it_is_compiled_when_worth_it_and_used_when_there(tmp_path: Path) -> None:
    assert native.load_for(1e6) is None and not list(tmp_path.rglob("*.so"))
    assert native.load_for(ENOUGH) is not None and list(tmp_path.rglob("native-scoring-*.so"))
    assert native.load_for(1e6) is not None and native.load_for(1e3) is None


@needs_compiler
@pytest.mark.usefixtures("_loaded_anew")
def test_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native_build.VARIABLE, "none")
    assert native.load_for(ENOUGH) is None
    monkeypatch.setenv(native_build.VARIABLE, "avx2")
    assert native.load_for(ENOUGH) is not None, "it needs no vector unit"
    monkeypatch.setenv(native_build.VARIABLE, "avx51")
    with pytest.raises(UserError, match="avx51"):
        native.load_for(ENOUGH)


@pytest.mark.usefixtures("_loaded_anew")
def test_without_a_compiler_numpy_takes_over_and_says_so(monkeypatch: pytest.MonkeyPatch,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.INFO, "pipeline"):
        assert native.load_for(ENOUGH) is None
    assert "scoring: NumPy; a C++ compiler" in caplog.text


@needs_compiler
@pytest.mark.usefixtures("_loaded_anew")
@pytest.mark.parametrize("wrong", [lambda *_: None, lambda *_: (np.zeros(0, np.int64), np.zeros(0, np.int64))])
def test_a_build_that_finds_something_else_is_not_used(wrong: Any, monkeypatch: pytest.MonkeyPatch,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(Columns, "matches", wrong)
    assert native.load_for(ENOUGH) is None
    assert "gives wrong matches" in caplog.text


def test_scoring_does_not_wait_for_torch() -> None:
    code = "import sys\nfrom pipeline.metrics import native\nnative.load_for(1e9)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_source_in_cpp_is_installed() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = {name.strip() for name in setup["options.package_data"]["pipeline"].split(",")}
    assert {str(path.relative_to(ROOT / "pipeline")) for path in (ROOT / "pipeline").rglob("*.cpp")} <= named


def _checked(*selected: str) -> None:
    """These tests, with a kernel that notices bad accesses and undefined behaviour, and Arrow's memory in sight."""
    libraries = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
                 for name in ("libasan.so", "libubsan.so")]
    if not all(os.path.isabs(path) for path in libraries):
        pytest.skip("this compiler has no sanitizers")
    environment = {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0",
                   "ARROW_DEFAULT_MEMORY_POOL": "system",
                   EXTRA_FLAGS: "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]


@needs_compiler
def test_memory_is_used_soundly() -> None:
    _checked("tests/metrics/test_native.py", "-k", "matches or twins or ways or huge or equal")


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_is_used_soundly_in_all_tests() -> None:
    """But for those that call pytrec_eval, which frees with one function what it took with another."""
    _checked("tests/metrics/test_judging.py", "tests/metrics/test_ranking.py", "-k",
             "native and not pytrec_eval and not beyond_float32")
