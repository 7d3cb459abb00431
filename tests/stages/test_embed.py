"""Embeddings are what the encoder gives for each item alone, whatever the batches, loaders and workers."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import load, part
from pipeline.embeddings import EmbeddingStore, vectors_of
from pipeline.encoders import Item
from pipeline.loading import choose_prompts
from pipeline.plan import make_plan
from pipeline.run import run_experiment
from pipeline.stages import embed
from pipeline.support.errors import UserError
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
    small.candidates += [{"did": f"7:{number}", "txt": f"Words {number}.", "img_path": None, "modality": "text"}
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


# equal items

def with_copies(root: Path) -> SmallMbeir:
    """Ten candidates of five contents: red by its name three times and by others twice, one of the texts twice."""
    small = SmallMbeir(root)
    small.image("copy").write_bytes(small.image("red").read_bytes())
    small.image("again").write_bytes(small.image("red").read_bytes())
    red = {"txt": None, "img_path": "mbeir_images/red.png", "modality": "image"}
    told = {"txt": "Words.", "img_path": None, "modality": "text"}
    copy, again, green = ({**red, "img_path": f"mbeir_images/{name}.png"} for name in ("copy", "again", "green"))
    both = {**red, "txt": "Red.", "modality": "image,text"}
    rows = [red, told, copy, red, both, green, told, again, red, {**told, "txt": "Other words."}]
    small.candidates = [{"did": f"7:{number}", "src_content": None, **row} for number, row in enumerate(rows, 1)]
    return small.write()


@pytest.fixture
def encoded_items(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    encode = toy_encoder.ToyEncoder.encode

    def watched(self: toy_encoder.ToyEncoder, batch: Any) -> np.ndarray:
        found.extend(batch)
        return encode(self, batch)
    monkeypatch.setattr(toy_encoder.ToyEncoder, "encode", watched)
    return found


SETTINGS = [("none", 10_000, 10), ("shard", 10_000, 5), ("worker", 10_000, 5),
            ("none", 5, 10), ("shard", 5, 3 + 4), ("worker", 5, 5), ("shard", 1, 10), ("worker", 1, 5)]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("share, rows_per_shard, expected", SETTINGS)
def test_equal_items_are_encoded_once(tmp_path: Path, encoded_items: list[np.ndarray], share: str, rows_per_shard: int,
                                      expected: int, batch_size: int) -> None:
    small = with_copies(tmp_path)
    _, vectors_ND, flaws = embedded(
        small, f"embed.share={share}", f"collect.rows_per_shard={rows_per_shard}", f"embed.batch_size={batch_size}",
        "embed.instruction=none")["pool"]
    assert len(encoded_items) == expected + 4  # the queries
    red, green = (alone(None, Image.open(small.image(colour))) for colour in ("red", "green"))
    words, both = alone("Words."), alone("Red.", Image.open(small.image("red")))
    assert np.array_equal(vectors_ND, [red, words, red, red, both, green, words, red, red, alone("Other words.")])
    assert flaws == [None] * 10


def test_shards_share_nothing_unless_asked(tmp_path: Path, encoded_items: list[np.ndarray]) -> None:
    """What a shard holds must not depend on the shards that its worker has made before."""
    small = with_copies(tmp_path)
    embedded(small, "collect.rows_per_shard=5")
    work = tmp_path / "work/artifacts/embed"
    shard = next(work.glob("*pool*")) / "embeddings-00001.parquet"
    before = shard.read_bytes()
    shard.unlink()
    (shard.parent / "manifest.json").unlink()
    embedded(small, "collect.rows_per_shard=5")
    assert shard.read_bytes() == before


def test_how_many_shared_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    with caplog.at_level("INFO", logger="pipeline"):
        embedded(with_copies(tmp_path))
    assert "50.0% shared" in caplog.text and "14 items, 5 shared the vector of an equal one" in caplog.text


def test_equal_texts_under_other_instructions_are_other_items(tmp_path: Path,
                                                              encoded_items: list[np.ndarray]) -> None:
    """An encoder may have a template of its own for the two parts: the same final text can mean another vector."""
    small = SmallMbeir(tmp_path)
    small.queries = [{**small.queries[0], "qid": f"7:{number}", "query_txt": text}
                     for number, text in enumerate(("toy.", "toy.", "Find toy."), 1)]
    small.qrels = [f"7:{number} 0 7:1 1 0" for number in range(1, 4)]
    small.instructions[1] = "text\timage\tToys\t7\tFind\tFind"
    small.candidates = small.candidates[:1]
    embedded(small.write(), "embed.instruction=first")
    assert len(encoded_items) == 2 + 1
    encoded_items.clear()
    embedded(small, "embed.instruction=all", f"work_dir={tmp_path}/all")
    assert len(encoded_items) == 2 + 1, "two prompts of the same words are one item"


def test_a_row_of_equal_prompts_counts_each(tmp_path: Path) -> None:
    small = SmallMbeir(tmp_path)
    small.instructions[1] = "text\timage\tToys\t7\tFind it.\tFind it."
    shared, apart = (embedded(small.write(), "embed.instruction=all", f"embed.share={share}",
                              f"work_dir={tmp_path}/{share}")["queries"][1] for share in ("shard", "none"))
    assert np.array_equal(shared, apart)
    assert np.allclose(np.linalg.norm(shared, axis=1), 2)


def test_copies_of_a_broken_image_are_flawed_alike(tmp_path: Path) -> None:
    small = with_copies(tmp_path)
    small.image("red").write_text("broken")
    _, vectors_ND, flaws = embedded(small, "embed.max_flawed=9")["pool"]
    broken = "undecodable_image"
    assert flaws == [broken, None, None, broken, broken, None, None, None, broken, None]
    assert not vectors_ND[[0, 3, 8]].any() and np.array_equal(vectors_ND[4], alone("Red."))
    assert np.array_equal(vectors_ND[2], vectors_ND[7]) and vectors_ND[2].any()


def test_sharing_moves_no_vector_of_a_real_encoder(quick_run: Any, small_arguments: list[str], tmp_path: Path) -> None:
    """Batches differ, and so may the last digits, of which 1e-6 of a vector's norm is allowed."""
    for share in ("shard", "worker", "none"):
        arguments = [f"work_dir={tmp_path}/{share}", *small_arguments, "embed.storage=float32", f"embed.share={share}"]
        for stage in ("collect", "embed"):
            run_stage(load("quickstart", arguments), stage)
    for job in make_plan(load("quickstart", [f"work_dir={tmp_path}/none", *small_arguments,
                                             "embed.storage=float32"])).jobs["embed"]:
        first = job.artifact.path("embeddings-00000.parquet").relative_to(tmp_path / "none")
        tables = [pq.read_table(tmp_path / share / first) for share in ("none", "shard", "worker")]
        apart_ND, *others = (vectors_of(table) for table in tables)
        norms_N1 = np.linalg.norm(apart_ND, axis=1, keepdims=True)
        assert all(np.abs((other_ND - apart_ND) / norms_N1).max() < 1e-6 for other_ND in others)


