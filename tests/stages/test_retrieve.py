"""Runs equal brute force over stored vectors; unions equal one concatenated pool; approximations say by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifacts import Artifact, Identity
from pipeline.embeddings import EmbeddingStore, read_table, vectors_of
from pipeline.stages import index, retrieve
from pipeline.support.errors import UserError
from tests.runs import run_table
from tests.test_embeddings import make_store

RANDOM = np.random.default_rng(3)
POOLS = {name: RANDOM.standard_normal((rows, 16)).astype(np.float16).astype(np.float32)
         for name, rows in (("b", 40), ("a", 61), ("c", 1))}
POOLS["b"][7] = POOLS["a"][3]  # the same content under two ids: ties
POOLS["a"][50] = POOLS["a"][3]
QUERIES = RANDOM.standard_normal((30, 16)).astype(np.float16).astype(np.float32)
QUERIES[5] = POOLS["a"][3]
RUNTIME = retrieve.Runtime(coarse="auto", kernel="auto", device="cpu", queries_per_pass=11, memory_gb=0.1)
Hits = list[tuple[str, float]]


def complete(module: Any, job: Any, runtime: Any) -> Artifact:
    """The artifact of a job of any stage, made and sealed."""
    list(module.make([(job, unit) for unit in module.units(job)], runtime))
    job.artifact.seal(module.facts(job, runtime))
    artifact: Artifact = job.artifact
    return artifact


def search(root: Path, pools: dict[str, np.ndarray], queries_QD: np.ndarray, factory: str = "Flat", depth: int = 9,
           runtime: retrieve.Runtime = RUNTIME, write_faiss: bool = False, rows_per_shard: int = 17,
           ids: Sequence[str] | None = None, parameters: str = "") -> Artifact:
    """A complete run of these queries over the union of these pools (ids are name:row unless others are given)."""
    params = index.Params(factory, write_faiss, 1000, 0)
    members = []
    for name, vectors_ND in pools.items():
        embedded = make_store(root, name, vectors_ND, rows_per_shard, "float16", ids)
        indexing = Identity("index", 1, params, {"embeddings": embedded.fingerprint})
        pool = index.Job(Artifact(root, f"{name}.index", indexing), embedded)
        indexed = complete(index, pool, index.Runtime())
        members.append(retrieve.Member(embedded, indexed, "" if params.is_exact else index.FAISS))
    queries = make_store(root, "queries", queries_QD, 8, "float16")
    identity = Identity("retrieve", 1, retrieve.Params(depth, parameters, 20), {"pools": ",".join(pools)})
    artifact = Artifact(root, "run", identity)
    job = retrieve.Job(artifact, queries, len(EmbeddingStore.of(queries).files), tuple(members))
    return complete(retrieve, job, runtime)


def hits_of(run: Artifact) -> dict[str, Hits]:
    found: dict[str, Hits] = {}
    for row in run_table(run).to_pylist():
        hits = found.setdefault(row["query_id"], [])
        hits.append((row["candidate_id"], row["score"]))
        assert row["rank"] == len(hits)
    return found


def brute_force(pools: dict[str, np.ndarray], queries_QD: np.ndarray, depth: int) -> dict[str, Hits]:
    ids = [f"{name}:{row}" for name, vectors in pools.items() for row in range(len(vectors))]
    all_ND = np.concatenate(list(pools.values())).astype(np.float64)
    unit_ND = all_ND / np.linalg.norm(all_ND, axis=1, keepdims=True)
    found = {}
    for number, query_D in enumerate(queries_QD.astype(np.float64)):
        scores_N = (unit_ND @ (query_D / np.linalg.norm(query_D))).astype(np.float32)
        best = sorted(zip(ids, scores_N.tolist()), key=lambda pair: (-pair[1], pair[0]))[:depth]
        found[f"queries:{number}"] = best
    return found


def same(first: dict[str, Hits], second: dict[str, Hits], tolerance: float = 0.0) -> bool:
    return [(key, [name for name, _ in hits]) for key, hits in first.items()] == [
        (key, [name for name, _ in hits]) for key, hits in second.items()] and all(
        abs(left[1] - right[1]) <= tolerance for key in first for left, right in zip(first[key], second[key]))


def test_a_union_equals_brute_force_over_its_members(tmp_path: Path) -> None:
    assert same(hits_of(search(tmp_path, POOLS, QUERIES)), brute_force(POOLS, QUERIES, 9), 1e-6)


def test_ties_are_ordered_by_id_across_members(tmp_path: Path) -> None:
    first = hits_of(search(tmp_path, POOLS, QUERIES))["queries:5"][:3]
    assert [name for name, _ in first] == ["a:3", "a:50", "b:7"] and len({value for _, value in first}) == 1


def test_a_union_equals_one_concatenated_pool_exactly(tmp_path: Path) -> None:
    """The same rows under the same ids, as three members and as a single store in another order: equal to the bit."""
    union = search(tmp_path / "union", POOLS, QUERIES)
    ids = [f"{name}:{row}" for name in "cba" for row in range(len(POOLS[name]))]
    joined = search(tmp_path / "joined", {"all": np.concatenate([POOLS[name] for name in "cba"])}, QUERIES, ids=ids)
    assert hits_of(joined) == hits_of(union)


@pytest.mark.parametrize("runtime", [
    replace(RUNTIME, queries_per_pass=1), replace(RUNTIME, queries_per_pass=10**6), replace(RUNTIME, coarse="float32"),
    replace(RUNTIME, coarse="bfloat16"), replace(RUNTIME, kernel="torch"), replace(RUNTIME, memory_gb=1e-5)])
def test_speed_settings_change_no_byte(tmp_path: Path, runtime: retrieve.Runtime) -> None:
    first = search(tmp_path / "one", POOLS, QUERIES, runtime=RUNTIME)
    second = search(tmp_path / "two", POOLS, QUERIES, runtime=runtime)
    assert [first.path(unit["file"]).read_bytes() for unit in first.manifest()["files"]] == [
        second.path(unit["file"]).read_bytes() for unit in second.manifest()["files"]]


@pytest.mark.parametrize("order", ["abc", "cba", "bac"])
@pytest.mark.parametrize("rows_per_shard", [1, 5, 100])
def test_order_of_members_and_size_of_shards_change_no_hit(
        tmp_path: Path, order: Sequence[str], rows_per_shard: int) -> None:
    found = search(tmp_path, {name: POOLS[name] for name in order}, QUERIES, rows_per_shard=rows_per_shard)
    assert same(hits_of(found), brute_force(POOLS, QUERIES, 9), 1e-6)


def test_fewer_candidates_than_depth(tmp_path: Path) -> None:
    found = hits_of(search(tmp_path, {"c": POOLS["c"]}, QUERIES, depth=5))
    assert all(len(hits) == 1 for hits in found.values()) and len(found) == len(QUERIES)


@pytest.mark.parametrize("factory", ["IVF4,Flat", "HNSW8", "SQfp16"])
def test_faiss_factories_record_their_recall(tmp_path: Path, factory: str) -> None:
    run = search(tmp_path, {name: POOLS[name] for name in "ab"}, QUERIES, factory)
    manifest = run.manifest()
    assert manifest["exact"] is False and manifest["recall_against_exact"]["queries"] == 20
    found, exact = hits_of(run), brute_force({name: POOLS[name] for name in "ab"}, QUERIES, 9)
    sample = [f"queries:{number}" for number in np.unique(np.linspace(0, 29, 20).astype(int))]
    measured = np.mean([len({name for name, _ in found[key]} & {name for name, _ in exact[key]}) / 9 for key in sample])
    assert manifest["recall_against_exact"]["recall@9"] == pytest.approx(measured) and measured > 0.3


def test_faiss_parameters_reach_the_index(tmp_path: Path) -> None:
    """An inverted file that looks into all of its lists finds everything."""
    pools = {name: POOLS[name] for name in "ab"}
    runs = [search(tmp_path / name, pools, QUERIES, "IVF4,Flat", parameters=name) for name in ("nprobe=1", "nprobe=4")]
    recall = [run.manifest()["recall_against_exact"]["recall@9"] for run in runs]
    assert recall[0] < recall[1] == 1.0
    with pytest.raises(UserError, match="retrieve.faiss_parameters"):
        search(tmp_path / "wrong", pools, QUERIES, "IVF4,Flat", parameters="nprob=4")


def test_a_faiss_file_can_be_written_beside_the_exact_search(tmp_path: Path) -> None:
    search(tmp_path, {"a": POOLS["a"]}, QUERIES, write_faiss=True)
    import torch  # noqa: F401  before faiss, so that both share one pool of threads
    import faiss
    loaded = faiss.read_index(str(next((tmp_path / "index").glob("a.index-*")) / index.FAISS))
    units_QD = QUERIES / np.linalg.norm(QUERIES, axis=1, keepdims=True)
    _, rows_QK = loaded.search(units_QD, 1)
    assert loaded.ntotal == 61 and rows_QK[5, 0] in (3, 50)


def test_different_dimensions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="queries have dimension 12, the pool has 16"):
        search(tmp_path, POOLS, QUERIES[:, :12])


def test_nan_in_a_pool_is_refused_with_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own writer refuses NaN; a store that was written by somebody else is refused when it is indexed."""
    spoiled = POOLS["a"].copy()
    spoiled[4, 2] = np.nan
    monkeypatch.setattr("pipeline.embeddings._refuse", lambda *_: None)
    with pytest.raises(UserError, match="a:4"):
        search(tmp_path, {"a": spoiled}, QUERIES)


def test_the_query_vectors_read_back_are_those_searched(tmp_path: Path) -> None:
    search(tmp_path, {"c": POOLS["c"]}, QUERIES)
    store = next((tmp_path / "embed").glob("queries-*"))
    parts = [vectors_of(read_table(path, None)) for path in sorted(store.glob("*.parquet"))]
    assert np.array_equal(np.concatenate(parts).astype(np.float32), QUERIES)
