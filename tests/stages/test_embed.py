"""Embeddings are what the encoder gives for each item alone, whatever the batches, loaders and workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import load
from pipeline.embeddings import EmbeddingStore, vectors_of
from pipeline.encoders import Item
from pipeline.loading import choose_prompts
from pipeline.plan import make_plan
from pipeline.workers import Share, run_stage
from tests import toy_encoder
from tests.small_mbeir import COLOURS, SmallMbeir

ENCODER = toy_encoder.build(toy_encoder.Params(), "cpu", "fp32")
TEXTS = [(f"A {colour} toy.", [f"Find the picture. A {colour} toy.", f"Which picture is meant? A {colour} toy."])
         for colour in COLOURS]


def embedded(small: SmallMbeir, *overrides: str) -> dict[str, tuple[list[str], np.ndarray, list[str | None]]]:
    """Ids, vectors and flaws of the queries and of the pool, after embedding."""
    experiment = load(str(small.experiment), ["embed.storage=float32", *overrides])
    for stage in ("collect", "embed"):
        run_stage(experiment, stage)
    found = {}
    for job in make_plan(experiment).jobs["embed"]:
        store = EmbeddingStore.of(job.artifact)
        tables = [store.shard(number) for number in range(len(store.files))]
        kind = "pool" if ".pool." in job.artifact.name else "queries"
        ids = [value for table in tables for value in table["id"].to_pylist()]
        flaws = [value for table in tables for value in table["flaw"].to_pylist()]
        found[kind] = ids, np.concatenate([vectors_of(table) for table in tables]), flaws
    return found


def alone(text: str | None, image: Image.Image | None = None) -> np.ndarray:
    return np.asarray(ENCODER.encode([ENCODER.prepare(Item(text, image))])[0])


@pytest.mark.parametrize("overrides", [
    (), ("embed.batch_size=1",), ("embed.batch_size=3", "embed.loaders=2"), ("collect.rows_per_shard=1",)])
def test_every_vector_is_the_items_own(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    small = SmallMbeir(tmp_path).write()
    found = embedded(small, "embed.instruction=none", *overrides)
    ids, vectors_ND, flaws = found["queries"]
    assert ids == ["7:1", "7:2", "7:3", "7:4"] and flaws == [None] * 4
    assert np.array_equal(vectors_ND, [alone(text) for text, _ in TEXTS])
    assert np.array_equal(found["pool"][1], [alone(None, Image.open(small.image(colour))) for colour in COLOURS])


def test_rules_of_instruction(tmp_path: Path) -> None:
    small = SmallMbeir(tmp_path).write()
    assert np.array_equal(embedded(small, "embed.instruction=first")["queries"][1],
                          [alone(texts[0]) for _, texts in TEXTS])
    numbers = [choose_prompts("hashed", f"7:{number}", 2)[0] for number in range(1, 5)]
    assert np.array_equal(embedded(small, "embed.instruction=hashed")["queries"][1],
                          [alone(texts[number]) for (_, texts), number in zip(TEXTS, numbers) if number is not None])


def test_all_prompts_rank_like_averaged_scores(tmp_path: Path) -> None:
    """mean_i cos(q_i, c) is the product of c/|c| with the mean unit vector: the stored sum ranks the same."""
    found = embedded(SmallMbeir(tmp_path).write(), "embed.instruction=all")
    candidates_ND = found["pool"][1] / np.linalg.norm(found["pool"][1], axis=1, keepdims=True)
    for row, (_, texts) in enumerate(TEXTS):
        scores = [candidates_ND @ (alone(text) / np.linalg.norm(alone(text))) for text in texts]
        assert np.allclose(candidates_ND @ found["queries"][1][row] / len(texts), np.mean(scores, axis=0), atol=1e-6)


def test_hashed_choice_is_pinned_and_even() -> None:
    assert [choose_prompts("hashed", f"9:{number}", 4)[0] for number in range(1, 9)] == [3, 3, 0, 0, 1, 1, 2, 1]
    counts = Counter(choose_prompts("hashed", f"9:{number}", 4)[0] for number in range(4000))
    assert set(counts) == {0, 1, 2, 3} and min(counts.values()) > 900
    assert choose_prompts("all", "1", 3) == [0, 1, 2]
    assert choose_prompts("none", "1", 3) == [None] == choose_prompts("first", "1", 0)


def test_two_workers_make_what_one_makes(tmp_path: Path) -> None:
    small = SmallMbeir(tmp_path).write()
    one = embedded(small, "collect.rows_per_shard=1")
    overrides = ["embed.storage=float32", "collect.rows_per_shard=1", f"work_dir={tmp_path}/second"]
    experiment = load(str(small.experiment), overrides)
    run_stage(experiment, "collect")
    second = run_stage(experiment, "embed", Share(1, 2))
    assert second.made == 8  # its own half, then the half of a worker that never came
    two = embedded(small, "collect.rows_per_shard=1", f"work_dir={tmp_path}/second")
    assert all(np.array_equal(one[kind][1], two[kind][1]) for kind in one)


def test_flawed_items_have_their_text_or_the_zero_vector(tmp_path: Path) -> None:
    small = SmallMbeir(tmp_path)
    small.candidates[0] |= {"txt": "Red.", "modality": "image,text"}
    small.write()
    for colour in ("red", "green"):
        small.image(colour).write_text("broken")
    ids, vectors_ND, flaws = embedded(small, "embed.max_flawed=2")["pool"]
    assert flaws == ["undecodable_image", "undecodable_image", None, None]
    assert np.array_equal(vectors_ND[0], alone("Red.")) and not vectors_ND[1].any() and vectors_ND[2].any()


def test_flaws_are_counted_over_all_shards(tmp_path: Path) -> None:
    small = SmallMbeir(tmp_path).write()
    for colour in ("red", "green"):
        small.image(colour).write_text("broken")
    with pytest.raises(Exception, match="2 items have a broken image, 1 tolerated"):
        embedded(small, "embed.max_flawed=1", "collect.rows_per_shard=1")


def test_only_the_towers_that_an_item_needs_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches hold items of one kind where they can, and a text-only pool never meets an image."""
    kinds: list[Any] = []
    prepare = toy_encoder.ToyEncoder.prepare

    def watched(self: toy_encoder.ToyEncoder, item: Item) -> np.ndarray:
        kinds.append(item.image is not None)
        return prepare(self, item)
    monkeypatch.setattr(toy_encoder.ToyEncoder, "prepare", watched)
    small = SmallMbeir(tmp_path)
    small.candidates += [{"did": f"7:{number}", "txt": "Words.", "img_path": None, "modality": "text"}
                         for number in range(5, 9)]
    embedded(small.write())
    assert kinds == [False] * 4 + [False] * 4 + [True] * 4


