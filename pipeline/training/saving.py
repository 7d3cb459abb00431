"""Checkpoints: directories that are whole or not there; the last few are kept whole, of the best only the weights.

    checkpoints/step-00000500/weights.safetensors    the model: names and shapes as the encoder loads them
                              <name>.yaml            the encoder's configuration: `encoders: [<this file>]` uses it
                              state.pt               optimiser, schedule, scaler, random states; loads without code
                              state.json             step, and what the training was asked for

A directory is written under a hidden name, flushed and renamed, so that a kill at any moment leaves the former one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts import flush
from pipeline.encoders.checkpoints import save_safetensors
from pipeline.support.errors import UserError

Configuration = Callable[[str], Mapping[str, Any]]  # weights file -> configuration of the encoder with it
WEIGHTS, STATE, FACTS = "weights.safetensors", "state.pt", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    directory: Path

    @property
    def step(self) -> int:
        return int(self.directory.name.removeprefix("step-"))

    @property
    def weights(self) -> Path:
        return self.directory / WEIGHTS

    @property
    def is_resumable(self) -> bool:
        return (self.directory / STATE).exists()

    def facts(self) -> dict[str, Any]:
        """What `save` was given; UserError if the file is damaged, as for all three."""
        return dict(self._read(FACTS, lambda path: json.loads(path.read_text())))

    def state(self) -> dict[str, Any]:
        import torch
        return dict(self._read(STATE, lambda path: torch.load(path, map_location="cpu", weights_only=True)))

    def tensors(self) -> dict[str, Any]:
        from safetensors.torch import load_file
        return dict(self._read(WEIGHTS, load_file))

    def _read(self, file: str, read: Callable[[Path], Any]) -> Any:
        path = self.directory / file
        try:
            return read(path)
        except Exception as error:  # torch.load has no error type of its own, the bytes decide
            raise UserError(f"this checkpoint is damaged ({type(error).__name__})", str(path),
                            f"go back to the one before it: rm -r {self.directory}") from error


@dataclass(frozen=True)
class Checkpoints:
    """Those of one training, in `directory`; `name` names the encoder's configuration."""

    directory: Path
    name: str

    def all(self) -> list[Checkpoint]:
        return sorted((Checkpoint(path) for path in self.directory.glob("step-*")), key=lambda found: found.step)

    def last(self) -> Checkpoint | None:
        resumable = [checkpoint for checkpoint in self.all() if checkpoint.is_resumable]
        return resumable[-1] if resumable else None

    def at(self, step: int) -> Checkpoint:
        return Checkpoint(self.directory / f"step-{step:08d}")

    def save(self, step: int, model: Any, state: Mapping[str, Any], facts: Mapping[str, Any],
             encoder: Configuration) -> Checkpoint:
        """Write the checkpoint of a step, over one that is there already."""
        import torch
        target = self.at(step)
        with _whole(target.directory) as temporary:
            save_safetensors({name: tensor.cpu() for name, tensor in model.state_dict().items()}, temporary / WEIGHTS)
            torch.save(dict(state), temporary / STATE)
            (temporary / FACTS).write_text(json.dumps(dict(facts), indent=1, sort_keys=True) + "\n")
            write_encoder(temporary / f"{self.name}.yaml", encoder(f"./{WEIGHTS}"), f"step {step}")
        return target

    def prune(self, keep: int, best: int | None) -> None:
        """Keep the last `keep` whole, and the weights of the best."""
        for checkpoint in self.all()[:-keep]:
            if checkpoint.step != best:
                _remove(checkpoint.directory)
            else:
                (checkpoint.directory / STATE).unlink(missing_ok=True)


def write_encoder(path: Path, encoder: Mapping[str, Any], origin: str) -> None:
    """An encoder's configuration: its module and parameters."""
    given = {key: value for key, value in encoder.items() if value is not None}
    path.write_text(f"# Trained by Plumbline: {origin}.\n" + yaml.safe_dump(given, sort_keys=False))


@contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """A hidden directory to write to, which becomes `directory` at the end, or nothing."""
    temporary = directory.with_name(f".{directory.name}.tmp-{os.getpid()}")
    former = directory.with_name(f".{directory.name}.former-{os.getpid()}")
    for left in directory.parent.glob(".step-*"):  # by a kill; in a container the number of its process may be ours
        shutil.rmtree(left)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            flush(path)
        if directory.exists():
            directory.rename(former)
        temporary.rename(directory)
        flush(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def _remove(directory: Path) -> None:
    """Under a hidden name, so that a kill leaves no half of a checkpoint."""
    hidden = directory.with_name(f".{directory.name}.former-{os.getpid()}")
    shutil.rmtree(hidden, ignore_errors=True)
    directory.rename(hidden)
    shutil.rmtree(hidden)
