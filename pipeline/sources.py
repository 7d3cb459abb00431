"""Values and where they stand: YAML files and `key=value` arguments, flattened, each value with its file and line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.support.errors import UserError


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is many times faster, where PyYAML has it


@dataclass(frozen=True)
class Source:
    """Values from one place, flat: dotted key -> (value, where it stands)."""

    values: Mapping[str, tuple[Any, str]]


def read_file(path: Path, prefix: str = "") -> Source:
    """The values of a YAML file, `prefix` before every key; UserError with file and line if it is not valid."""
    try:
        loaded = OmegaConf.load(path)
        lines = dict(_lines(yaml.compose(path.read_text(), Loader=_LOADER), prefix))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"not valid YAML: {getattr(error, 'problem', None) or error}", where) from None
    if not isinstance(loaded, DictConfig):
        raise UserError("a configuration file is a list of `key: value` lines", str(path))
    plain = OmegaConf.to_container(loaded, resolve=False)
    assert isinstance(plain, dict)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return Source({prefix + key: (value, f"{shown}:{lines.get(prefix + key, 1)}") for key, value in _leaves(plain)})


def _lines(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _lines(value, f"{prefix}{key.value}.")


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_command_line(overrides: Sequence[str]) -> Source:
    """`key=value` arguments; a value is YAML, and a mapping overrides only the keys it names."""
    values: dict[str, tuple[Any, str]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}' is not of the form key=value", "command line")
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
            value = parsed["value"]  # type: ignore[index,call-overload]
        except (yaml.YAMLError, OmegaConfBaseException):
            raise UserError(f"the value of '{override}' is not valid YAML", "command line",
                            "quote it: 'key=[a, b]'") from None
        leaves = _leaves(value, f"{key}.") if isinstance(value, dict) else [(key, value)]
        values.update({leaf: (inner, "command line") for leaf, inner in leaves})
    return Source(values)
