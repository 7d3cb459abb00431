"""Checkpoints: whole or not there, whenever the writing ends; what stays of them; what they are good for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from pipeline.encoders import Item, uniir_clip
from pipeline.pieces import load_encoder_choice
from pipeline.support.errors import UserError
from pipeline.training import saving
from pipeline.training.learning import new_optimiser, new_schedule
from pipeline.training.saving import Checkpoint, Checkpoints, write_encoder
from tests.training.tiny import ToyEncoder, params_of, tiny_clip

FACTS = {"asked": {"training.seed": 5}, "step": 3}


def configuration(weights: str) -> dict[str, Any]:
    return {"encoder": "tests.toy_encoder", "dimension": 8, "fusion": None, "weights": weights}


def model_of(value: float) -> Any:
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, value)
    return model


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", "toy")


def save(checkpoints: Checkpoints, step: int, value: float = 0.5) -> Checkpoint:
    state = {"number": value, "random": [torch.get_rng_state()]}
    return checkpoints.save(step, model_of(value), state, FACTS, configuration)


def value_of(checkpoint: Checkpoint) -> float:
    return float(checkpoint.tensors()["weight"][0, 0])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_what_is_saved_comes_back(checkpoints: Checkpoints) -> None:
    model = model_of(0.25)
    optimiser = new_optimiser(with_scale(model), params_of())
    schedule = new_schedule(optimiser, params_of(warmup=0.3), 10)
    model(torch.ones(3)).sum().backward()
    optimiser.step()
    schedule.step()
    state = {"optimiser": optimiser.state_dict(), "schedule": schedule.state_dict(),
             "random": [{"cpu": torch.get_rng_state()}]}
    checkpoint = checkpoints.save(3, model, state, FACTS, configuration)
    assert names(checkpoint.directory) == ["state.json", "state.pt", "toy.yaml", "weights.safetensors"]
    assert (checkpoint.step, checkpoint.is_resumable, checkpoint.facts()) == (3, True, FACTS)
    tensors = checkpoint.tensors()
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()}
    found = checkpoint.state()
    again = new_optimiser(with_scale(model_of(0)), params_of())
    again.load_state_dict(found["optimiser"])
    assert str(again.state_dict()) == str(optimiser.state_dict())
    assert found["schedule"] == schedule.state_dict()
    assert torch.equal(found["random"][0]["cpu"], state["random"][0]["cpu"])


def with_scale(model: Any) -> Any:
    model.logit_scale = torch.nn.Parameter(torch.tensor(1.0))
    return model


def dying(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def spoil_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors.torch, "save_file", half_written)


def half_written(_: Any, path: Path, *__: Any) -> None:
    Path(path).write_bytes(b"half")
    raise KeyboardInterrupt


DEATHS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "weights": spoil_weights,
    "state": lambda monkeypatch: monkeypatch.setattr(torch, "save", dying),
    "facts": lambda monkeypatch: monkeypatch.setattr(saving.json, "dumps", dying),
    "encoder": lambda monkeypatch: monkeypatch.setattr(saving, "write_encoder", dying),
    "flush": lambda monkeypatch: monkeypatch.setattr(saving, "flush", dying),
    "rename": lambda monkeypatch: monkeypatch.setattr(Path, "rename", dying),
}


@pytest.mark.parametrize("where", DEATHS)
@pytest.mark.parametrize("sweeps", [True, False], ids=["interrupted", "killed"])
def test_a_death_while_saving_leaves_the_former_ones(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch,
                                                     where: str, sweeps: bool) -> None:
    """Killed, it cannot even sweep: what is left must neither count as a checkpoint nor hinder the next one.

    The next one may have the number of the process that died, as in a container.
    """
    save(checkpoints, 2, 0.25)
    with monkeypatch.context() as dead, pytest.raises(KeyboardInterrupt):
        if not sweeps:
            dead.setattr(saving.shutil, "rmtree", lambda *_, **__: None)
        DEATHS[where](dead)
        save(checkpoints, 4, 0.5)
    assert [checkpoint.step for checkpoint in checkpoints.all()] == [2]
    assert sweeps == (names(checkpoints.directory) == ["step-00000002"])
    last = checkpoints.last()
    assert last is not None and last.step == 2 and value_of(last) == 0.25 and last.state()["number"] == 0.25
    assert value_of(save(checkpoints, 4, 0.75)) == 0.75
    checkpoints.prune(2, None)
    assert names(checkpoints.directory) == ["step-00000002", "step-00000004"], "nothing of the dead one stays"


def test_a_death_while_pruning_leaves_no_halves(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(checkpoints, step)
    with monkeypatch.context() as dead, pytest.raises(KeyboardInterrupt):
        dead.setattr(saving.shutil, "rmtree", removed_by_half)
        checkpoints.prune(1, None)
    for checkpoint in checkpoints.all():
        assert len(names(checkpoint.directory)) == 4
    save(checkpoints, 4)
    checkpoints.prune(1, None)
    assert names(checkpoints.directory) == ["step-00000004"]


def removed_by_half(directory: Path, **_: Any) -> None:
    (directory / "weights.safetensors").unlink(missing_ok=True)
    if directory.exists():
        raise KeyboardInterrupt


def test_a_checkpoint_of_the_same_step_is_replaced(checkpoints: Checkpoints) -> None:
    save(checkpoints, 7, 0.25)
    assert value_of(save(checkpoints, 7, 0.5)) == 0.5
    assert names(checkpoints.directory) == ["step-00000007"]


@pytest.mark.parametrize("keep, best, whole, weights_only", [
    (1, None, [5], []), (2, None, [4, 5], []), (2, 5, [4, 5], []), (2, 2, [4, 5], [2]), (1, 1, [5], [1]),
    (9, 1, [1, 2, 3, 4, 5], []), (2, 99, [4, 5], [])])
def test_the_last_stay_whole_and_of_the_best_the_weights(
        checkpoints: Checkpoints, keep: int, best: int | None, whole: list[int], weights_only: list[int]) -> None:
    for step in range(1, 6):
        save(checkpoints, step, step / 8)
    for _ in range(2):
        checkpoints.prune(keep, best)
        assert [found.step for found in checkpoints.all()] == sorted(whole + weights_only)
        assert [found.step for found in checkpoints.all() if found.is_resumable] == whole
    last = checkpoints.last()
    assert last is not None and last.step == 5
    for step in weights_only:
        found = checkpoints.at(step)
        assert names(found.directory) == ["state.json", "toy.yaml", "weights.safetensors"]
        assert value_of(found) == step / 8 and found.facts() == FACTS


def test_a_former_best_goes(checkpoints: Checkpoints) -> None:
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4)):
        save(checkpoints, step)
        checkpoints.prune(1, best)
    assert names(checkpoints.directory) == ["step-00000004", "step-00000006"]


def test_steps_are_ordered_by_number_and_none_is_fine(checkpoints: Checkpoints) -> None:
    assert checkpoints.all() == [] and checkpoints.last() is None
    for step in (999_999_999, 100_000_000, 99):
        save(checkpoints, step)
    assert [found.step for found in checkpoints.all()] == [99, 100_000_000, 999_999_999]


@pytest.mark.parametrize("content", [b"", b"garbage", b"half", None], ids=["empty", "garbage", "cut", "code"])
def test_a_damaged_state_is_named(checkpoints: Checkpoints, content: bytes | None) -> None:
    path = save(checkpoints, 3).directory / "state.pt"
    if content is None:
        torch.save({"number": print}, path)  # a function: code, which is never loaded
    else:
        path.write_bytes(path.read_bytes()[:-200] if content == b"half" else content)
    with pytest.raises(UserError, match="damaged") as caught:
        checkpoints.at(3).state()
    assert str(path) in str(caught.value) and "step-00000003" in str(caught.value.do)


@pytest.mark.parametrize("cut", [5, 10 ** 6])
def test_damaged_weights_are_named(checkpoints: Checkpoints, cut: int) -> None:
    checkpoint = save(checkpoints, 3)
    checkpoint.weights.write_bytes(checkpoint.weights.read_bytes()[:-cut])
    with pytest.raises(UserError, match="damaged") as caught:
        checkpoint.tensors()
    assert str(checkpoint.weights) in str(caught.value)


def test_damaged_facts_are_named(checkpoints: Checkpoints) -> None:
    checkpoint = save(checkpoints, 3)
    (checkpoint.directory / "state.json").write_text('{"asked": ')
    with pytest.raises(UserError, match="damaged") as caught:
        checkpoint.facts()
    assert "state.json" in str(caught.value)


def test_the_configuration_beside_it_is_an_encoder(tmp_path: Path, checkpoints: Checkpoints) -> None:
    """Loaded by its path, also after the directory was moved, it makes the vectors of the model that was saved."""
    encoder = tiny_clip(tmp_path)
    with torch.no_grad():
        encoder.model.logit_scale.fill_(2.0)
        encoder.model.visual.proj.add_(0.01)
    first = uniir_clip.Params(str(tmp_path / "tiny.json"), seed=3)
    checkpoint = checkpoints.save(12, encoder.model, {}, FACTS, lambda weights: {
        "encoder": "uniir_clip", **asdict(uniir_clip.with_weights(first, weights))})
    moved = tmp_path / "moved"
    checkpoint.directory.rename(moved)
    choice = load_encoder_choice(str(moved / "toy.yaml"))
    assert (choice.name, choice.module) == ("toy", "uniir_clip")
    assert choice.params == uniir_clip.Params(first.architecture, str(moved / "weights.safetensors"))
    again = uniir_clip.build(choice.params, "cpu", "fp32")
    batch = [encoder.prepare(Item(text, None)) for text in ("a red circle", "two")]
    np.testing.assert_array_equal(again.encode(batch), encoder.encode(batch))
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_an_encoders_configuration(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    write_encoder(path, configuration("./weights.safetensors"), "step 3")
    assert path.read_text().startswith("# Trained by Plumbline: step 3.\n")
    assert yaml.safe_load(path.read_text()) == {
        "encoder": "tests.toy_encoder", "dimension": 8, "weights": "./weights.safetensors"}


def test_facts_are_plain_json(checkpoints: Checkpoints) -> None:
    assert json.loads((save(checkpoints, 3).directory / "state.json").read_text()) == FACTS


def test_weights_in_any_layout_and_precision_come_back(checkpoints: Checkpoints) -> None:
    """Transposed views cannot be written as they lie; other number formats keep theirs."""
    model = ToyEncoder().model
    model.text_projection.data = torch.randn(5, 6).T.to(torch.bfloat16)
    saved = checkpoints.save(1, model, {}, FACTS, configuration).tensors()
    for name, tensor in model.state_dict().items():
        assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor)
