"""The compiled way to look at a run's hits: native.cpp, built on first use where there is a compiler.

It finds what identifiers.py and matching.py find, at a quarter of their cost, in one pass over the strings where they
lie. A run that has a fault is left to those: they say what is wrong with it.

Shapes: C chunks, F fields of a chunk, D strings of a dictionary, S rows, H hits, M matches.
"""

from __future__ import annotations

import logging
import sys
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from pipeline.metrics import identifiers
from pipeline.metrics.identifiers import exact_numbers
from pipeline.metrics.matching import Part, twins
from pipeline.metrics.order import strings
from pipeline.support.native_build import OPTIONS, Library, Source, allowed_units

log = logging.getLogger("pipeline")

SOURCE = Source(Path(__file__).with_name("native.cpp"), "scoring", "NumPy")
LABEL = "scoring"
_WORTH_LOADING, _WORTH_COMPILING = 1e5, 2e6  # hits: compiling takes a second, which later runs need not spend
_SIGNATURES = {"hashes": "pnup", "match": "ppppnpppupp"}
_FAULT, _FIELDS = -1, 7

Ids: TypeAlias = "pa.Array | pa.ChunkedArray"


class Native(Library):
    """The functions of native.cpp, as it describes them."""

    def __init__(self, path: Path):
        super().__init__(path, _SIGNATURES)


def load_for(num_hits: float) -> Native | None:
    """The library, where this many hits are worth it; None, with the reason logged, where it cannot be had."""
    if num_hits < _WORTH_LOADING or sys.byteorder != "little" or not allowed_units():
        return None
    return load() if num_hits >= _WORTH_COMPILING or SOURCE.is_built(LABEL, OPTIONS) else None


@lru_cache(maxsize=1)
def load() -> Native | None:
    library = SOURCE.loaded(LABEL, OPTIONS, Native)
    if library is None or not _is_sound(library):
        return None
    log.info("scoring: native kernel")
    return library


def _is_sound(library: Native) -> bool:
    """Whether this build finds here what NumPy finds: compilers are trusted only after a look."""
    random = np.random.default_rng(0)
    place_SK, place_SR = (np.argsort(random.random((50, 120)), axis=1)[:, :width] for width in (40, 9))
    ids, judged = (pa.array(["9:" * (place % 5) + str(place) for place in place_SN.ravel().tolist()])
                   for place_SN in (place_SK, place_SR))
    edge_S, first_S, count_S, rank_H = np.arange(51) * 40, np.arange(50) * 9, np.full(50, 9), np.arange(2000) % 40 + 1
    number_N = exact_numbers(pa.concat_arrays([ids, judged]))
    left_T, right_T = twins([Part(number_N[:2000], np.diff(edge_S)), Part(number_N[2000:], count_S)])
    order_T = np.argsort(left_T)
    queries = pa.array(np.arange(2000) // 40).cast(pa.string()).dictionary_encode()
    columns = Columns(library, ids, judged, queries, rank_H)
    found = columns.matches(edge_S, first_S, count_S)
    is_sound = (found is not None and np.array_equal(found[0], left_T[order_T])
                and np.array_equal(found[1], right_T[order_T] - 2000)
                and columns.matches(edge_S[:2] + 20, first_S[:1], count_S[:1]) is None  # two halves of rows
                and has_twins(library, pa.array(["b", "b", "c", "b"]), np.array([1, 3])))
    if not is_sound:
        SOURCE.done_without("the native kernel gives wrong matches here")
    return is_sound


class Columns:
    """Identifiers of hits and of judged candidates, to be matched row by row; with `order`, the order is checked."""

    def __init__(self, library: Native, candidates: Ids, judged: pa.Array, queries: Ids | None = None,
                 rank_H: np.ndarray | None = None):
        self._library, self._kept = library, [candidates, judged, queries, rank_H]
        self._candidate_CF, self._judged_CF = self._chunks(candidates), self._chunks(judged)
        self._query_CF = None if queries is None else self._chunks(queries)
        self._rank_H = None if rank_H is None else np.ascontiguousarray(rank_H, np.int32)

    def matches(self, edge_S: np.ndarray, first_S: np.ndarray,
                count_S: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """(hit, judged candidate) of each match, int64 [M], in order of the hits, which count from the column's start.

        Row i has the hits from edge_S[i] to the next edge, and is searched for count_S[i] judged candidates from
        first_S[i] on. None: a candidate stands in its row twice, or the row has not one query and ranks 1, 2, 3, ...
        (or at least several codes for this query).
        """
        edge_S, first_S, count_S = (np.ascontiguousarray(array, np.int64) for array in (edge_S, first_S, count_S))
        hit_M, judged_M = np.empty((2, int(count_S.sum())), np.int64)
        count = self._library("match", self._candidate_CF, self._query_CF, self._rank_H, edge_S, len(count_S),
                              self._judged_CF, first_S, count_S, identifiers.ODD, hit_M, judged_M)
        return None if count == _FAULT else (hit_M[:count], judged_M[:count])

    def _chunks(self, ids: Ids) -> np.ndarray:
        """int64 [C, F]: where things are in memory, as native.cpp wants to know it. Plain strings are not copied."""
        assert not ids.null_count, "identifiers are never null"
        chunks = [chunk for chunk in (ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]) if len(chunk)]
        chunk_CF = np.zeros((len(chunks), _FIELDS), np.int64)
        for number, chunk in enumerate(chunks):
            is_coded = isinstance(chunk, pa.DictionaryArray)
            values = strings(chunk.dictionary if is_coded else chunk)
            chunk_CF[number, :4] = len(chunk) + (chunk_CF[number - 1, 0] if number else 0), *_strings_at(values)
            chunk_CF[number, 4:6] = _codes_at(chunk.indices) if is_coded else 0
            self._kept.append(values)
            if is_coded and len(values) <= len(chunk):  # or else it is quicker to hash what is met
                hash_D = np.empty(len(values), np.uint64)
                self._library("hashes", chunk_CF[number], len(values), identifiers.ODD, hash_D)
                chunk_CF[number, 6] = hash_D.ctypes.data
                self._kept.append(hash_D)
        return chunk_CF


def _strings_at(values: pa.StringArray) -> tuple[int, int, int]:
    """Addresses of the offsets and of the bytes, and how many bytes there are."""
    _, offsets, data = values.buffers()
    return offsets.address + 4 * values.offset, data.address if data else 0, data.size if data else 0


def _codes_at(indices: pa.Array) -> tuple[int, int]:
    """Address and width of the codes."""
    width = indices.type.bit_width // 8
    return indices.buffers()[1].address + width * indices.offset, width


def has_twins(library: Native, ids: pa.Array, count_S: np.ndarray) -> bool:
    """Whether one of the rows, which have count_S[i] identifiers each, has one of them twice."""
    none_S = np.zeros(len(count_S), np.int64)
    return Columns(library, ids, ids[:0]).matches(np.append(0, np.cumsum(count_S)), none_S, none_S) is None
