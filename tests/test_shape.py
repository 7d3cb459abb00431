"""House rules that can be counted: lengths, names, docstrings, ASCII, one place for every option's value."""

from __future__ import annotations

import ast
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from pipeline.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "pipeline").rglob("*.py"))
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in SOURCES}
FOLDERS = ("pipeline", "tests", "configs", "slurm", ".ci")
SUFFIXES = ("", ".py", ".yaml", ".sh", ".sbatch", ".md", ".html")
WRITTEN = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")
                 if path.suffix in SUFFIXES and path.is_file())
LONGEST_FILE, LONGEST_FUNCTION = 250, 40
FOREIGN_WORDS = re.compile(r"(^|_)(qids?|dids?|docs?|docids?|corpus|corpora)(_|$)", re.IGNORECASE)


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) > 40 and len(WRITTEN) > len(SOURCES)


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_functions_are_short() -> None:
    functions = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree)
                 if isinstance(node, ast.FunctionDef)]
    lengths = {f"{name}: {node.name}": (node.end_lineno or 0) - node.lineno + 1 for name, node in functions}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("path", [*WRITTEN, *ROOT.glob("*.sh"), *ROOT.glob("*.cfg"), *ROOT.glob("*.md")],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_ascii_without_tabs_and_trailing_blanks(path: Path) -> None:
    text = path.read_bytes()
    assert text.isascii() and b"\r" not in text
    assert not re.search(rb"[ \t]+\n|^\t", text, re.MULTILINE)


def test_every_module_says_what_it_promises() -> None:
    assert [name for name, tree in TREES.items() if tree.body and not ast.get_docstring(tree)] == []


def test_only_the_command_line_prints() -> None:
    printing = {name for name, tree in TREES.items() for node in ast.walk(tree)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"}
    assert all(name == "pipeline/cli.py" or name.endswith("commands.py") for name in printing), printing


def test_no_drawer_for_everything() -> None:
    names = {part for path in SOURCES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handlers"}


def test_one_word_for_one_thing() -> None:
    """Other projects' words for queries and candidates live only where their files are read or written."""
    used = {f"{name}: {word}" for name, tree in TREES.items() if not name.startswith("pipeline/benchmarks/")
            for word in _names(tree) if FOREIGN_WORDS.search(word)}
    assert used == set()


def _names(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found |= {node.id} - {"__doc__"}
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
    return found


def test_nothing_is_left_to_do() -> None:
    marks = re.compile(r"#.*\b(TODO|FIXME|XXX|HACK)\b")
    assert [str(path.relative_to(ROOT)) for path in SOURCES if marks.search(path.read_text())] == []


def test_base_yaml_is_the_one_place_of_all_values() -> None:
    """Every option stands in base.yaml and nothing else does; what has no default value there is ???."""
    base = yaml.safe_load((ROOT / "configs" / "base.yaml").read_text())
    assert set(_options(base)) == set(_options_of(Settings))
    assert {name for name, value in _options(base).items() if value == "???"} == {"benchmark", "encoders"}


def _options(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of options and their values; benchmark, encoders and unions are filled from elsewhere."""
    found = {}
    for name, value in section.items():
        if isinstance(value, dict) and value:
            found.update(_options(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def _options_of(kind: Any, prefix: str = "") -> list[str]:
    hints = get_type_hints(kind)
    found = []
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint) and field.name != "benchmark":
            found.extend(_options_of(hint, f"{prefix}{field.name}."))
        else:
            found.append(prefix + field.name)
    return found


@pytest.mark.parametrize("kind", ["benchmarks", "encoders", "experiments", "training", "golden"])
def test_every_configuration_begins_by_saying_what_it_is(kind: str) -> None:
    paths = sorted((ROOT / "configs" / kind).glob("*.yaml"))
    assert paths and [path.name for path in paths if not path.read_text().startswith("# ")] == []
