"""Numbers of identifiers: equal for equal strings in any array, and different for all but a few others."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import identifiers
from pipeline.metrics.identifiers import ONE, Numbered, exact_numbers, hashes

untimed = settings(deadline=None, max_examples=60)
texts = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(["", "a", "a\0", "9:1", "x" * 300])), max_size=12)


def column(strings: list[str], cuts: list[int], is_coded: list[bool]) -> pa.ChunkedArray:
    """The strings in chunks, some of them empty, each with a dictionary of its own or all plain."""
    edges = [0, *sorted(min(cut, len(strings)) for cut in cuts), len(strings)]
    chunks = [pa.array(strings[first:last], pa.string()) for first, last in zip(edges, edges[1:])]
    kind = pa.dictionary(pa.int32(), pa.string()) if is_coded[0] else pa.string()
    return pa.chunked_array([chunk.cast(kind) for chunk in chunks], kind)


@untimed
@given(texts)
def test_a_hash_depends_on_the_string_alone(strings: list[str]) -> None:
    together = hashes(pa.array(strings, pa.string()))
    assert together.dtype == np.uint64 and (together % ONE == 0).all()
    assert together.tolist() == [hashes(pa.array([string])).item() for string in strings]
    assert together[1:].tolist() == hashes(pa.array(strings, pa.string())[1:]).tolist()


@untimed
@given(texts)
def test_exact_numbers_are_equal_for_equal_strings_only(strings: list[str]) -> None:
    number_N = exact_numbers(pa.array(strings, pa.string()))
    assert (number_N % ONE == 0).all()
    assert (number_N[:, None] == number_N).tolist() == [[one == other for other in strings] for one in strings]


@untimed
@given(texts, st.lists(st.integers(0, 12), max_size=4), st.lists(st.booleans(), min_size=1, max_size=1), st.data())
def test_stretches_of_any_column_are_those_of_the_plain_strings(
        strings: list[str], cuts: list[int], is_coded: list[bool], data: st.DataObject) -> None:
    numbered, plain = Numbered(column(strings, cuts, is_coded)), pa.array(strings, pa.string())
    first = data.draw(st.integers(0, len(strings)))
    length = data.draw(st.integers(0, len(strings) - first))
    some = data.draw(st.lists(st.integers(0, length - 1))) if length else []
    if length:
        assert numbered.hashes(first, length).tolist() == hashes(plain).tolist()[first:first + length]
    assert numbered.strings(first, length).to_pylist() == strings[first:first + length]
    chosen = numbered.strings(first, length, np.array(some, np.int64))
    assert chosen.to_pylist() == [strings[first + number] for number in some]


def test_a_dictionary_longer_than_its_chunk_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def noting(ids: pa.Array) -> np.ndarray:
        hashed.append(len(ids))
        return hashes(ids)

    monkeypatch.setattr(identifiers, "hashes", noting)
    dictionary = pa.array([f"c{number}" for number in range(1000)])
    chunks = [pa.DictionaryArray.from_arrays(pa.array([first, first + 1], pa.int32()), dictionary)
              for first in range(0, 10, 2)]
    numbered = Numbered(pa.chunked_array(chunks))
    assert hashed == [] and numbered.hashes(1, 3).tolist() == hashes(dictionary)[1:4].tolist()


@pytest.mark.parametrize("form", ["{}", "9:{}", "{:012d}", "pool:{}:image.jpg", "prefix of some length {}"])
def test_close_identifiers_fall_far_apart(form: str) -> None:
    """Of 200,000 hashes of 40 bits, 0.02 pairs are equal by chance."""
    ids = pa.array([form.format(number) for number in range(200_000)])
    assert len(np.unique(hashes(ids))) > 199_990


def test_one_long_identifier_does_not_widen_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    strings = [f"c{number}" for number in range(5000)]
    strings[1234] = "long" * 10_000
    padded: list[int] = []
    rpad = identifiers.pc.ascii_rpad

    def noting(ids: pa.Array, width: int, padding: str) -> pa.Array:
        padded.append(len(ids) * width)
        return rpad(ids, width, padding)

    monkeypatch.setattr(identifiers.pc, "ascii_rpad", noting)
    together = hashes(pa.array(strings))
    assert sum(padded) < 500_000
    assert together[[0, 1234, 4999]].tolist() == [
        hashes(pa.array([strings[number]])).item() for number in (0, 1234, 4999)]
