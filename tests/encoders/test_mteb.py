"""mteb's models as encoders: what mteb's own loaders would give them, vectors equal to theirs, nothing run unasked."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import pytest
import torch
from mteb._create_dataloaders import create_dataloader
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from PIL import Image

from pipeline.encoders import Item
from pipeline.encoders import mteb as encoder_module
from pipeline.encoders.mteb import Params
from pipeline.support.errors import UserError

RANDOM = Params("mteb/baseline-random-encoder", "2")
OWN = "lab/own-model"
DIMENSION = 6


class Own:
    """A model of mteb's: word and colour counts, by a matrix; it writes down what it is given."""

    def __init__(self, model_name: str, revision: str | None, device: str = "cpu", embed_dim: int | None = None,
                 joins: str = "sum", **_: Any):
        self.calls: list[dict[str, Any]] = []
        self.device, self.joins, self.dimension = device, joins, embed_dim or DIMENSION
        self.weights = torch.randn(4, self.dimension, generator=torch.Generator().manual_seed(3))

    def encode(self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None,
               **options: Any) -> torch.Tensor:
        side = prompt_type.value
        prompt = task_metadata.prompt.get(side, "") if task_metadata.prompt else ""
        self.calls.append({"features": sorted(inputs.dataset.features), "side": side, "prompt": prompt,
                           "modalities": task_metadata.get_modalities(prompt_type), "type": task_metadata.type})
        parts: list[torch.Tensor] = []
        for batch in inputs:
            total = torch.zeros(1, self.dimension)
            if "image" in batch and not (self.joins == "text" and "text" in batch):
                colours = [np.asarray(image).mean((0, 1)) / 255 for image in batch["image"]]
                total = total + torch.tensor(np.array(colours), dtype=torch.float32) @ self.weights[:3]
            if "text" in batch:
                if self.joins == "raise" and "image" in batch:
                    raise ValueError("one or the other")
                lengths = [[float(len(prompt + text) + 1)] for text in batch["text"]]
                total = total + torch.tensor(lengths) @ self.weights[3:]
            parts.append(total)
        return torch.cat(parts).bfloat16() if self.joins == "bf16" else torch.cat(parts)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any: ...

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any: ...


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers the model above; called with what its description or its loader should say else."""
    def register(loader: Any = Own, **changes: Any) -> Params:
        loader_options = {name: changes.pop(name) for name in ("joins",) if name in changes}
        meta = ModelMeta.create_empty({"name": OWN, "revision": "7", "loader": loader, "embed_dim": DIMENSION,
                                       "modalities": ["text", "image"], "loader_kwargs": loader_options, **changes})
        monkeypatch.setitem(MODEL_REGISTRY, OWN, meta)
        return Params(OWN, "7")
    return register


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def items() -> list[Item]:
    return [Item("red circle", None), Item("", None), Item(None, None), Item(None, picture(1)), Item("", picture(1)),
            Item("red circle", picture(2)), Item("red circle", None, role="query"), Item("h\u00e9 \u4e2d", picture(3)),
            Item("long " * 5000, None)]


def vectors(encoder: Any, given: list[Item]) -> np.ndarray:
    found = encoder.encode([encoder.prepare(item) for item in given])
    assert found.dtype == np.float32 and found.shape == (len(given), encoder.dimension)
    return np.asarray(found)


def by_mteb(model: Any, item: Item, task_type: str = "Any2AnyRetrieval") -> np.ndarray:
    """One item through mteb's own loader, as a retrieval task of one row would send it."""
    columns: dict[str, Any] = {"id": ["x"]}
    if item.text or item.image is None:
        columns["text"] = [item.text or ""]
    if item.image is not None:
        columns["image"] = [item.image]
    letters = "".join(letter for letter, name in (("i", "image"), ("t", "text")) if name in columns)
    task = mteb.TaskMetadata.model_validate({
        "name": "Plumbline", "description": "x", "type": task_type, "category": f"{letters}2{letters}",
        "modalities": [name for name in ("image", "text") if name in columns], "eval_langs": ["eng-Latn"],
        "dataset": {"path": "none", "revision": "none"}, "main_score": "ndcg_at_10"})
    side = PromptType.query if item.role == "query" else PromptType.document
    loader = create_dataloader(datasets.Dataset.from_dict(columns), task_metadata=task, prompt_type=side)
    found = model.encode(loader, task_metadata=task, hf_split="test", hf_subset="default", prompt_type=side)
    return np.asarray(torch.as_tensor(found).float())[0]


