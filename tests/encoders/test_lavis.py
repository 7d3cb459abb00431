"""The encoder `lavis` as the main environment sees it: parameters, identity, pins, and what is said without LAVIS.

What it encodes is compared in tests/lavis, with LAVIS.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from safetensors.torch import save_file

from pipeline.encoders import lavis
from pipeline.encoders.lavis import Params
from pipeline.encoders.lavis_models import ALBEF, BLIP, BLIP2, CLIP
from pipeline.pieces import load_encoder_choice
from pipeline.support.errors import UserError

ROOT = Path(__file__).parents[2]
ARCHITECTURE = "encoders/architectures/lavis_blip_base.json"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    return str(tmp_path / "vocab.txt")


def seeded(vocabulary: str, **changes: Any) -> Params:
    return Params(**{"kind": BLIP, "architecture": ARCHITECTURE, "seed": 0, "tokenizer": vocabulary, **changes})


def pins(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return {f"{line.partition('==')[0]}{line.partition(';')[2]}": Requirement(line)
            for line in lines if not line.startswith("#")}


def test_identity_is_content_and_settings(vocabulary: str, tmp_path: Path) -> None:
    found = lavis.identity(seeded(vocabulary))
    assert found == {**found, "kind": BLIP, "joined": "sum", "text_processor": "blip_caption", "max_words": 50,
                     "seed": 0, "lavis": "1.0.2"}
    assert "torch" not in json.dumps(found) and str(tmp_path) not in json.dumps(found)
    changes: list[dict[str, Any]] = [
        {"seed": 1}, {"joined": "multimodal"}, {"text_processor": "none"}, {"max_words": 9}, {"text_length": 35},
        {"kind": ALBEF}, {"architecture": "encoders/architectures/lavis_blip_base_384.json"}]
    others = [json.dumps(lavis.identity(seeded(vocabulary, **change)), sort_keys=True) for change in changes]
    assert len({json.dumps(found, sort_keys=True), *others}) == len(changes) + 1


def test_identity_follows_files_and_not_their_names(vocabulary: str, tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        save_file({"x": torch.tensor(value)}, tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in "abc"]
    a, b, c = (lavis.identity(seeded(vocabulary, seed=None, weights=path)) for path in files)
    assert a == b != c and "seed" not in a and "lavis" not in a
    tower = lavis.identity(seeded(vocabulary, seed=None, kind=BLIP2, weights=files[0], vision_weights=files[2]))
    assert tower["vision_weights"] == c["weights"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "vocab.txt").write_text(Path(vocabulary).read_text())
    assert lavis.identity(seeded(vocabulary)) == lavis.identity(seeded(str(elsewhere)))  # a directory will do
    (elsewhere / "vocab.txt").write_text("[PAD]\n")
    assert lavis.identity(seeded(vocabulary)) != lavis.identity(seeded(str(elsewhere)))


@pytest.mark.parametrize("change, message", [
    ({"kind": "blip"}, "kind 'blip' is not known"),
    ({"joined": "both"}, "joined 'both' is not known"),
    ({"text_processor": "caption"}, "text_processor 'caption' is not known"),
    ({"seed": None}, "exactly one of the two"),
    ({"tokenizer": None}, "needs `tokenizer`"),
    ({"tokenizer": "/nowhere/vocab.txt"}, "vocabulary not found"),
    ({"vision_weights": "tower.pth"}, "goes with the `weights` of a BLIP-2"),
    ({"architecture": "encoders/architectures/tiny_clip.json"}, "architecture lacks vision, text"),
    ({"kind": CLIP, "architecture": "ViT-B-32-quickgelu"}, "CLIP has neither"),
    ({"kind": CLIP, "architecture": "ViT-B-32-quickgelu", "tokenizer": None, "joined": "multimodal"},
     "CLIP has neither"),
])
def test_what_does_not_go_together_is_refused(change: dict[str, Any], message: str, vocabulary: str) -> None:
    with pytest.raises(UserError, match=message):
        lavis.identity(seeded(vocabulary, **change))


def test_clip_needs_no_vocabulary() -> None:
    found = lavis.identity(Params(CLIP, "ViT-B-32-quickgelu", seed=0))
    assert found["text_processor"] == "none" and "tokenizer" not in found and "max_words" not in found


@pytest.mark.skipif(find_spec("lavis") is not None, reason="this environment has salesforce-lavis")
def test_without_lavis_one_sentence_says_what_to_run(vocabulary: str) -> None:
    with pytest.raises(UserError) as caught:
        lavis.build(seeded(vocabulary), "cpu", "fp32")
    assert str(caught.value).splitlines() == [
        f"salesforce-lavis cannot be imported by this Python: No module named 'lavis'    [{sys.executable}]",
        "       bash environment.sh lavis   makes .venv-lavis, whose Python the encoder's file names:",
        "       python: .venv-lavis/bin/python"]


def test_our_module_is_not_in_the_way_of_theirs() -> None:
    """Both are called lavis; only a path inside the package could make ours the other."""
    code = ("import sys; from pipeline.encoders import lavis; import importlib.util as util;"
            "found = util.find_spec('lavis'); print(lavis.__name__, found is None or 'site-packages' in found.origin)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "pipeline.encoders.lavis True\n"


def test_identity_does_not_import_torch(vocabulary: str) -> None:
    code = ("import sys; from pipeline.encoders import lavis;"
            f"lavis.identity(lavis.Params('{BLIP}', '{ARCHITECTURE}', seed=0, tokenizer={vocabulary!r}));"
            "print([name for name in ('torch', 'transformers', 'PIL') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/encoders").glob("lavis_*.yaml")), ids=lambda path: path.stem)
def test_published_models_name_the_second_environment(path: Path) -> None:
    choice = load_encoder_choice(path.stem)
    assert choice.module == "lavis" and choice.python == str(Path.cwd() / ".venv-lavis/bin/python")
    assert path.read_text().startswith("# LAVIS")
    with pytest.raises(UserError, match="not found"):  # nothing but files is missing
        choice.identity()


def test_the_pins_are_exact_and_compute_as_the_main_environments() -> None:
    ours, main = pins("constraints-lavis.txt"), pins("constraints.txt")
    assert all([each.operator for each in pin.specifier] == ["=="] and pin.url is None for pin in ours.values())
    assert ours["salesforce-lavis"].specifier.contains(lavis.VERSION)
    assert ours["transformers"].specifier.contains("4.55.4")  # the last release with which LAVIS can be imported
    same = {name: str(pin) for name, pin in ours.items()
            if pin.name in ("torch", "torchvision", "numpy", "pillow", "pyarrow", "omegaconf", "open-clip-torch")}
    assert len(same) == 8 and same == {name: str(main[name]) for name in same}


def test_conda_installs_the_same_pins() -> None:
    text = (ROOT / "environment-lavis.yml").read_text()
    assert text.startswith("# PIP_NO_DEPS=1 conda env create")
    assert yaml.safe_load(text)["dependencies"] == ["python=3.11", "pip", {"pip": ["-r constraints-lavis.txt"]}]
