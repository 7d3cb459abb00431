"""The examination passes encoders that keep the contract and finds whatever each of these breaks."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.encoders import Item
from pipeline.examination import Finding, examine
from pipeline.support.errors import UserError
from tests import toy_encoder
from tests.small_mbeir import SmallMbeir


class Sound:
    """Words and pixels as numbers of a random projection; texts are cut after 7 words."""

    dimension = 6
    modalities = frozenset({"text", "image", "image,text"})

    def prepare(self, item: Item) -> Any:
        words = (item.text or "").split()[:7]
        pixels = np.zeros(3) if item.image is None else np.asarray(item.image.convert("RGB")).mean(axis=(0, 1))
        return [*(sum(word.encode()) for word in words), len(words)], pixels

    def encode(self, batch: Sequence[Any]) -> np.ndarray:
        return np.stack([self.vector(*prepared) for prepared in batch])

    def vector(self, words: list[int], pixels: np.ndarray) -> np.ndarray:
        places_D = np.arange(1, 7)
        texts_D = sum((np.cos((place + 1) * word * places_D) for place, word in enumerate(words)), start=np.ones(6))
        return np.asarray(texts_D + np.sin(pixels @ np.ones((3, 6)) * places_D), np.float32)


class WrongShape(Sound):
    def encode(self, batch: Sequence[Any]) -> np.ndarray:
        return super().encode(batch)[:, :5]


class WrongType(Sound):
    def encode(self, batch: Sequence[Any]) -> np.ndarray:
        return super().encode(batch).astype(np.float64)


class NotFinite(Sound):
    def encode(self, batch: Sequence[Any]) -> np.ndarray:
        return super().encode(batch) * np.float32("nan")


class Constant(Sound):
    def encode(self, batch: Sequence[Any]) -> np.ndarray:
        return np.ones((len(batch), 6), np.float32)


class Dropout(Sound):
    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def encode(self, batch: Sequence[Any]) -> np.ndarray:
        return super().encode(batch) + self.random.normal(0, 0.01, (len(batch), 6)).astype(np.float32)


class Mates(Sound):
    def encode(self, batch: Sequence[Any]) -> np.ndarray:
        return super().encode(batch) + np.float32(0.01 * len(batch))


class Order(Sound):
    def encode(self, batch: Sequence[Any]) -> np.ndarray:
        return super().encode(sorted(batch, key=lambda prepared: prepared[0]))


class Unpicklable(Sound):
    def prepare(self, item: Item) -> Any:
        numbers, pixels = super().prepare(item)
        return numbers, pixels, lambda: None

    def vector(self, words: list[int], pixels: np.ndarray, *_: Any) -> np.ndarray:
        return super().vector(words, pixels)


class NoUnicode(Sound):
    def prepare(self, item: Item) -> Any:
        (item.text or "").encode("latin-1")
        return super().prepare(item)


class NoThinImages(Sound):
    def prepare(self, item: Item) -> Any:
        words, pixels = super().prepare(item)
        return words, pixels / (item.image is None or min(item.image.size) > 1)


class NothingIsNan(Sound):
    def vector(self, words: list[int], pixels: np.ndarray) -> np.ndarray:
        return super().vector(words, pixels) if len(words) > 1 or pixels.any() else np.full(6, np.nan, np.float32)


def examined(monkeypatch: pytest.MonkeyPatch, encoder: Any, precision: str = "fp32",
             identity: Any = lambda params: {}) -> dict[str, Finding]:
    module = types.ModuleType("examined_encoder")
    module.__dict__.update(Params=toy_encoder.Params, identity=identity, build=lambda *_: encoder())
    monkeypatch.setitem(sys.modules, "examined_encoder", module)
    monkeypatch.setattr("pipeline.examination._SECONDS", 0.0)
    monkeypatch.setattr("pipeline.examination.load_encoder", lambda name: sys.modules[name])
    with np.errstate(all="ignore"):
        return {found.name: found for found in examine("examined_encoder", toy_encoder.Params(), "cpu", precision)}


def test_a_sound_encoder_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(monkeypatch, Sound)
    assert not [finding for finding in found.values() if finding.state == "FAIL"]
    assert "cut after about 7 words such as 'word6'" in found["long texts"].detail
    assert found["a query and a candidate of one text"].detail == "same vector"
    assert {name for name in found if name.startswith("speed of")} == {
        "speed of text", "speed of image", "speed of image,text"}


@pytest.mark.parametrize("encoder, name", [
    (WrongShape, "shape"), (WrongType, "shape"), (NotFinite, "shape"), (Constant, "different items"),
    (Dropout, "repetition"), (Mates, "batch mates and order"), (Order, "batch mates and order"),
    (Unpicklable, "exception"), (NoUnicode, "exception"), (NoThinImages, "unusual images"),
    (NothingIsNan, "empty text")])
def test_what_an_encoder_breaks_is_found(monkeypatch: pytest.MonkeyPatch, encoder: Any, name: str) -> None:
    found = examined(monkeypatch, encoder)
    assert found[name].state == "FAIL" and found[name].do


def test_only_what_an_encoder_takes_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Images(Sound):
        modalities = frozenset({"image"})

        def prepare(self, item: Item) -> Any:
            assert item.text is None
            return super().prepare(item)

    found = examined(monkeypatch, Images)
    assert not [finding for finding in found.values() if finding.state == "FAIL"]
    assert "long texts" not in found and "speed of image" in found


def test_lower_precision_is_held_to_less(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rounded(Sound):
        def encode(self, batch: Sequence[Any]) -> np.ndarray:
            return super().encode(batch) * np.float32(1 + 1e-3 * (len(batch) > 1))

    assert examined(monkeypatch, Rounded)["batch mates and order"].state == "FAIL"
    assert examined(monkeypatch, Rounded, "fp16")["batch mates and order"].state == "ok"


def test_an_identity_that_wavers_and_a_mistake_of_the_user_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(10))
    assert examined(monkeypatch, Sound, identity=lambda params: {"number": next(numbers)})["identity"].state == "FAIL"

    def refused() -> Any:
        raise UserError("no weights", "there", "fetch them")

    assert examined(monkeypatch, refused)["build"] == ("FAIL", "build", "no weights  [there]", "fetch them", None)


def test_the_command_examines_what_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = SmallMbeir(tmp_path).write()
    assert main(["doctor", str(small.experiment)]) == 0
    shown = capsys.readouterr().out
    assert "encoder tests_toy_encoder" in shown and "1,000 words are all read" in shown
    broken = tmp_path / "broken.yaml"
    broken.write_text("encoder: tests.toy_encoder\npython: ./nowhere\n")
    assert main(["doctor", str(small.experiment), "--encoder", str(broken)]) == 1
    assert "FAIL  environment" in capsys.readouterr().out
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(f"encoder: tests.toy_encoder\npython: {sys.executable}\n")
    assert main(["doctor", str(small.experiment), "--encoder", str(elsewhere), "--json"]) == 0
    assert '"state": "FAIL"' not in capsys.readouterr().out
