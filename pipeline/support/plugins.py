"""Find a plug-in by name: `name` is a file in a package of ours, `my_lab.module` is a user's own module.

A plug-in is a module that defines the functions its kind requires; other files in the folder are parts of plug-ins.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from pipeline.support.errors import UserError, nearest


def plugin_names(package: str, requires: Sequence[str]) -> list[str]:
    """Names of the plug-ins in a package, sorted; read from their source, because importing one may cost seconds."""
    folder = Path(importlib.import_module(package).__path__[0])
    wanted = [re.compile(rf"^(?:def {name}\(|class {name}\b|{name} = |from .* import .*\b{name}\b)", re.MULTILINE)
              for name in requires]
    return sorted(path.stem for path in folder.glob("[a-z]*.py")
                  if all(pattern.search(path.read_text()) for pattern in wanted))


def load_plugin(kind: str, package: str, name: str, requires: Sequence[str]) -> ModuleType:
    """Import the plug-in; UserError with the nearest names if there is none of this name, or with what it lacks."""
    path = name if "." in name else f"{package}.{name}"
    try:
        found = importlib.util.find_spec(path)
    except ModuleNotFoundError:
        found = None
    if found is None:
        known = plugin_names(package, requires)
        advice = [nearest(name, known), f"all: {', '.join(known)} (or a dotted path to your own module)"]
        raise UserError(f"{kind} '{name}' is not known", do="\n".join(line for line in advice if line))
    module = importlib.import_module(path)
    lacking = [function for function in requires if not hasattr(module, function)]
    if lacking:
        raise UserError(f"{kind} '{name}' defines no {', '.join(lacking)}", str(found.origin),
                        f"see pipeline/{package.split('.')[-1]}/__init__.py")
    return module
