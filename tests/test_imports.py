"""What is slow to import, or dangerous in the wrong order, is imported only where it is needed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Experiment

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "torchvision", "open_clip", "transformers", "faiss", "PIL", "sklearn", "scipy", "wandb")
PROBE = f"""
import sys
from importlib import import_module
{{action}}
print(*(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
"""
COMMAND = """
from pipeline.cli import main
arguments = json.loads(sys.argv[1])
code = main(arguments)
sys.stderr.write(f"code {code}\\n")
"""


def modules() -> list[str]:
    paths = sorted((ROOT / "pipeline").rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths
            if path.name != "__main__.py"]


def last_line(action: str, *arguments: str, directory: Path = ROOT) -> list[str]:
    """What the action writes to stderr, line by line; the last line names the heavy modules it imported."""
    command = [sys.executable, "-c", PROBE.format(action=action), *arguments]
    done = subprocess.run(command, cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_the_probe_sees_a_heavy_import() -> None:
    assert last_line("import PIL")[-1] == "PIL"


def test_no_module_imports_anything_heavy_by_being_imported() -> None:
    assert last_line(f"for name in {modules()}: import_module(name)")[-1] == ""


def heavy_of_command(arguments: list[str], directory: Path) -> tuple[str, str]:
    lines = last_line("import json" + COMMAND, json.dumps(arguments), directory=directory)
    return lines[-2], lines[-1]


def test_list_needs_nothing_heavy(tmp_path: Path) -> None:
    assert heavy_of_command(["list"], tmp_path) == ("code 0", "")


@pytest.mark.parametrize("command, code", [("plan", 0), ("status", 3), ("config", 0)])
def test_commands_that_only_look_need_nothing_heavy(command: str, code: int, tmp_path: Path) -> None:
    assert heavy_of_command([command, "quickstart"], tmp_path) == (f"code {code}", "")


@pytest.mark.parametrize("command", ["plan", "status"])
def test_nor_when_all_is_there(command: str, quick_run: Experiment, small_arguments: list[str],
                               tmp_path: Path) -> None:
    arguments = [command, "quickstart", f"work_dir={quick_run.work_dir}", *small_arguments]
    assert heavy_of_command(arguments, tmp_path) == ("code 0", "")


def misplaced(source: str) -> list[int]:
    """Lines that import faiss with no torch before it in the same function or at the top of the module."""
    return _misplaced(ast.parse(source), seen=False)


def _misplaced(scope: ast.AST, seen: bool) -> list[int]:
    found: list[int] = []
    inner: list[ast.AST] = []
    for node in _in_scope(scope):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inner.append(node)
        for name in _packages(node):
            seen = seen or name == "torch"
            if name == "faiss" and not seen:
                found.append(getattr(node, "lineno"))
    for function in inner:
        found.extend(_misplaced(function, seen))
    return found


def _in_scope(scope: ast.AST) -> list[ast.AST]:
    """Nodes in the order of the source, without the insides of functions and what only type checkers read."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(scope):
        found.append(node)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found.extend(_in_scope(node))
    return found


def _packages(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return [str(node.module).partition(".")[0]] if isinstance(node, ast.ImportFrom) else []


@pytest.mark.parametrize("source, lines", [
    ("import faiss\nimport torch", [1]),
    ("import torch\nimport faiss", []),
    ("import torch, faiss", []),
    ("def f():\n    import faiss\n", [2]),
    ("def f():\n    import torch\n    import faiss\n", []),
    ("import torch\ndef f():\n    from faiss import index_factory\n", []),
    ("def f():\n    import torch\ndef g():\n    import faiss\n", [4]),
    ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nimport faiss\n", [4]),
])
def test_the_order_of_torch_and_faiss_is_seen(source: str, lines: list[int]) -> None:
    assert misplaced(source) == lines


def test_torch_is_imported_before_faiss_everywhere() -> None:
    """In the other order there are two pools of OpenMP threads, and forked loaders can hang."""
    paths = [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    found = {str(path.relative_to(ROOT)): misplaced(path.read_text()) for path in paths}
    assert {name: lines for name, lines in found.items() if lines} == {}
