"""The named pieces a configuration is put together from: files below configs/, or the user's own.

A piece is a name ("clip_sf_large"), a path to a YAML file, or, for an encoder, a dotted path to a module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.encoders import load_encoder
from pipeline.sources import Source, read_file
from pipeline.support.errors import UserError, nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class EncoderChoice:
    """An encoder of this experiment: its readable name, its module and the module's parameters.

    `python`: the interpreter that runs it, of another environment than this one; None is this one.
    """

    name: str
    module: str
    params: Any
    python: str | None = None

    def identity(self) -> dict[str, Any]:
        """What the fingerprint of its embeddings sees; UserError if its weights are not there."""
        return {"module": self.module, **load_encoder(self.module).identity(self.params)}

    def check_interpreter(self) -> None:
        """UserError if the environment that this encoder runs in is not there."""
        if self.python is not None and not os.access(self.python, os.X_OK):
            advice = getattr(load_encoder(self.module), "ENVIRONMENT", "make that environment")
            raise UserError(f"encoder '{self.name}' runs in an environment of its own, whose {self.python} is missing",
                            None, f"{advice}, or name its interpreter as `python` in the encoder's file")


class EncoderPiece(NamedTuple):
    """One encoder of a configuration before its values are checked."""

    name: str
    module: str
    source: Source
    python: str | None = None


def available(kind: str) -> list[str]:
    """Names in configs/<kind>."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


def find(kind: str, name: str) -> Path:
    """The file of a named piece of configuration; a path to a YAML file is taken as it is."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"there is no file {name}")
        return path
    path = CONFIGS / kind / f"{name}.yaml"
    if not path.is_file():
        known = available(kind)
        raise UserError(f"{kind[:-1]} '{name}' is not known", do="\n".join(
            line for line in (nearest(name, known), f"all: {', '.join(known)} (or a path to a .yaml file)") if line))
    return path


def benchmark_piece(name: Any, where: str) -> Source:
    if not isinstance(name, str):
        raise UserError("`benchmark` is a name in configs/benchmarks or a path", where)
    path = find("benchmarks", name)
    source = read_file(path, "benchmark.")
    return Source({"benchmark.name": (path.stem, where), **source.values})


def task_names(piece: Source) -> list[str]:
    return list(dict.fromkeys(key.split(".")[2] for key in piece.values if key.startswith("benchmark.tasks.")))


def encoder_pieces(names: Any, where: str) -> Iterator[EncoderPiece]:
    """Each encoder that is named; a dotted name is the user's own module with its defaults."""
    for name in [names] if isinstance(names, str) else names or []:
        if "." in name and not name.endswith((".yaml", ".yml")):
            yield EncoderPiece(name.replace(".", "_"), name, Source({}))
            continue
        path = find("encoders", name)
        prefix = f"encoders.{path.stem}."
        values = {key: (_beside(path, value), where) for key, (value, where) in read_file(path, prefix).values.items()}
        if f"{prefix}encoder" not in values:
            raise UserError("this file names no encoder module", str(path), "add a line like `encoder: open_clip`")
        module, _ = values.pop(f"{prefix}encoder")
        python, _ = values.pop(f"{prefix}python", (None, where))
        yield EncoderPiece(path.stem, module, Source(values), None if python is None else _interpreter(python))


def _interpreter(python: Any) -> str:
    """Its path, made absolute; links stay, since it is by its own path that Python knows its environment."""
    plain = OmegaConf.to_container(OmegaConf.create({"python": python}), resolve=True)
    return str(Path.cwd() / Path(str(cast("dict[str, Any]", plain)["python"])).expanduser())


def _beside(path: Path, value: Any) -> Any:
    """A value that begins with ./ is a file beside the configuration that names it: both may be moved together."""
    return str(path.parent / value) if isinstance(value, str) and value.startswith("./") else value


def load_encoder_choice(name: str) -> EncoderChoice:
    """One encoder by itself, its parameters checked; UserError naming the file and what does not fit."""
    piece = next(encoder_pieces([name], "command line"))
    prefix, where = f"encoders.{piece.name}.", next((where for _, where in piece.source.values.values()), name)
    values = {key.removeprefix(prefix): value for key, (value, _) in piece.source.values.items()}
    try:
        typed = OmegaConf.structured(load_encoder(piece.module).Params)
        OmegaConf.set_readonly(typed, False)  # as frozen dataclasses make it
        for key, value in values.items():
            OmegaConf.update(typed, key, value, merge=False)
        return EncoderChoice(piece.name, piece.module, OmegaConf.to_object(typed), piece.python)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0], where) from None