def test_mtebs_random_baseline_gives_what_it_gives_mteb() -> None:
    encoder = encoder_module.build(RANDOM, "cpu", "fp32")
    assert encoder.dimension == 32 and encoder.modalities == {"text", "image", "image,text"}
    expected = [by_mteb(mteb.get_model(RANDOM.model), item) for item in items()]
    assert np.abs(vectors(encoder, items()) - expected).max() <= 1e-6 < 0.1 < np.abs(expected[0] - expected[1]).max()


def test_a_registered_model_gives_what_it_gives_mteb(own: Any) -> None:
    encoder = encoder_module.build(own(), "cpu", "fp32")
    model: Any = mteb.get_model(OWN)
    expected = [by_mteb(model, item) for item in items()]
    assert np.abs(vectors(encoder, items()) - expected).max() <= 1e-6 * np.abs(expected).max()
    encoder.model.calls.clear()
    vectors(encoder, items())
    seen = {(tuple(call["features"]), call["side"], tuple(call["modalities"])) for call in encoder.model.calls}
    assert seen == {(("body", "id", "text"), "document", ("text",)), (("id", "query", "text"), "query", ("text",)),
                    (("id", "image"), "document", ("image",)),
                    (("body", "id", "image", "text"), "document", ("image", "text"))}
    assert {(tuple(call["features"]), call["side"]) for call in model.calls} == {call[:2] for call in seen}


def test_no_vector_depends_on_its_neighbours(own: Any) -> None:
    for params in (RANDOM, own()):
        encoder = encoder_module.build(params, "cpu", "fp32")
        alone = np.concatenate([vectors(encoder, [item]) for item in items()])
        order = np.random.default_rng(0).permutation(len(alone))
        assert np.abs(vectors(encoder, [items()[row] for row in order]) - alone[order]).max() <= 1e-5
        assert np.array_equal(alone[1], alone[2]) and np.array_equal(alone[3], alone[4])


def test_prompts_are_the_tasks(own: Any) -> None:
    item = Item("find it red", None, "find it", "red", "query")
    cases = ((Params(OWN, "7"), "", "find it red"), (Params(OWN, "7", query_prompt="seek "), "seek ", "find it red"),
             (Params(OWN, "7", instruction_as="prompt"), "find it", "red"),
             (Params(OWN, "7", instruction_as="prompt", query_prompt="seek "), "find it", "red"))
    own()
    for params, prompt, text in cases:
        encoder = encoder_module.build(replace(params, task_type="Retrieval", candidate_prompt="of "), "cpu", "fp32")
        encoder.model.calls.clear()
        found = vectors(encoder, [item, Item("red", None)])
        calls = [(call["side"], call["prompt"], call["type"]) for call in encoder.model.calls]
        assert calls == [("query", prompt, "Retrieval"), ("document", "of ", "Retrieval")]
        expected = (len(prompt + text) + 1) * encoder.model.weights[3].numpy()
        assert np.abs(found[0] - expected).max() <= 1e-5


@pytest.mark.parametrize("joins, takes", [("sum", True), ("raise", False), ("text", False)])
def test_what_the_model_does_with_both_at_once_is_tried(own: Any, joins: str, takes: bool) -> None:
    encoder = encoder_module.build(own(joins=joins), "cpu", "fp32")
    assert encoder.modalities == {"text", "image"} | ({"image,text"} if takes else set())


def test_a_model_of_texts_takes_texts(own: Any) -> None:
    assert encoder_module.build(own(modalities=["text"]), "cpu", "fp32").modalities == {"text"}
    with pytest.raises(UserError, match="takes audio only"):
        encoder_module.build(own(modalities=["audio"]), "cpu", "fp32")


