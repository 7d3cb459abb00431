"""The contract between stages: what each table holds, column by column.

| table      | columns                                                                                     |
|------------|---------------------------------------------------------------------------------------------|
| queries    | query_id, text?, image?, modality, instructions [prompts], instructed_texts [one per prompt] |
| candidates | candidate_id, text?, image?, modality                                                       |
| qrels      | query_id, candidate_id, relevance (0 is "judged, not relevant" and is kept)                  |
| embeddings | id, vector (float16 or float32, as the encoder returned it), flaw? (null = sound)            |
| run        | query_id, rank (from 1), candidate_id, score                                                |
| per_query  | query_id, one float32 column per metric                                                     |
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MODALITIES = ("text", "image", "image,text")

_CATEGORY = pa.dictionary(pa.int8(), pa.string())


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


QUERIES = pa.schema([
    _required("query_id", pa.string()), pa.field("text", pa.string()), pa.field("image", pa.string()),
    _required("modality", _CATEGORY), _required("instructions", pa.list_(pa.string())),
    _required("instructed_texts", pa.list_(pa.string())),
])
CANDIDATES = pa.schema([
    _required("candidate_id", pa.string()), pa.field("text", pa.string()), pa.field("image", pa.string()),
    _required("modality", _CATEGORY),
])
QRELS = pa.schema([
    _required("query_id", pa.string()), _required("candidate_id", pa.string()), _required("relevance", pa.int32()),
])
RUN = pa.schema([
    _required("query_id", pa.string()), _required("rank", pa.int32()), _required("candidate_id", pa.string()),
    _required("score", pa.float32()),
])


class Query(NamedTuple):
    query_id: str
    text: str | None
    image: str | None
    modality: str
    instructions: list[str]
    instructed_texts: list[str]


class Candidate(NamedTuple):
    candidate_id: str
    text: str | None
    image: str | None
    modality: str


class Qrel(NamedTuple):
    query_id: str
    candidate_id: str
    relevance: int


def embeddings_schema(dimension: int, storage: str) -> pa.Schema:
    """Schema of an embedding shard; `storage` is "float16" or "float32"."""
    vector = pa.list_(_required("item", pa.from_numpy_dtype(np.dtype(storage))), dimension)
    return pa.schema([_required("id", pa.string()), _required("vector", vector), pa.field("flaw", _CATEGORY)])


def per_query_schema(metrics: Iterable[str]) -> pa.Schema:
    return pa.schema([_required("query_id", pa.string())] + [_required(name, pa.float32()) for name in metrics])


def table_of(rows: list[Any], schema: pa.Schema) -> pa.Table:
    """Rows (named tuples in the schema's column order) as one Arrow table."""
    columns = list(zip(*rows)) if rows else [()] * len(schema)
    return pa.Table.from_arrays(
        [pa.array(column, type=field.type) for column, field in zip(columns, schema)], schema=schema)


def digest(table: pa.Table) -> str:
    """sha256 over the logical content of a table of strings, lists of strings and numbers.

    It does not depend on chunking, on dictionary order or on the version of the file format, so a newer
    library that writes the same rows into other bytes leaves everything downstream in place.
    """
    total = sha256()
    for field, column in zip(table.schema, table.columns):
        total.update(f"{field.name}:{len(column)};".encode())
        _digest_column(total, column.unify_dictionaries().combine_chunks())
    return total.hexdigest()


def _digest_column(total: Any, array: pa.Array) -> None:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_list(array.type):
        total.update(_lengths(pc.list_value_length(array)))
        array = array.flatten()
    if pa.types.is_string(array.type):
        total.update(_lengths(pc.binary_length(array)))
        total.update(_bytes_of(array.drop_null()))
    else:
        total.update(array.to_numpy(zero_copy_only=False).tobytes())


def _bytes_of(strings: pa.StringArray) -> bytes:
    """All bytes of an array of strings without nulls, one after the other."""
    if not len(strings):
        return b""
    _, offsets, data = strings.buffers()
    bounds = np.frombuffer(offsets, np.int32)[strings.offset:strings.offset + len(strings) + 1]
    return data[int(bounds[0]):int(bounds[-1])].to_pybytes() if data is not None else b""


def _lengths(lengths: pa.Array) -> bytes:
    """Lengths as int64 bytes; -1 tells a null from an empty value."""
    return pc.fill_null(lengths.cast(pa.int64()), -1).to_numpy(zero_copy_only=False).tobytes()
