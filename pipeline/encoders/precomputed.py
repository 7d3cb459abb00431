"""Vectors that were made elsewhere, found by the ids of queries and candidates: bring your own embeddings.

They come as parquet files (a column of ids, a column of vectors) or as one .npy array with a file of ids. Promises:
every item gets the vector of its own id or the run ends with the id's name; an id that stands twice is refused; no
image is opened. The trade: parquet is unpacked once per worker into a temporary file, because rows are wanted in any
order; .npy is read where it lies.
"""

# Shapes: N rows of a table, B items, D dimensions.

from __future__ import annotations

import glob
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.encoders import Item
from pipeline.encoders.checkpoints import find_file, weights_hash
from pipeline.support.errors import UserError, nearest

_ROWS = 8192  # unpacked at a time
_ROLES = ("query", "candidate")


@dataclass(frozen=True)
class Params:
    """All that may change the vectors.

    queries:       vectors of the queries: a parquet file, a pattern of such files ("out/queries-*.parquet"), or a .npy
    candidates:    the same for the candidates; apart, because a query and a candidate may have the same id
    query_ids:     with a .npy only: a text file with one id per line, in the order of its rows
    candidate_ids: the same for the candidates
    id_column:     with parquet only: the column of ids (strings or whole numbers)
    vector_column: with parquet only: the column of vectors (lists of one length; float16, float32 or float64)
    """

    queries: str
    candidates: str
    query_ids: str | None = None
    candidate_ids: str | None = None
    id_column: str = "id"
    vector_column: str = "vector"


class _Given(NamedTuple):
    """The files of one role, and the file of ids if they are an array."""

    files: list[Path]
    ids: Path | None


def identity(params: Params) -> dict[str, Any]:
    """What the fingerprint sees: the content of the files, and the columns that are read. No torch."""
    found = {}
    for role in _ROLES:
        files, ids = _given(params, role)
        how = [params.id_column, params.vector_column] if ids is None else weights_hash(ids)
        found[role] = {"vectors": sorted(map(weights_hash, files)), "ids": how}  # in any order: ids tell rows apart
    return found


def build(params: Params, device: str, precision: str) -> Precomputed:
    """The vectors, ready to be looked up; device and precision change nothing."""
    tables = {}
    for role in _ROLES:
        given = _given(params, role)
        ids, vectors_ND = _from_array(given) if given.ids else _from_parquet(given.files, params)
        tables[role] = VectorsById(ids, vectors_ND, role, str(given.files[0]))
    query, candidate = (tables[role] for role in _ROLES)
    if query.dimension != candidate.dimension:
        raise UserError(f"queries have {query.dimension} dimensions, candidates {candidate.dimension}", query.where,
                        "both must come from the same model")
    return Precomputed(query, candidate)


class Precomputed:
    """The vector of an item is that of its id, among the queries or among the candidates."""

    modalities = frozenset({"text", "image", "image,text"})
    needs_ids = True
    uses_device = False

    def __init__(self, queries: VectorsById, candidates: VectorsById):
        self._tables = {"query": queries, "candidate": candidates}
        self.dimension = queries.dimension

    def prepare(self, item: Item) -> tuple[str, str | None]:
        """The item's role and id."""
        return item.role, item.id

    def encode(self, batch: Sequence[tuple[str, str | None]]) -> np.ndarray:
        """float32 [B, D], one row per prepared item in order, as it was given; UserError naming an id without one."""
        found = [np.zeros((0, self.dimension), np.float32)]
        found += [self._tables[role].vector(name)[None] for role, name in batch]
        return np.concatenate(found)


class VectorsById:
    """Rows of an array, each under an id; `where` names the files in messages.

    Ids stay in Arrow's memory, sorted by their bytes: millions of Python's strings would take gigabytes.
    """

    def __init__(self, ids: pa.Array, vectors_ND: np.ndarray, role: str, where: str):
        self._role, self.where = role, where
        self._vectors_ND, self.dimension = vectors_ND, int(vectors_ND.shape[1])
        order = pc.sort_indices(ids)
        self._ids, self._rows_N = ids.take(order), order.to_numpy()
        repeated = pc.equal(self._ids[1:], self._ids[:-1])
        if count := pc.sum(repeated).as_py():
            first = self._ids[pc.index(repeated, True).as_py()].as_py()
            raise UserError(f"{role} id '{first}' stands more than once ({count} rows too many)", where,
                            "leave one row per id")

    def vector(self, name: str | None) -> np.ndarray:
        """float32 [D]; UserError if no row has this id."""
        if name is None:
            raise UserError("precomputed vectors are found by ids, and this item has none", self.where,
                            "use them where a benchmark is embedded")
        place = bisect_left(range(len(self._ids)), name, key=lambda number: self._ids[number].as_py())
        if place == len(self._ids) or self._ids[place].as_py() != name:
            raise UserError(f"there is no vector for {self._role} '{name}'", self.where,
                            f"its {len(self._ids)} ids are like '{self._ids[0].as_py()}': add the missing rows")
        return np.asarray(self._vectors_ND[self._rows_N[place]], np.float32)