def test_half_precision_from_the_model_becomes_float32_and_the_dimension_is_measured(own: Any) -> None:
    encoder = encoder_module.build(replace(own(joins="bf16", embed_dim=[6, 3]), embed_dim=3), "cpu", "fp32")
    assert encoder.dimension == 3 and vectors(encoder, [Item("red", None)]).shape == (1, 3)


def refused(params: Params) -> str:
    with pytest.raises(UserError) as found:
        encoder_module.build(params, "cpu", "fp32")
    return str(found.value)


def test_mistakes_are_told(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs `revision`" in refused(replace(RANDOM, revision=None))
    assert "Expected 2" in refused(replace(RANDOM, revision="3"))
    assert "not found" in refused(Params("mteb/no-such-model", "1"))
    assert "late-interaction" in refused(Params("mteb/baseline-random-colbert", "2"))
    assert "cross-encoder" in refused(Params("mteb/baseline-random-cross-encoder", "2"))
    assert "no task of type 'Search'" in refused(replace(RANDOM, task_type="Search"))
    assert "in xx" in refused(replace(RANDOM, languages=["xx"]))
    assert "instruction_as" in refused(replace(RANDOM, instruction_as="both"))
    assert "embedding dimension 5" in refused(replace(own(), embed_dim=5))

    def no_file(*_: Any, **__: Any) -> Any:
        raise OSError("no such repository\nand more")

    assert "mteb cannot load this model: no such repository" in refused(own(loader=no_file))
    monkeypatch.setitem(sys.modules, "mteb", None)
    assert "pip install 'plumbline[mteb]'" in refused(RANDOM)


def test_dot_products_are_told(own: Any, caplog: pytest.LogCaptureFixture) -> None:
    encoder_module.build(own(similarity_fn_name=ScoringFunction.DOT_PRODUCT), "cpu", "fp32")
    assert "made for the dot" in caplog.text


def test_code_of_a_repository_runs_only_if_that_is_asked(own: Any, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that trusts its repository, as dozens in mteb do."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "code_of_model.OwnConfig"}}')
    (tmp_path / "code_of_model.py").write_text(
        "from pathlib import Path\nfrom transformers import PretrainedConfig\n"
        f"Path({str(tmp_path)!r}, 'ran').touch()\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def trusting(*arguments: Any, **options: Any) -> Own:
        from transformers import AutoConfig

        AutoConfig.from_pretrained(str(tmp_path), trust_remote_code=True)
        return Own(*arguments, **options)

    params = own(loader=trusting)
    assert "runs code from its repository" in refused(params) and not (tmp_path / "ran").exists()
    encoder_module.build(replace(params, trust_remote_code=True), "cpu", "fp32")
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    assert "runs code" in refused(params)


def test_the_fingerprint_sees_what_changes_vectors_and_imports_nothing() -> None:
    base = encoder_module.identity(RANDOM)
    changes: list[dict[str, Any]] = [
        {"model": "a/b"}, {"revision": "3"}, {"task_type": "Retrieval"}, {"languages": ["deu-Latn"]},
        {"query_prompt": "a"}, {"candidate_prompt": "a"}, {"instruction_as": "prompt"}, {"embed_dim": 3}]
    for change in changes:
        assert encoder_module.identity(replace(RANDOM, **change)) != base, change
    assert encoder_module.identity(replace(RANDOM, trust_remote_code=True)) == base
    code = ("import sys\nfrom pipeline.encoders import mteb\n"
            "mteb.identity(mteb.Params('mteb/baseline-random-encoder', '2'))\n"
            "print(*{'mteb', 'torch', 'transformers', 'datasets'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_params_come_from_yaml(tmp_path: Path) -> None:
    from pipeline.pieces import load_encoder_choice

    (tmp_path / "one.yaml").write_text('encoder: mteb\nmodel: a/b\nrevision: "1"\nlanguages: [deu-Latn, eng-Latn]\n')
    choice = load_encoder_choice(str(tmp_path / "one.yaml"))
    assert choice.params == Params("a/b", "1", languages=["deu-Latn", "eng-Latn"])
    assert choice.identity()["languages"] == ["deu-Latn", "eng-Latn"]