# options that an encoder must be able to follow

@pytest.mark.parametrize("option, name", [("embed.compile=true", "compile"), ("embed.decoding=draft", "image_size")])
def test_an_encoder_that_cannot_is_named(tmp_path: Path, option: str, name: str) -> None:
    small = SmallMbeir(tmp_path).write()
    with pytest.raises(UserError, match=f"(?s)no `{name}`.*tests.toy_encoder.*{option.split('=')[0]}"):
        embedded_with(small, option)


def embedded_with(small: SmallMbeir, option: str) -> None:
    """Embed the pool under one option, set by hand on its job."""
    experiment = load(str(small.experiment), [option])
    run_stage(experiment, "collect")
    job = make_plan(experiment).jobs["embed"][1]
    identity = job.artifact.identity
    params = replace(identity.params, decoding=experiment.settings.embed.decoding)
    job = replace(job, artifact=replace(job.artifact, identity=replace(identity, params=params)))
    runtime = part(experiment.settings.embed, embed.Runtime)
    list(embed.make([(job, unit) for unit in embed.units(job)], runtime))


def test_drafts_have_other_pixels_and_exact_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    prepare = toy_encoder.ToyEncoder.prepare

    def watched(self: toy_encoder.ToyEncoder, item: Item) -> np.ndarray:
        if item.image is not None:
            sizes.append(item.image.size)
        return prepare(self, item)
    monkeypatch.setattr(toy_encoder.ToyEncoder, "prepare", watched)
    monkeypatch.setattr(toy_encoder.ToyEncoder, "image_size", (50, 60), raising=False)
    small = SmallMbeir(tmp_path)
    for colour in COLOURS:
        Image.effect_noise((480, 400), 90).convert("RGB").save(small.image(colour), "JPEG")
    small.write()
    embedded_with(small, "embed.decoding=draft")
    embedded_with(small, "embed.decoding=exact")
    assert sizes == [(60, 50)] * 4 + [(480, 400)] * 4
    assert len(list((tmp_path / "work/artifacts/embed").glob("*pool*"))) == 2


