"""UniIR's BLIP on transformers' towers (encoder uniir_blip) against the same model put together from LAVIS's classes.

LAVIS runs in .venv-lavis and writes what it finds: bash run_tests.sh --lavis
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from pipeline.encoders import Item, uniir_blip
from pipeline.encoders.blip_fusion import FeatureFusionEncoder, ScoreFusionEncoder
from pipeline.encoders.blip_texts import new_tokenizer
from pipeline.encoders.blip_towers import STOCK, empty_model
from tests.lavis import tiny, towers

ROOT = Path(__file__).parents[2]
LAVIS = os.environ.get("PLUMBLINE_LAVIS")
pytestmark = pytest.mark.skipif(LAVIS is None, reason="needs .venv-lavis: bash run_tests.sh --lavis runs this")
ENCODERS = {"score": ScoreFusionEncoder, "feature": FeatureFusionEncoder}
FUSIONS = tuple(ENCODERS)
NUMBER_OF_NAMES = {("score", "base"): 947, ("score", "large"): 1235, ("feature", "base"): 943,
                   ("feature", "large"): 1231}
TEXTS = (*tiny.TEXTS[:3], "a dog " * 200)
ITEMS = [(text, image) for text in (None, *TEXTS) for image in (None, "0.png", "1.png") if text or image]
FEW = [ITEMS[0], ("a red circle", None), ("two blue squares at night", "1.png")]  # the large towers take seconds


def from_lavis(folder: Path, architecture: dict[str, Any], given: list[tuple[str | None, str | None]]) -> None:
    """Let LAVIS write its vectors of the items, and the names of its weights."""
    assert LAVIS is not None
    words = tiny.vocabulary(folder).read_text().split()
    more = [f"more{number}" for number in range(architecture["text"]["vocabulary"] - 2 - len(words))]
    (folder / "vocab.txt").write_text("\n".join([*words, *more]) + "\n")
    for number, image in enumerate(tiny.images()):
        image.save(folder / f"{number}.png")
    (folder / "architecture.json").write_text(json.dumps(architecture))
    (folder / "items.json").write_text(json.dumps(given))
    done = subprocess.run([LAVIS, "-W", "ignore", "-m", "tests.lavis.towers", str(folder)], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def items(folder: Path, given: list[tuple[str | None, str | None]]) -> list[Item]:
    return [Item(text, None if name is None else Image.open(folder / name)) for text, name in given]


def encode(encoder: Any, wanted: list[Item]) -> np.ndarray:
    return encoder.encode([encoder.prepare(item) for item in wanted])


def largest_difference(encoder: Any, wanted: list[Item], expected: np.ndarray) -> float:
    alone = np.concatenate([encode(encoder, [item]) for item in wanted])
    return float(np.abs(alone - expected).max())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's checkpoints and LAVIS's vectors."""
    folder = tmp_path_factory.mktemp("towers")
    words = len(tiny.vocabulary(folder).read_text().split())
    text = {"width": 48, "layers": 2, "heads": 12, "vocabulary": words + 2, "positions": 60, "length": 40}
    from_lavis(folder, {"image_size": 32, "patch_size": 8, "embed_dim": 48,
                        "vision": {"width": 64, "layers": 3, "heads": 4}, "text": text}, ITEMS)
    return folder


def built(folder: Path, fusion: str) -> Any:
    params = uniir_blip.Params(str(folder / "architecture.json"), str(folder / f"{fusion}.pth"), fusion=fusion,
                               tokenizer=str(folder / "vocab.txt"))
    return uniir_blip.build(params, "cpu", "fp32")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_checkpoint_of_lavis_classes_loads_and_gives_its_vectors(fusion: str, small: Path) -> None:
    encoder, wanted = built(small, fusion), items(small, ITEMS)
    expected = load_file(small / "vectors.safetensors")[fusion]
    assert np.abs(expected).max() > 0.3 and len({row.tobytes() for row in expected}) >= len(ITEMS) - 2
    assert largest_difference(encoder, wanted, expected) == 0
    np.testing.assert_allclose(encode(encoder, wanted), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_goes_wrong_in_silence_would_be_seen(fusion: str, small: Path) -> None:
    expected = load_file(small / "vectors.safetensors")[fusion]
    encoder = built(small, fusion)
    for module in encoder.model.visual_encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5  # transformers' default
    assert largest_difference(encoder, items(small, ITEMS), expected) > 1e-6


@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", ["base", "large"])
def test_published_sizes_are_lavis_to_the_last_bit(size: str, tmp_path: Path) -> None:
    from_lavis(tmp_path, STOCK[size], FEW)
    names = json.loads((tmp_path / "names.json").read_text())
    vectors = load_file(tmp_path / "vectors.safetensors")
    for fusion in FUSIONS:
        distances = np.abs(vectors[fusion][:, None] - vectors[fusion][None]).max(-1)
        assert distances[~np.eye(len(FEW), dtype=bool)].min() > 1e-3
        assert len(names[fusion]) == NUMBER_OF_NAMES[fusion, size]
        params = uniir_blip.Params(size, seed=0, fusion=fusion, tokenizer=str(tmp_path / "vocab.txt"))
        model = empty_model(STOCK[size], fusion)
        shapes = {name: list(tensor.shape) for name, tensor in
                  uniir_blip.training_state(model.state_dict(), params).items() if "queue" not in name}
        assert shapes == {name: shape for name, shape in names[fusion].items() if "queue" not in name}
        model.load_state_dict(towers.redrawn(model.state_dict()), strict=True)
        tokenizer = new_tokenizer(params.tokenizer, STOCK[size]["text"]["length"])
        encoder = ENCODERS[fusion](STOCK[size], model, tokenizer, "cpu", "fp32")
        assert largest_difference(encoder, items(tmp_path, FEW), vectors[fusion]) == 0
