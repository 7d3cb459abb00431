"""Find a plug-in by name: `name` is a file in a package of ours, `my_lab.module` is a user's own module."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from pipeline.support.errors import UserError, nearest


def plugin_names(package: str) -> list[str]:
    """Names of the modules in a package, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__))


def load_plugin(kind: str, package: str, name: str) -> ModuleType:
    """Import the plug-in; UserError with the nearest names if there is none of this name."""
    path = name if "." in name else f"{package}.{name}"
    try:
        found = importlib.util.find_spec(path)
    except ModuleNotFoundError:
        found = None
    if found is None:
        known = plugin_names(package)
        raise UserError(f"{kind} '{name}' is not known", do="\n".join(
            line for line in (nearest(name, known), f"all: {', '.join(known)} (or a dotted path to your own module)") if line))
    return importlib.import_module(path)
