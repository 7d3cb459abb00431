"""Vectors made elsewhere: each item gets that of its own id, and a run of them scores what the encoder scored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Experiment, load
from pipeline.embeddings import EmbeddingStore, vectors_of
from pipeline.encoders import Item, precomputed
from pipeline.encoders.precomputed import Params
from pipeline.plan import make_plan
from pipeline.run import run_experiment
from pipeline.support.errors import UserError
from pipeline.workers import run_stage
from tests.small_mbeir import COLOURS, SmallMbeir

RNG = np.random.default_rng(4)
IDS = [f"7:{number}" for number in (3, 11, 2, 100, 9)] + ["\u00e9", "z\U0001f600", ""]
QUERIES, CANDIDATES = (RNG.normal(size=(len(IDS), 6)).astype(np.float32) for _ in range(2))  # with the same ids


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def table(ids: Any, vectors: Any, kind: Any = pa.list_(pa.float32()),
          names: tuple[str, str] = ("id", "vector")) -> pa.Table:
    return pa.table({names[0]: ids, names[1]: pa.array([list(vector) for vector in vectors], kind)})


def parquet(folder: Path, ids: Any = tuple(IDS), vectors: Any = CANDIDATES, **options: Any) -> Params:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(list(ids), vectors, **options), folder / "candidates.parquet")
    pq.write_table(table(IDS, QUERIES), folder / "queries.parquet")
    return Params(str(folder / "queries.parquet"), str(folder / "candidates.parquet"))


def arrays(folder: Path, ids: str = "\n".join(IDS[:-1]), vectors: np.ndarray = CANDIDATES[:-1]) -> Params:
    params = parquet(folder)
    np.save(folder / "candidates.npy", vectors)
    (folder / "ids.txt").write_text(ids, encoding="utf-8")
    return Params(params.queries, str(folder / "candidates.npy"), candidate_ids=str(folder / "ids.txt"))


def vectors(params: Params, ids: list[str], role: Any = "candidate") -> np.ndarray:
    encoder = precomputed.build(params, "cpu", "fp32")
    return encoder.encode([encoder.prepare(Item("text", None, role=role, id=name)) for name in ids])


def test_the_vector_is_that_of_the_id_among_its_own_kind(tmp_path: Path) -> None:
    params = parquet(tmp_path)
    found = vectors(params, IDS[::-1])
    assert found.dtype == np.float32 and np.array_equal(found, CANDIDATES[::-1])
    assert np.array_equal(vectors(params, IDS, "query"), QUERIES) and not np.array_equal(QUERIES, CANDIDATES)
    encoder = precomputed.build(params, "cuda", "bf16")  # neither is needed
    mixed = encoder.encode([("query", IDS[1]), ("candidate", IDS[1]), ("query", IDS[1])])
    assert np.array_equal(mixed, [QUERIES[1], CANDIDATES[1], QUERIES[1]])
    assert encoder.encode([]).shape == (0, 6) and encoder.dimension == 6 and encoder.needs_ids


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 6),
                                  pa.list_(pa.float64()), pa.list_(pa.float64(), 6)])
def test_any_kind_of_list_will_do(tmp_path: Path, kind: Any) -> None:
    assert np.array_equal(vectors(parquet(tmp_path, kind=kind), IDS), CANDIDATES)


def test_float16_stays_as_it_was(tmp_path: Path) -> None:
    half = CANDIDATES.astype(np.float16)
    assert np.array_equal(vectors(parquet(tmp_path, vectors=half, kind=pa.list_(pa.float16(), 6)), IDS), half)


@pytest.mark.parametrize("ids", [pa.array(range(8)), pa.array([str(number) for number in range(8)], pa.large_string()),
                                 pa.array([str(number) for number in range(8)]).dictionary_encode()])
def test_any_kind_of_id_will_do(tmp_path: Path, ids: Any) -> None:
    params = parquet(tmp_path)
    pq.write_table(table(ids, CANDIDATES), params.candidates)
    assert np.array_equal(vectors(params, list("70123456")), CANDIDATES[[7, 0, 1, 2, 3, 4, 5, 6]])


def test_many_files_and_many_row_groups_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precomputed, "_ROWS", 7)
    many = RNG.normal(size=(100, 6)).astype(np.float32)
    params = parquet(tmp_path)
    for number in range(4):
        rows = slice(25 * number, 25 * number + 25)
        pq.write_table(table([f"c{row}" for row in range(100)][rows], many[rows], names=("key", "embedding")),
                       tmp_path / f"part-{number}.parquet", row_group_size=10)
    pq.write_table(table(IDS, QUERIES, names=("key", "embedding")), params.queries)
    both = Params(params.queries, str(tmp_path / "part-*.parquet"), id_column="key", vector_column="embedding")
    order = RNG.permutation(100)
    assert np.array_equal(vectors(both, [f"c{row}" for row in order]), many[order])


@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_an_array_with_its_ids(tmp_path: Path, ending: str, kind: Any) -> None:
    stored = CANDIDATES[:-1].astype(kind)
    for name, array in {"c": stored, "fortran": np.asfortranarray(stored)}.items():
        params = arrays(tmp_path / name, "\n".join(IDS[:-1]) + ending, array)
        assert np.array_equal(vectors(params, IDS[:-1]), stored.astype(np.float32))
    windows = arrays(tmp_path, "\ufeff" + "\r\n".join(IDS[:-1]) + "\r\n")
    assert np.array_equal(vectors(windows, IDS[:-1]), CANDIDATES[:-1])


@pytest.mark.parametrize("name", ["7:", "7:30", "7:3 ", "zz", "0"])
def test_a_missing_id_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"no vector for query '{name}'.*queries.parquet"):
        vectors(parquet(tmp_path), [IDS[0], name], "query")
    with pytest.raises(UserError, match="has none"):
        precomputed.build(parquet(tmp_path), "cpu", "fp32").encode([("query", None)])


def test_an_id_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="candidate id '7:2' stands more than once .2 rows too many"):
        vectors(parquet(tmp_path, [*IDS[:3], "7:2", "7:2", *IDS[5:]]), [])
    with pytest.raises(UserError, match="candidate id '' stands more than once .8 rows"):
        params = parquet(tmp_path)
        shutil.copy(params.candidates, tmp_path / "candidates-2.parquet")
        vectors(Params(params.queries, str(tmp_path / "candidates*.parquet")), [])


@pytest.mark.parametrize("columns, message", [
    ({"id": ["a", None], "vector": [[1.0], [2.0]]}, "missing .null"),
    ({"id": ["a", "b"], "vector": [[1.0], None]}, "missing .null"),
    ({"id": ["a", "b"], "vector": [[1.0], [None]]}, "missing .null"),
    ({"id": ["a", "b"], "vector": [[1.0], [2.0, 3.0]]}, "2 different lengths"),
    ({"id": ["a", "b"], "vector": [1.0, 2.0]}, "holds double, not vectors"),
    ({"id": ["a", "b"], "vector": [[1], [2]]}, "not vectors"),
    ({"id": ["a", "b"], "vectors": [[1.0], [2.0]]}, "no column 'vector'.*\n.*nearest: vectors"),
    ({"id": ["a", "b"], "vector": [[1.0], [2.0]]}, "queries have 6 dimensions, candidates 1"),
    ({"id": pa.array([], pa.string()), "vector": pa.array([], pa.list_(pa.float32()))}, "hold no vectors"),
    ({"id": ["a", "b"], "vector": pa.array([[], []], pa.list_(pa.float32()))}, "hold no vectors"),
])
def test_a_table_that_cannot_be_used(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    params = parquet(tmp_path)
    pq.write_table(pa.table(columns), params.candidates)
    with pytest.raises(UserError, match=message):
        precomputed.build(params, "cpu", "fp32")


@pytest.mark.parametrize("change, message", [
    ({"candidates": "candidates.npy"}, "holds no ids.*\n.*candidate_ids"),
    ({"candidates": "candidates.npy", "candidate_ids": "nothing.txt"}, "candidate_ids` not found"),
    ({"candidates": "candidates.npy", "candidate_ids": "candidates.npy"}, "not a text file"),
    ({"candidates": "*.npy", "candidate_ids": "ids.txt"}, "2 arrays"),
    ({"candidate_ids": "ids.txt"}, "goes with a .npy"),
    ({"candidates": "nothing-*.parquet"}, "the file of `candidates` not found"),
    ({"candidates": "."}, "is a directory"),
    ({"candidates": "ids.txt"}, "not a whole parquet file"),
    ({"queries": "cut.parquet"}, "not a whole parquet file"),
    ({"candidates": "cut.npy", "candidate_ids": "ids.txt"}, "not a whole .npy array|2 arrays"),
    ({"candidates": "queries.npy", "candidate_ids": "ids.txt"}, "8 vectors and 7 ids"),
])
def test_files_that_cannot_be_used(tmp_path: Path, change: dict[str, str], message: str) -> None:
    arrays(tmp_path)
    np.save(tmp_path / "queries.npy", QUERIES)
    whole = (tmp_path / "queries.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:len(whole) // 2])
    if change.get("candidates") == "cut.npy":
        (tmp_path / "cut.npy").write_bytes((tmp_path / "queries.npy").read_bytes()[:-4])
    given = {"queries": "queries.parquet", "candidates": "candidates.parquet", **change}
    with pytest.raises(UserError, match=message):
        precomputed.build(Params(**{option: str(tmp_path / name) for option, name in given.items()}), "cpu", "fp32")


def test_an_array_that_is_not_numbers(tmp_path: Path) -> None:
    for bad in (np.arange(7), CANDIDATES[0], np.array([{}] * 7, dtype=object)):
        with pytest.raises(UserError, match="the array is|not a whole .npy"):
            precomputed.build(arrays(tmp_path, vectors=bad), "cpu", "fp32")


def test_identity_is_content_not_names(tmp_path: Path) -> None:
    first = precomputed.identity(parquet(tmp_path / "a"))
    assert first == precomputed.identity(parquet(tmp_path / "b"))
    changed = CANDIDATES.copy()
    changed[3, 3] += 1e-3
    others = [precomputed.identity(each) for each in (
        parquet(tmp_path / "c", vectors=changed), parquet(tmp_path / "d", [*IDS[:-1], "x"]),
        Params(**{**vars(parquet(tmp_path / "e")), "vector_column": "other"}),
        arrays(tmp_path / "f"), arrays(tmp_path / "g", "\n".join(IDS[1:])))]
    swapped = parquet(tmp_path / "h")
    others.append(precomputed.identity(Params(swapped.candidates, swapped.queries)))
    assert len({str(each) for each in [first, *others]}) == 7


def piece(folder: Path, params: Params) -> Path:
    """A configuration that names its files beside it."""
    path = folder / "brought.yaml"
    path.write_text(f"# Vectors of a test.\nencoder: precomputed\nqueries: ./{Path(params.queries).name}\n"
                    f"candidates: ./{Path(params.candidates).name}\n")
    return path


def small_run(folder: Path, *overrides: str, has_images: bool = True) -> dict[str, np.ndarray]:
    """Vectors of the queries and the pool of a small benchmark, from files of ids in another order."""
    small = SmallMbeir(folder)
    small.candidates[1]["img_path"] = small.candidates[0]["img_path"]  # equal content, another id
    small.write()
    names = [f"7:{number}" for number in (4, 2, 3, 1)]
    pq.write_table(table(names, QUERIES[:4]), folder / "queries.parquet")
    pq.write_table(table(names, CANDIDATES[:4]), folder / "candidates.parquet")
    encoder = piece(folder, Params("queries.parquet", "candidates.parquet"))
    experiment = load(str(small.experiment), [f"encoders=[{encoder}]", "embed.storage=float32", *overrides])
    if not has_images:
        for colour in COLOURS:
            small.image(colour).unlink(missing_ok=True)
    run_stage(experiment, "collect")
    for colour in ("red", "green") if has_images else ():
        small.image(colour).write_bytes(b"x" * small.image(colour).stat().st_size)  # no longer an image
    run_stage(experiment, "embed")
    stores = {job.artifact.name: EmbeddingStore.of(job.artifact) for job in make_plan(experiment).jobs["embed"]}
    return {"pool" if ".pool." in name else "queries": vectors_of(store.shard(0)) for name, store in stores.items()}


@pytest.mark.parametrize("loaders", [0, 2])
def test_items_are_known_by_their_ids_and_no_image_is_opened(tmp_path: Path, loaders: int) -> None:
    found = small_run(tmp_path, f"embed.loaders={loaders}")
    assert np.array_equal(found["queries"], QUERIES[[3, 1, 2, 0]])
    assert np.array_equal(found["pool"], CANDIDATES[[3, 1, 2, 0]])


def test_a_benchmark_without_its_images_will_do(tmp_path: Path) -> None:
    found = small_run(tmp_path, "collect.check_images=false", has_images=False)
    assert np.array_equal(found["pool"], CANDIDATES[[3, 1, 2, 0]])


@pytest.mark.parametrize("share", ["shard", "worker"])
def test_equal_items_never_share_a_vector(tmp_path: Path, share: str) -> None:
    found = small_run(tmp_path, f"embed.share={share}")
    assert np.array_equal(found["pool"], CANDIDATES[[3, 1, 2, 0]])


def scores(experiment: Experiment) -> dict[tuple[str, str], list[pa.Table]]:
    return {(cell.task.name, cell.pool): [pq.read_table(path).replace_schema_metadata()
                                          for path in sorted(cell.job.artifact.directory.glob("*.parquet"))]
            for cell in make_plan(experiment).scored}


def test_an_encoders_own_vectors_fed_back_score_the_same(quick_run: Experiment, small_arguments: list[str],
                                                         tmp_path: Path) -> None:
    for job in make_plan(quick_run).jobs["embed"]:
        role = "candidates" if ".pool." in job.artifact.name else "queries"
        for shard in sorted(job.artifact.directory.glob("*.parquet")):
            shutil.copy(shard, tmp_path / f"{role}-{job.artifact.name}-{shard.name}")
    path = piece(tmp_path, Params("queries-*.parquet", "candidates-*.parquet"))
    experiment = load("quickstart", [f"work_dir={tmp_path / 'work'}", f"encoders=[{path}]", *small_arguments])
    run_experiment(experiment, [], say=lambda *_: None)
    first, second = scores(quick_run), scores(experiment)
    assert len(first) == 24 and first == second and all(first.values())