def test_manifest_tells_rows_dimension_and_identity(tmp_path: Path) -> None:
    small = SmallMbeir(tmp_path).write()
    embedded(small)
    for path in (tmp_path / "work/artifacts/embed").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        assert manifest["rows"] == 4 and manifest["dimension"] == 8
        assert manifest["params"]["encoder"]["module"] == "tests.toy_encoder"


def test_an_encoder_that_returns_the_wrong_shape_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_encoder.ToyEncoder, "encode", lambda self, batch: np.stack(batch)[:, :5])
    with pytest.raises(Exception, match=r"shape \(4, 5\) for 4 items, its dimension is 8.*tests.toy_encoder"):
        embedded(SmallMbeir(tmp_path).write())


def test_loaders_need_few_handles(tmp_path: Path) -> None:
    """Batches travel as bytes: with a shared file per tensor, 64 handles would be gone in the first batch."""
    small = SmallMbeir(tmp_path)
    small.candidates = [dict(small.candidates[0], did=f"7:{number}") for number in range(1, 400)]
    small.write()
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64));"
            "from pipeline.cli import main; sys.exit(main(sys.argv[1:]))")
    for stage in ("collect", "embed"):
        done = subprocess.run([sys.executable, "-c", code, stage, str(small.experiment), "embed.loaders=2",
                               "encoders=[quickstart_clip]", "embed.batch_size=64"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_other_images_of_other_size_are_embedded_again(tmp_path: Path) -> None:
    """The same names and tables below another root: the sizes of the images tell them apart."""
    first = SmallMbeir(tmp_path / "first").write()
    second = SmallMbeir(tmp_path / "second").write()
    work = f"work_dir={tmp_path}/work"
    before = embedded(first, work)["pool"][1]
    Image.effect_noise((40, 40), 90).convert("RGB").save(second.image("red"))
    after = embedded(second, work)["pool"][1]
    assert not np.array_equal(before[0], after[0]) and np.array_equal(before[1:], after[1:])


def test_an_encoder_that_does_not_take_images_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_encoder.ToyEncoder.__init__, "__defaults__", (frozenset({"text"}),))
    with pytest.raises(Exception, match="does not take 'image', which small.pool.toys_task0 has"):
        embedded(SmallMbeir(tmp_path).write())
