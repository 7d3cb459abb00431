"""Who may import whom: the picture of the house, and what stands in the files held against it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PIPELINE = Path(__file__).resolve().parents[1] / "pipeline"

# From the roof down. A module imports from lower floors; from its own only if that is not one of STRANGERS.
FLOORS: dict[str, tuple[str, ...]] = {
    "door": ("__main__",),
    "commands": ("cli", "commands", "cluster_commands", "report_commands", "compare_commands", "look_commands",
                 "rag_commands", "generate_commands"),
    "all of it": ("run", "bench", "for_mteb", "train", "training_set", "validation", "mining", "complements",
                  "generation"),
    "views": ("report", "rag", "status", "reasons", "garbage", "workers", "doctor", "look", "queue", "submission"),
    "plan": ("plan",),
    "configuration": ("config",),
    "options": ("settings", "pieces", "sources", "cluster"),
    "stages": ("stages.collect", "stages.embed", "stages.index", "stages.retrieve", "stages.score", "stages"),
    "between stages and knowledge": ("audit", "encoding", "loading", "training", "examination"),
    "knowledge": ("benchmarks", "encoders", "indexes", "metrics", "significance"),
    "contract": ("artifacts", "embeddings", "images", "tables", "tar_archive", "devices", "slurm"),
    "ground": ("support",),
}
STRANGERS = ("stages", "between stages and knowledge", "knowledge")
FLOOR_OF = {name: number for number, names in enumerate(FLOORS.values()) for name in names}
FLOOR_NAMES = tuple(FLOORS)


def house() -> dict[str, str]:
    """Dotted module name below `pipeline` -> source."""
    sources = {}
    for path in PIPELINE.rglob("*.py"):
        parts = path.relative_to(PIPELINE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            sources[name] = path.read_text()
    return sources


def room(module: str) -> str:
    """The name in the picture that a module belongs to: the longest that it starts with."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in FLOOR_OF:
            return ".".join(parts[:length])
    return module


def imported(source: str, modules: set[str]) -> set[str]:
    """Modules below `pipeline` that a source imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("pipeline.") in modules else str(node.module))
    return {name.removeprefix("pipeline.") for name in found if name.startswith("pipeline.")}


def violations(sources: dict[str, str]) -> list[str]:
    found = []
    for module, source in sources.items():
        for other in imported(source, set(sources)):
            here, there = room(module), room(other)
            if here not in FLOOR_OF or there not in FLOOR_OF:
                found.append(f"{here if here not in FLOOR_OF else there} has no place in the picture")
            elif here != there and not _may_know(FLOOR_OF[here], FLOOR_OF[there]):
                found.append(f"{module} imports {other}")
    return sorted(set(found))


def _may_know(floor: int, other: int) -> bool:
    return other > floor or (other == floor and FLOOR_NAMES[floor] not in STRANGERS)


def test_imports_go_down_only() -> None:
    assert violations(house()) == []


def test_the_picture_shows_the_house_as_it_is() -> None:
    modules = house()
    assert {room(module) for module in modules} == set(FLOOR_OF)
    assert len(FLOOR_OF) == sum(len(names) for names in FLOORS.values())


@pytest.mark.parametrize("module, source, broken", [
    ("support.errors", "from pipeline.tables import RUN", ["support.errors imports tables"]),
    ("stages.embed", "from pipeline.stages import collect", ["stages.embed imports stages.collect"]),
    ("stages.embed", "import pipeline.stages.collect", ["stages.embed imports stages.collect"]),
    ("stages.embed", "from pipeline.stages.collect import make", ["stages.embed imports stages.collect"]),
    ("metrics.order", "def f():\n    from pipeline import encoders", ["metrics.order imports encoders"]),
    ("settings", "from pipeline import plan", ["settings imports plan"]),
    ("wherever", "from pipeline.support import errors", ["wherever has no place in the picture"]),
    ("benchmarks.own", "from pipeline.benchmarks import mbeir\nfrom pipeline import __version__", []),
    ("report.text", "from pipeline import status\nimport numpy\nfrom pathlib import Path", []),
    ("embeddings", "from pipeline.support import errors", []),
])
def test_a_forbidden_import_is_found(module: str, source: str, broken: list[str]) -> None:
    others = ("stages.collect", "encoders", "plan", "support.errors", "benchmarks.mbeir", "status")
    assert violations({**dict.fromkeys(others, ""), module: source}) == broken
