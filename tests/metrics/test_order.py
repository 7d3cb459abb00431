"""Where a column changes and where its values stand, against a look at every value."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics.order import changes, positions

untimed = settings(deadline=None, max_examples=100)
few = st.one_of(st.lists(st.sampled_from(["", "a", "b", "ab", "\u00e9"]), max_size=12),
                st.lists(st.sampled_from(["aa", "ab", "ba"]), max_size=12))
kinds = st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int16(), pa.string())])


@untimed
@given(few, st.integers(0, 3), st.integers(0, 12), kinds)
def test_changes_are_where_a_value_differs_from_the_one_before(
        values: list[str], skipped: int, cut: int, kind: pa.DataType) -> None:
    array = pa.array(values, pa.string()).cast(kind)[skipped:]
    expected = [number for number in range(1, len(array)) if array[number].as_py() != array[number - 1].as_py()]
    assert changes(array).tolist() == expected
    assert changes(pa.chunked_array([array[:cut], array[cut:]])).tolist() == expected


@untimed
@given(few, st.lists(st.sampled_from(["b", "aa", "", "ba", "x", "ab", "a"]), unique=True), kinds, st.booleans())
def test_positions_are_those_of_the_same_strings(values: list[str], among: list[str], kind: pa.DataType,
                                                 is_stretch: bool) -> None:
    values = [value for value in among[1:4] for _ in range(2)] if is_stretch else values
    expected = [among.index(value) if value in among else -1 for value in values]
    found = positions(pa.array(values, pa.string()).cast(kind), pa.array(among, pa.string()))
    assert found.tolist() == expected
    assert positions(pa.array(values, pa.string()), pa.chunked_array([among[:2], among[2:]], pa.string())).tolist() == (
        expected)
