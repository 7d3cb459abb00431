"""Schemas and the digest of a table's content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tables import CANDIDATES, QRELS, QUERIES, Candidate, Qrel, Query, digest, table_of

TEXT = st.none() | st.text(max_size=8)
TEXTS = st.lists(st.text(max_size=3), max_size=3)
MODALITIES = st.sampled_from(["text", "image", "image,text"])
ROWS = st.lists(st.builds(Candidate, st.text(max_size=4), TEXT, TEXT, MODALITIES), max_size=12)
QUERY_ROWS = st.lists(st.builds(Query, st.text(max_size=4), TEXT, TEXT, st.just("text"), TEXTS, TEXTS), max_size=8)


@given(ROWS, ROWS)
def test_digest_is_equal_exactly_for_equal_rows(first: list[Candidate], second: list[Candidate]) -> None:
    assert (digest(table_of(first, CANDIDATES)) == digest(table_of(second, CANDIDATES))) == (first == second)


@given(QUERY_ROWS, QUERY_ROWS)
def test_digest_sees_into_lists(first: list[Query], second: list[Query]) -> None:
    assert (digest(table_of(first, QUERIES)) == digest(table_of(second, QUERIES))) == (first == second)


@given(ROWS, st.integers(0, 12))
def test_digest_ignores_chunks_slices_and_dictionary_order(rows: list[Candidate], cut: int) -> None:
    whole = table_of(rows, CANDIDATES)
    parts = [table_of(part, CANDIDATES) for part in (rows[:cut], rows[cut:])]
    assert digest(pa.concat_tables(parts)) == digest(whole)
    shifted = pa.concat_tables([table_of([Candidate("before", "x", None, "image"), *rows], CANDIDATES)]).slice(1)
    assert digest(shifted) == digest(whole)


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"use_dictionary": False, "row_group_size": 1}])
def test_digest_survives_the_file_format(tmp_path: Path, options: dict[str, Any]) -> None:
    table = table_of([Candidate("1:1", None, "a.jpg", "image"), Candidate("1:2", "", None, "text")], CANDIDATES)
    pq.write_table(table, tmp_path / "table.parquet", **options)
    assert digest(pq.read_table(tmp_path / "table.parquet")) == digest(table)


def test_a_zero_grade_is_kept_and_an_empty_table_has_its_schema() -> None:
    assert table_of([Qrel("1", "2", 0)], QRELS)["relevance"].to_pylist() == [0]
    assert len(table_of([], QUERIES)) == 0 and table_of([], QUERIES).schema == QUERIES


def test_a_required_column_refuses_null() -> None:
    with pytest.raises(pa.ArrowInvalid):
        table = table_of([Candidate("1:1", None, None, None)], CANDIDATES)  # type: ignore[arg-type]
        pq.write_table(table, pa.BufferOutputStream())
