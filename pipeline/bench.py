"""bench: the comparisons of tests/speed, each a module with `Options` and `rows`, run by its file's name.

They are part of the checkout, not of the installed package. A row appears when it has been measured; what it holds is
said in tests/speed/comparison.py. Listing them imports none of them.
"""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.sources import read_command_line
from pipeline.support.errors import UserError, nearest
from pipeline.support.machine import machine
from pipeline.support.plugins import load_plugin, plugin_names

_PACKAGE, _REQUIRES = "tests.speed", ("Options", "rows")
_WIDTHS = {"name": 9, "work": 56, "ours": 9, "baseline": 9, "unit": 10, "ratio": 19, "equal": 8, "baseline_name": 0}
_NUMBERS = ("ours", "baseline")


def listing() -> str:
    """Every benchmark: its name, what it compares, its options and their defaults."""
    lines = ["python -m pipeline bench NAME [key=value ...] [--json]"]
    for name in _names():
        tree = ast.parse((_folder() / f"{name}.py").read_text())
        about = (ast.get_docstring(tree) or "?").splitlines()[0]
        lines += ["", f"{name:12}{about}", f"{'':12}{_defaults(tree)}"]
    return "\n".join(lines)


def _defaults(tree: ast.Module) -> str:
    options = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Options")
    values = {node.target.id: node.value for node in options.body
              if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value}
    return " ".join(f"{name}={_default(value)}" for name, value in values.items())


def _default(value: ast.expr) -> str:
    """As it is written on the command line; a list is inside a default_factory."""
    inner = next((node for node in ast.walk(value) if isinstance(node, ast.List)), value)
    try:
        return json.dumps(ast.literal_eval(inner), separators=(",", ":"))
    except ValueError:
        return "..."


def heading() -> str:
    """The machine and the day: figures mean nothing without them."""
    titles = {"baseline_name": "baseline and facts", "ratio": "ratio (spread)"}
    columns = {key: titles.get(key, key) for key in _WIDTHS}
    return f"{machine()}; {date.today()}\n\n{_line(columns)}"


def rows(name: str, overrides: Sequence[str]) -> Iterator[Any]:
    """The rows of a benchmark as they are measured; UserError if it, an option or a library it needs is not there."""
    module = _load(name)
    return iter(module.rows(_options(module, name, overrides)))


def _folder() -> Path:
    try:
        return Path(importlib.import_module(_PACKAGE).__path__[0])
    except ModuleNotFoundError:
        raise UserError("the benchmarks are not here: they are not part of the installed package", _PACKAGE,
                        "run from the root of the checkout, where tests/speed is") from None


def _names() -> list[str]:
    _folder()
    return plugin_names(_PACKAGE, _REQUIRES)


def _load(name: str) -> ModuleType:
    known = _names()
    if "." not in name and name not in known:
        advice = [nearest(name, known), f"all: {', '.join(known)}"]
        raise UserError(f"there is no benchmark '{name}'", "command line", "\n".join(line for line in advice if line))
    try:
        return load_plugin("benchmark", _PACKAGE, name, _REQUIRES)
    except ModuleNotFoundError as error:
        raise UserError(f"benchmark '{name}' needs {error.name}, which is not installed", None,
                        "install what the tests need: pip install -e '.[test]'") from error


def _options(module: Any, name: str, overrides: Sequence[str]) -> Any:
    chosen = OmegaConf.structured(module.Options)
    OmegaConf.set_readonly(chosen, False)  # a frozen dataclass makes a read-only node
    for key, (value, where) in read_command_line(overrides).values.items():
        if key not in chosen:
            advice = [nearest(key, map(str, chosen)), f"all: {', '.join(map(str, chosen))}"]
            raise UserError(f"'{key}' is not an option of benchmark {name}", where, "\n".join(filter(None, advice)))
        _set(chosen, key, value, where)
    return OmegaConf.to_object(chosen)


def _set(chosen: DictConfig, key: str, value: Any, where: str) -> None:
    try:
        OmegaConf.update(chosen, key, value, merge=False)
    except OmegaConfBaseException as error:
        raise UserError(f"{key}: {value!r} does not fit: {str(error).splitlines()[0]}", where) from None


def row_text(row: Any) -> str:
    """One line of the table, and under it what else is known."""
    spread = f" ({row.spread[0]:.3g}-{row.spread[1]:.3g})" if row.spread else ""
    shown = {key: _number(getattr(row, key)) for key in _WIDTHS}
    line = _line({**shown, "ratio": shown["ratio"] + spread})
    facts = ", ".join(f"{key} {value}" for key, value in row.facts.items())
    return f"{line}\n{'':{_WIDTHS['name']}}  {facts}" if facts else line


def _line(columns: dict[str, str]) -> str:
    cells = [f"{columns[key]:>{width}}" if key in _NUMBERS else f"{columns[key]:<{width}}"
             for key, width in _WIDTHS.items()]
    return "  ".join(cells).rstrip()


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
