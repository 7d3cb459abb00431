"""TREC files: others can read what is written, what others write can be read, and mistakes are named."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics.ranking import order_run
from pipeline.report import trec
from pipeline.report.trec import read_trec_qrels, read_trec_run, write_trec_qrels, write_trec_run
from pipeline.support.errors import UserError
from pipeline.tables import QRELS, RUN

untimed = settings(deadline=None, max_examples=40)  # no deadline: the first call pays for imports
words = st.text(st.characters(codec="utf-8", exclude_characters="\t\n\v\f\r \ufeff"), min_size=1, max_size=6)
scores = st.floats(width=32, allow_nan=False)


def table(rows: list[tuple], schema: pa.Schema) -> pa.Table:
    return pa.table(list(zip(*rows)) or [()] * len(schema), names=schema.names).cast(schema)


RUN_ROWS = [("q1", 1, "9:4", 0.25), ("q1", 2, "NA", 1e-7), ("null", 1, 'a"b', -3e38)]
QRELS_ROWS = [("q1", "9:4", 1), ("q1", "NA", 0), ("null", 'a"b', -2)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.txt"


def test_a_run_has_six_columns(path: Path) -> None:
    write_trec_run(table(RUN_ROWS, RUN), path, "mine")
    assert path.read_text() == ("q1 Q0 9:4 1 0.25 mine\nq1 Q0 NA 2 1e-7 mine\n"
                                'null Q0 a"b 1 -3e+38 mine\n')


def test_qrels_have_four_columns(path: Path) -> None:
    write_trec_qrels(table(QRELS_ROWS, QRELS), path)
    assert path.read_text() == 'q1 0 9:4 1\nq1 0 NA 0\nnull 0 a"b -2\n'


@untimed
@given(st.lists(st.tuples(words, st.integers(-2**31, 2**31 - 1), words, scores)))
def test_a_run_survives_the_file(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    path, run = tmp_path_factory.getbasetemp() / "run.txt", table(rows, RUN)
    write_trec_run(run, path, "tag")
    assert read_trec_run(path).equals(run)
    assert read_trec_run(path).schema.equals(RUN)


@untimed
@given(st.lists(st.tuples(words, words, st.integers(-2**31, 2**31 - 1))))
def test_qrels_survive_the_file(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    path, qrels = tmp_path_factory.getbasetemp() / "qrels.txt", table(rows, QRELS)
    write_trec_qrels(qrels, path)
    assert read_trec_qrels(path).equals(qrels)
    assert read_trec_qrels(path).schema.equals(QRELS)


def test_any_float32_score_survives(path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    score_H = bits[np.isfinite(bits)]
    names = ["x"] * len(score_H)
    run = pa.table([names, [1] * len(score_H), names, score_H], names=RUN.names).cast(RUN)
    write_trec_run(run, path, "tag")
    again_H = read_trec_run(path).column("score").to_numpy()
    assert np.array_equal(again_H.view(np.uint32), score_H.view(np.uint32))


def test_blocks_and_slices_change_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = table([(f"q{hit // 7}", hit % 7 + 1, f"c{hit}", float(-hit)) for hit in range(200)], RUN)
    write_trec_run(run, path, "tag")
    whole = path.read_bytes()
    monkeypatch.setattr(trec, "BLOCK_ROWS", 9)
    monkeypatch.setattr(trec, "BLOCK_BYTES", 50)
    file = io.BytesIO()
    write_trec_run(pa.concat_tables([run.slice(0, 31), run.slice(31)]), file, "tag")
    assert file.getvalue() == whole
    assert read_trec_run(path).equals(run)
    sliced = io.BytesIO()
    write_trec_run(run.slice(10, 20), sliced, "tag")
    assert sliced.getvalue() == b"".join(whole.splitlines(keepends=True)[10:30])


def test_any_white_space_parts_columns(path: Path) -> None:
    path.write_bytes(b"\n  q1\tQ0  c1\t 12 \t  2.50\tT\r\n\t\n \nq1 Q0 c2 7 .5e1 T  \n\n q2\t\tQ0 c1 0 -1 T")
    expected = [("q1", 12, "c1", 2.5), ("q1", 7, "c2", 5), ("q2", 0, "c1", -1)]
    assert read_trec_run(path).equals(table(expected, RUN))


@pytest.mark.parametrize("content", [b"", b"\n", b"  \n\t\n "])
def test_an_empty_file_has_no_rows(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert read_trec_run(path).equals(RUN.empty_table())
    assert read_trec_qrels(path).equals(QRELS.empty_table())


def test_the_fifth_column_of_qrels_is_left_out(path: Path) -> None:
    path.write_text("9:1 0 9:100 1 0\n9:1 0 9:101 0 0\n")
    assert read_trec_qrels(path).equals(table([("9:1", "9:100", 1), ("9:1", "9:101", 0)], QRELS))


@pytest.mark.parametrize("line, flaw", [
    ("q Q0 c 1 0.5", "expected 6 columns, got 5"), ("q Q0 c 1 0.5 tag more", "expected 6 columns, got 7"),
    ("q Q0 c one 0.5 tag", "one"), ("q Q0 c 1.0 0.5 tag", "1.0"), ("q Q0 c 1 high tag", "high"),
    ("q Q0 c 1 nan tag", "not a number"), ("q Q0 c 99999999999 1 tag", "99999999999"),
])
@pytest.mark.parametrize("block_bytes", [1 << 24, 40])
def test_a_malformed_run_line_is_named(
        path: Path, monkeypatch: pytest.MonkeyPatch, line: str, flaw: str, block_bytes: int) -> None:
    monkeypatch.setattr(trec, "BLOCK_BYTES", block_bytes)
    good = "q Q0 c 1 0.5 tag\n"
    path.write_text(good * 10 + "\n" + good + line + "\n" + good * 5 + "later flaw\n")
    with pytest.raises(UserError, match=flaw) as refusal:
        read_trec_run(path)
    assert refusal.value.where == f"{path}:13"


@pytest.mark.parametrize("lines, where", [
    ("q 0 c 1\nq 0 c\n", 2), ("q 0 c 1\nq 0 c 1 5\n", 2), ("q 0 c 1 5\n\nq 0 c 1\n", 3), ("q 0 c\n", 1),
    ("q 0 c x\n", 1), ("q 0 c 0.5\n", 1), ("q 0 c 1 5 6\n", 1),
])
def test_a_malformed_qrels_line_is_named(path: Path, lines: str, where: int) -> None:
    path.write_text(lines)
    with pytest.raises(UserError) as refusal:
        read_trec_qrels(path)
    assert refusal.value.where == f"{path}:{where}"


def test_bytes_that_are_not_text_are_named(path: Path) -> None:
    path.write_bytes(b"q 0 c 1\nq 0 \xff 1\n")
    with pytest.raises(UserError) as refusal:
        read_trec_qrels(path)
    assert refusal.value.where == f"{path}:2"


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        read_trec_run(path)
    assert refusal.value.where == str(path)


@pytest.mark.parametrize("word", ["", "a b", "a\tb", "a\n", "\v", "a\rb"])
def test_a_word_that_the_format_cannot_express_is_refused(word: str) -> None:
    for row in [(word, 1, "c", 0.0), ("q", 1, word, 0.0)]:
        with pytest.raises(UserError, match="white space"):
            write_trec_run(table([("q", 1, "d", 0.0), row], RUN), io.BytesIO(), "tag")
    with pytest.raises(UserError, match="white space"):
        write_trec_run(table([], RUN), io.BytesIO(), word)
    with pytest.raises(UserError, match="white space"):
        write_trec_qrels(table([("q", word, 0)], QRELS), io.BytesIO())


def test_pytrec_eval_reads_what_is_written(path: Path) -> None:
    write_trec_run(table(RUN_ROWS, RUN), path, "tag")
    with path.open() as file:
        run = pytrec_eval.parse_run(file)
    assert run == {"q1": {"9:4": 0.25, "NA": 1e-7}, "null": {'a"b': -3e38}}
    write_trec_qrels(table(QRELS_ROWS, QRELS), path)
    with path.open() as file:
        assert pytrec_eval.parse_qrel(file) == {"q1": {"9:4": 1, "NA": 0}, "null": {'a"b': -2}}


# 1.00000005... is just above the middle of two float32; by way of float64, as trec_eval reads it, it is 1.
@pytest.mark.parametrize("high, low", [("0.30000001", "0.3"), ("1.000000059604644775390626", "1")])
def test_scores_that_trec_eval_takes_for_equal_are_a_tie(path: Path, high: str, low: str) -> None:
    path.write_text(f"q Q0 a 1 {high} t\nq Q0 b 2 {low} t\n")
    ordered = order_run(read_trec_run(path), "trec_eval")
    assert ordered.column("candidate_id").to_pylist() == ["b", "a"]
    with path.open() as file:
        run = pytrec_eval.parse_run(file)
    reference = pytrec_eval.RelevanceEvaluator({"q": {"b": 1}}, {"recip_rank"}).evaluate(run)
    assert reference["q"]["recip_rank"] == 1