def test_a_device_that_is_too_small_for_a_batch_is_given_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    encode = toy_encoder.ToyEncoder.encode

    def small_memory(self: toy_encoder.ToyEncoder, batch: Any) -> np.ndarray:
        if len(batch) > 1:
            raise torch.OutOfMemoryError
        return encode(self, batch)
    small = SmallMbeir(tmp_path).write()
    before = embedded(small, f"work_dir={tmp_path}/first")["pool"][1]
    monkeypatch.setattr(toy_encoder.ToyEncoder, "encode", small_memory)
    assert np.array_equal(embedded(small)["pool"][1], before)


def test_a_batch_size_may_be_left_to_be_found(tmp_path: Path) -> None:
    assert len(embedded(SmallMbeir(tmp_path).write(), "embed.batch_size=auto")["pool"][1]) == 4


def _with_interpreter(small: SmallMbeir, python: str) -> None:
    """The same encoder under the same name, run by an interpreter of its own."""
    piece = small.experiment.parent / "tests_toy_encoder.yaml"
    piece.write_text(f"encoder: tests.toy_encoder\npython: {python}\n")
    small.experiment.write_text(small.experiment.read_text().replace("[tests.toy_encoder]", f"[{piece}]"))


def test_an_encoder_may_have_an_interpreter_of_its_own(tmp_path: Path) -> None:
    here, there = (SmallMbeir(tmp_path / name).write() for name in ("here", "there"))
    told = tmp_path / "told"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$3" >> {told}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    _with_interpreter(there, str(python))
    ours, theirs = (sorted(path for path in _embedded_files(small)) for small in (here, there))
    assert [path.name for path in ours] == [path.name for path in theirs]
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    assert told.read_text().split() == ["pipeline.stages.embed:embed_here"]  # one process for all that it embeds


def _embedded_files(small: SmallMbeir) -> list[Path]:
    embedded(small)
    return list((small.experiment.parent / "work/artifacts/embed").rglob("*.parquet"))


def test_flaws_are_counted_in_another_interpreter_too(tmp_path: Path) -> None:
    small = SmallMbeir(tmp_path).write()
    _with_interpreter(small, sys.executable)
    small.image("red").write_text("not an image")
    with pytest.raises(UserError, match="1 items have a broken image, 0 tolerated"):
        embedded(small)


def test_a_missing_interpreter_is_told_before_anything_is_read(tmp_path: Path) -> None:
    small = SmallMbeir(tmp_path).write()
    _with_interpreter(small, "./nowhere/bin/python")
    with pytest.raises(UserError, match="runs in an environment of its own, whose .*/nowhere/bin/python is missing"):
        run_experiment(load(str(small.experiment)), [], print)
    assert not (small.experiment.parent / "work/artifacts").exists()
