"""The named pieces a configuration is put together from: files below configs/, or the user's own.

A piece is a name ("clip_sf_large"), a path to a YAML file, or, for an encoder, a dotted path to a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.encoders import load_encoder
from pipeline.sources import Source, read_file
from pipeline.support.errors import UserError, nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class EncoderChoice:
    """An encoder of this experiment: its readable name, its module and the module's parameters."""

    name: str
    module: str
    params: Any

    def identity(self) -> dict[str, Any]:
        """What the fingerprint of its embeddings sees; UserError if its weights are not there."""
        return {"module": self.module, **load_encoder(self.module).identity(self.params)}


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


def benchmark_piece(name: Any, where: str) -> tuple[str, str, Source]:
    if not isinstance(name, str):
        raise UserError("`benchmark` is a name in configs/benchmarks or a path", where)
    path = find("benchmarks", name)
    source = read_file(path, "benchmark.")
    return path.stem, "", Source({"benchmark.name": (path.stem, where), **source.values})


def task_names(piece: Source) -> list[str]:
    return list(dict.fromkeys(key.split(".")[2] for key in piece.values if key.startswith("benchmark.tasks.")))


def encoder_pieces(names: Any, where: str) -> Iterator[tuple[str, str, Source]]:
    """Each encoder's name, module and parameters; a dotted name is the user's own module with its defaults."""
    for name in [names] if isinstance(names, str) else names or []:
        if "." in name and not name.endswith((".yaml", ".yml")):
            yield name.replace(".", "_"), name, Source({})
            continue
        path = find("encoders", name)
        prefix = f"encoders.{path.stem}."
        values = {key: (_beside(path, value), where) for key, (value, where) in read_file(path, prefix).values.items()}
        if f"{prefix}encoder" not in values:
            raise UserError("this file names no encoder module", str(path), "add a line like `encoder: open_clip`")
        module, _ = values.pop(f"{prefix}encoder")
        yield path.stem, module, Source(values)


def _beside(path: Path, value: Any) -> Any:
    """A value that begins with ./ is a file beside the configuration that names it: both may be moved together."""
    return str(path.parent / value) if isinstance(value, str) and value.startswith("./") else value


def load_encoder_choice(name: str) -> EncoderChoice:
    """One encoder by itself, its parameters checked; UserError naming the file and what does not fit."""
    found, module, source = next(encoder_pieces([name], "command line"))
    prefix, where = f"encoders.{found}.", next((where for _, where in source.values.values()), name)
    values = {key.removeprefix(prefix): value for key, (value, _) in source.values.items()}
    try:
        typed = OmegaConf.merge(OmegaConf.structured(load_encoder(module).Params), values)
        return EncoderChoice(found, module, OmegaConf.to_object(typed))
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0], where) from None
