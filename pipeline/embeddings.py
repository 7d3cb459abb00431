"""Embedding shards on disk, read back as arrays: one store, or a union of stores that is never a copy.

A shard is a parquet file (ids, vectors, flaws) whose footer repeats the artifact's fingerprint, so that a shard
of another experiment cannot be adopted, and whose pages carry checksums, so that a changed byte is found when it
is read. Vectors are stored as the encoder returned them, not normalised: normalising before storing would change
linear probes, sums and the last digits of golden tables.

Shapes: N rows, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import Artifact, atomic_path
from pipeline.support.ahead import made_ahead
from pipeline.support.errors import UserError
from pipeline.tables import embeddings_schema

_FINGERPRINT = b"plumbline.fingerprint"


class Block(NamedTuple):
    """Consecutive rows of a store or union: the number of the first, their ids and vectors."""

    first_row: int
    ids: pa.Array
    vectors_ND: np.ndarray


class ShardFacts(NamedTuple):
    rows: int
    dimension: int


def write_shard(path: Path, ids: Sequence[str], vectors_ND: np.ndarray, flaws: Sequence[str | None], storage: str,
                fingerprint: str) -> None:
    """Write one shard atomically; UserError naming the id if a vector is not finite or does not fit `storage`."""
    stored_ND = _as_stored(vectors_ND, storage, ids)
    schema = embeddings_schema(vectors_ND.shape[1], storage)
    flat = pa.array(stored_ND.reshape(-1))
    vectors = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("vector").type)
    columns = [pa.array(ids, pa.string()), vectors, pa.array(flaws, schema.field("flaw").type)]
    table = pa.Table.from_arrays(columns, schema=schema)
    write_table(path, table, fingerprint, compression="none", use_dictionary=["flaw"])


def _as_stored(vectors_ND: np.ndarray, storage: str, ids: Sequence[str]) -> np.ndarray:
    _refuse(~np.isfinite(vectors_ND).all(axis=1), ids, "the encoder returned NaN or infinity",
            "check the weights and embed.precision; bf16 has a wider range than fp16")
    with np.errstate(over="ignore"):
        stored_ND = vectors_ND.astype(storage)
    _refuse(~np.isfinite(stored_ND).all(axis=1), ids, f"a vector is too large for {storage}",
            "set embed.storage=float32")
    return stored_ND


def _refuse(bad_N: np.ndarray, ids: Sequence[str], what: str, do: str) -> None:
    if bad_N.any():
        raise UserError(f"{what}: {int(bad_N.sum())} of {len(bad_N)} items", f"first: {ids[int(bad_N.argmax())]}", do)


def write_table(path: Path, table: pa.Table, fingerprint: str, **options: Any) -> None:
    """Write any table of the contract: atomically, with page checksums and the fingerprint in its footer."""
    marked = table.replace_schema_metadata({_FINGERPRINT: fingerprint.encode()})
    with atomic_path(path, first_wins=True) as temporary:
        pq.write_table(marked, temporary, write_page_checksum=True, **options)


def read_table(path: Path, fingerprint: str | None, columns: Sequence[str] | None = None,
               coded: Sequence[str] = ()) -> pa.Table:
    """Read a table; UserError if the file is damaged or belongs to another artifact than `fingerprint`.

    Columns of strings named in `coded` come as dictionaries where the file holds them so, which is read faster.
    """
    try:
        metadata = pq.read_metadata(path)
        dictionaries = [name for name in coded if _is_coded(metadata, name)]
        file = pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True, read_dictionary=dictionaries)
        _check_owner(path, file.metadata.metadata or {}, fingerprint)
        return file.read(columns=list(columns) if columns else None)
    except FileNotFoundError:
        raise UserError("a file of a finished artifact is missing", str(path),
                        f"make it again: rm {path.parent}/manifest.json, then the same command") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"this file is damaged ({str(error).splitlines()[0][:120]})", str(path),
                        f"make it again: rm {path} {path.parent}/manifest.json, then the same command") from error


def _is_coded(metadata: pq.FileMetaData, name: str) -> bool:
    """Plain strings take four bytes each for their lengths alone; they follow a dictionary that grew too long."""
    column = metadata.schema.names.index(name)
    chunks = [metadata.row_group(group).column(column) for group in range(metadata.num_row_groups)]
    return all(chunk.total_uncompressed_size < 4 * chunk.num_values for chunk in chunks)


def _check_owner(path: Path, metadata: dict[bytes, bytes], fingerprint: str | None) -> None:
    owner = metadata.get(_FINGERPRINT, b"?").decode()
    if fingerprint is not None and owner != fingerprint:
        raise UserError(f"this file belongs to artifact {owner}, not to {fingerprint}", str(path),
                        f"it was moved here by hand; delete it and run again: rm {path}")


def shard_facts(path: Path, fingerprint: str) -> ShardFacts:
    """Rows and dimension from the footer alone; UserError as for `read_table`."""
    try:
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"this shard is damaged ({str(error).splitlines()[0][:120]})", str(path),
                        f"delete it and run again: rm {path}") from error
    _check_owner(path, metadata.metadata or {}, fingerprint)
    return ShardFacts(metadata.num_rows, schema.field("vector").type.list_size)


def vectors_of(table: pa.Table) -> np.ndarray:
    """The vector column as an array [N, D] of the stored type, without a copy where the table is one chunk."""
    column = table.column("vector").combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


@dataclass(frozen=True)
class EmbeddingStore:
    """The shards of one complete embed artifact, in order."""

    name: str
    directory: Path
    fingerprint: str
    files: tuple[str, ...]
    rows: int
    dimension: int

    @classmethod
    def of(cls, artifact: Artifact) -> EmbeddingStore:
        manifest = artifact.manifest()
        return cls(artifact.name, artifact.directory, artifact.fingerprint,
                   tuple(entry["file"] for entry in manifest["files"]), manifest["rows"], manifest["dimension"])

    def shard(self, number: int) -> pa.Table:
        return read_table(self.directory / self.files[number], self.fingerprint)

    def blocks(self) -> Iterator[Block]:
        """The store as a stream of shards: few are in memory, read ahead."""
        first_row = 0
        for table in made_ahead(partial(self.shard, number) for number in range(len(self.files))):
            yield Block(first_row, table.column("id").combine_chunks(), vectors_of(table))
            first_row += len(table)

    def ids(self) -> pa.ChunkedArray:
        tables = made_ahead(partial(read_table, self.directory / file, self.fingerprint, ["id"]) for file in self.files)
        return pa.chunked_array([chunk for table in tables for chunk in table.column("id").chunks], pa.string())


@dataclass(frozen=True)
class Union:
    """Several stores searched as one: a list of names, never a copy. Members are in order of their names."""

    members: tuple[EmbeddingStore, ...]

    @classmethod
    def of(cls, members: Sequence[EmbeddingStore]) -> Union:
        dimensions = {member.dimension for member in members}
        if len(dimensions) > 1:
            raise UserError(f"the pools of this union have different dimensions: {sorted(dimensions)}",
                            ", ".join(member.name for member in members), "they must come from one encoder")
        return cls(tuple(sorted(members, key=lambda member: member.name)))

    @property
    def rows(self) -> int:
        return sum(member.rows for member in self.members)

    @property
    def dimension(self) -> int:
        return self.members[0].dimension

    def blocks(self) -> Iterator[Block]:
        first_row = 0
        for member in self.members:
            for block in member.blocks():
                yield block._replace(first_row=first_row + block.first_row)
            first_row += member.rows

    def ids(self) -> pa.ChunkedArray:
        chunks = [chunk for member in self.members for chunk in member.ids().chunks]
        return pa.chunked_array(chunks, pa.string())
