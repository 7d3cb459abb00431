"""Embedding shards: bits survive, owners are checked, damage is named, unions are streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline import artifacts
from pipeline.artifacts import Artifact, Identity, shard_file
from pipeline.embeddings import EmbeddingStore, Union, read_table, shard_facts, vectors_of, write_shard
from pipeline.support.errors import UserError

RANDOM = np.random.default_rng(0)


@dataclass(frozen=True)
class Params(artifacts.Params):
    name: str


def make_store(root: Path, name: str, vectors_ND: np.ndarray, rows_per_shard: int, storage: str = "float32",
               ids: Sequence[str] | None = None) -> Artifact:
    """A complete embed artifact; its ids are name:0, name:1 ... unless others are given."""
    artifact = Artifact(root, name, Identity("embed", 1, Params(name), {}))
    ids = ids or [f"{name}:{row}" for row in range(len(vectors_ND))]
    for number, start in enumerate(range(0, len(vectors_ND), rows_per_shard)):
        part = slice(start, start + rows_per_shard)
        write_shard(artifact.path(shard_file("embeddings", number)), ids[part], vectors_ND[part],
                    [None] * len(ids[part]), storage, artifact.fingerprint)
    artifact.seal({"rows": len(vectors_ND), "dimension": vectors_ND.shape[1]})
    return artifact


@given(arrays.arrays(np.float16, st.tuples(st.integers(1, 9), st.integers(1, 7)),
                     elements=st.floats(allow_nan=False, allow_infinity=False, width=16)))
def test_float16_survives_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, vectors_ND: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.parquet"
    ids = [str(row) for row in range(len(vectors_ND))]
    write_shard(path, ids, vectors_ND.astype(np.float32), [None] * len(ids), "float16", "f")
    back_ND = vectors_of(read_table(path, "f"))
    assert back_ND.dtype == np.float16 and np.array_equal(back_ND.view(np.uint16), vectors_ND.view(np.uint16))


def test_flaws_come_back(tmp_path: Path) -> None:
    flaws = [None, "missing_image", None]
    write_shard(tmp_path / "x", ["a", "b", "c"], np.ones((3, 2), np.float32), flaws, "float32", "f")
    assert read_table(tmp_path / "x", "f")["flaw"].to_pylist() == flaws


@pytest.mark.parametrize("value, storage, words", [
    (np.nan, "float32", "NaN"), (np.inf, "float32", "NaN"), (1e5, "float16", "too large")])
def test_what_cannot_be_stored_is_refused_with_its_id(tmp_path: Path, value: float, storage: str, words: str) -> None:
    vectors_ND = np.ones((3, 4), np.float32)
    vectors_ND[1, 2] = value
    with pytest.raises(UserError, match=f"(?s){words}.*item-1"):
        write_shard(tmp_path / "x", ["item-0", "item-1", "item-2"], vectors_ND, [None] * 3, storage, "f")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_another_artifact_is_not_adopted(tmp_path: Path) -> None:
    write_shard(tmp_path / "x", ["a"], np.ones((1, 2), np.float32), [None], "float32", "mine")
    for read in (read_table, shard_facts):
        with pytest.raises(UserError, match="belongs to artifact mine"):
            read(tmp_path / "x", "yours")


def test_truncation_and_every_changed_byte_of_the_vectors_are_found(tmp_path: Path) -> None:
    path, vectors_ND = tmp_path / "x", RANDOM.standard_normal((50, 16)).astype(np.float32)
    write_shard(path, [str(row) for row in range(50)], vectors_ND, [None] * 50, "float32", "f")
    whole = path.read_bytes()
    at = whole.index(vectors_ND[25].tobytes())
    for broken in (whole[:-100], whole[:len(whole) // 2], b"", whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=f"(?s)damaged.*rm {path}"):
            read_table(path, "f")


def test_a_store_streams_its_shards_in_order(tmp_path: Path) -> None:
    vectors_ND = RANDOM.standard_normal((23, 5)).astype(np.float32)
    store = EmbeddingStore.of(make_store(tmp_path, "pool", vectors_ND, 10))
    blocks = list(store.blocks())
    assert [block.first_row for block in blocks] == [0, 10, 20]
    assert np.array_equal(np.concatenate([block.vectors_ND for block in blocks]), vectors_ND)
    assert store.ids().to_pylist() == [f"pool:{row}" for row in range(23)]


def test_a_union_is_its_members_in_order_of_name(tmp_path: Path) -> None:
    parts = {name: RANDOM.standard_normal((rows, 4)).astype(np.float32)
             for name, rows in (("b", 7), ("a", 12), ("c", 1))}
    stores = [EmbeddingStore.of(make_store(tmp_path, name, vectors, 5)) for name, vectors in parts.items()]
    for order in (stores, stores[::-1]):
        union = Union.of(order)
        vectors_ND = np.concatenate([block.vectors_ND for block in union.blocks()])
        assert np.array_equal(vectors_ND, np.concatenate([parts[name] for name in "abc"]))
        assert [block.first_row for block in union.blocks()] == [0, 5, 10, 12, 17, 19]
        assert union.rows == 20 and union.ids()[12].as_py() == "b:0"


def test_members_of_different_dimension_are_refused(tmp_path: Path) -> None:
    stores = [EmbeddingStore.of(make_store(tmp_path, name, np.ones((2, dimension), np.float32), 5))
              for name, dimension in (("a", 3), ("b", 4))]
    with pytest.raises(UserError, match="different dimensions"):
        Union.of(stores)