def _given(params: Params, role: str) -> _Given:
    """The files of a role; UserError if there are none, or not what they must be."""
    option, pattern, ids = (("queries", params.queries, params.query_ids) if role == "query"
                            else ("candidates", params.candidates, params.candidate_ids))
    matching = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    files = [Path(name) for name in matching if Path(name).is_file()]
    if not files or Path(pattern).expanduser().is_file():
        files = [find_file(pattern, f"the file of `{option}`")]
    is_array = files[0].suffix == ".npy"
    if is_array and len(files) > 1:
        raise UserError(f"`{option}` is {len(files)} arrays", pattern, "name one .npy file, or parquet files")
    if is_array and ids is None:
        raise UserError(f"`{option}` is an array, which holds no ids", pattern,
                        f"{role}_ids: <a text file with one id per line>")
    if not is_array and ids is not None:
        raise UserError(f"`{role}_ids` goes with a .npy file", pattern, "remove it: parquet holds its own ids")
    return _Given(files, find_file(ids, f"the file of `{role}_ids`") if ids is not None else None)


def _from_array(given: _Given) -> tuple[pa.Array, np.ndarray]:
    path, ids = given.files[0], _lines(given.ids)
    with _whole(path, ".npy array"):
        vectors_ND = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    if vectors_ND.ndim != 2 or vectors_ND.dtype.kind != "f" or not vectors_ND.size:
        raise UserError(f"the array is {vectors_ND.dtype} of shape {vectors_ND.shape}", str(path),
                        "it must hold floating-point numbers, one row per id")
    if len(ids) != len(vectors_ND):
        raise UserError(f"{len(vectors_ND)} vectors and {len(ids)} ids", str(given.ids), "write one id per line")
    return ids, vectors_ND


def _lines(path: Path | None) -> pa.Array:
    assert path is not None
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise UserError("not a text file in UTF-8", str(path), "write one id per line") from None
    return pa.array(lines, pa.large_string())


def _from_parquet(files: Sequence[Path], params: Params) -> tuple[pa.Array, np.ndarray]:
    """All ids in order, and their vectors in a file without a name, which goes when the process ends."""
    dtype, ids, dimension = _stored_type(files, params), [], 0
    with tempfile.TemporaryFile() as unpacked:
        for path in files:
            for some_ids, vectors_ND in _blocks(path, params):
                dimension = dimension or vectors_ND.shape[1]
                if vectors_ND.shape[1] != dimension:
                    raise UserError(f"{vectors_ND.shape[1]} dimensions after rows of {dimension}", str(path),
                                    "all vectors must come from the same model")
                _write(unpacked, vectors_ND.astype(dtype))
                ids.append(some_ids)
        if not dimension:
            raise UserError("these files hold no vectors", str(files[0]), "name files with rows")
        unpacked.flush()
        names = pa.concat_arrays(ids)
        return names, np.memmap(unpacked, dtype, "r", shape=(len(names), dimension))


def _write(unpacked: Any, vectors_ND: np.ndarray) -> None:
    try:
        unpacked.write(vectors_ND.tobytes())
    except OSError as error:
        raise UserError(f"no room to unpack the vectors: {error.strerror}", tempfile.gettempdir(),
                        "set TMPDIR to a directory with more, or bring them as a .npy file") from error


def _stored_type(files: Sequence[Path], params: Params) -> type[np.floating[Any]]:
    """float16 if all files hold that, or else float32; UserError for a file that lacks a column."""
    narrow = []
    for path in files:
        with _whole(path):
            kinds = {field.name: field.type for field in pq.read_schema(path)}
        for name in (params.id_column, params.vector_column):
            if name not in kinds:
                advice = [nearest(name, kinds), f"all: {', '.join(kinds)} (options id_column and vector_column)"]
                raise UserError(f"there is no column '{name}'", str(path), "\n".join(filter(None, advice)))
        kind = kinds[params.vector_column]
        if not hasattr(kind, "value_type") or not pa.types.is_floating(kind.value_type):
            raise UserError(f"column '{params.vector_column}' holds {kind}, not vectors", str(path),
                            "write lists of floating-point numbers")
        narrow.append(pa.types.is_float16(kind.value_type))
    return np.float16 if all(narrow) else np.float32


def _blocks(path: Path, params: Params) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """Ids and vectors of some rows at a time; UserError for a missing id, vector or number, or uneven lengths."""
    columns = [params.id_column, params.vector_column]
    for rows in _batches(path, columns):
        ids, vectors = (rows.column(name) for name in columns)
        lengths, numbers = pc.unique(pc.list_value_length(vectors)), vectors.flatten()
        if ids.null_count or vectors.null_count or numbers.null_count:
            raise UserError("an id, a vector or a number in one is missing (null)", str(path), "leave such rows out")
        if len(lengths) != 1:
            raise UserError(f"the vectors have {len(lengths)} different lengths", str(path), "write one length")
        if pa.types.is_dictionary(ids.type):
            ids = ids.dictionary_decode()
        yield ids.cast(pa.large_string()), numbers.to_numpy(zero_copy_only=False).reshape(len(ids), -1)


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with _whole(path):
        yield from pq.ParquetFile(path, page_checksum_verification=True).iter_batches(_ROWS, columns=columns)


@contextmanager
def _whole(path: Path, kind: str = "parquet file") -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, EOFError) as error:  # Arrow's own are among these
        raise UserError(f"not a whole {kind}: {str(error).splitlines()[0][:120]}", str(path),
                        "copy or write it again, as plain numbers") from error
