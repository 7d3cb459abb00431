"""What setup.cfg asks for, and what of it this Python lacks.

`python -m pipeline.support.requirements [--missing] core|test` runs before anything is installed, so it needs
the standard library alone. It reads metadata and imports no package: to learn torch's version by importing it
would cost seconds. The price: setup.cfg may ask only for `name` or `name>=version`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version

from pipeline.support.errors import UserError

SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"
_LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:>=(?P<least>\d+(?:\.\d+)*))?")
# Packages of another name that bring the same module.
_SAME = {"faiss-cpu": ("faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu13", "faiss")}


def requirements(extras: Sequence[str] = (), setup: Path = SETUP) -> list[str]:
    """Requirement lines of setup.cfg in its order, those of the extras after those of the core, each once."""
    parser = _parsed(setup)
    texts = [parser["options"]["install_requires"]]
    texts += [parser["options.extras_require"][extra] for extra in extras]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    for line in lines:
        if not _LINE.fullmatch(line):
            raise UserError(f"'{line}' is not of the form name or name>=version", str(setup))
    return list(dict.fromkeys(lines))


def python_flaw(setup: Path = SETUP) -> str:
    """Why this Python is too old for setup.cfg, or nothing."""
    least = _parsed(setup)["options"]["python_requires"].removeprefix(">=")
    if _release(python_version()) >= _release(least):
        return ""
    return f"Python is {python_version()}, not >={least}"


def missing(lines: Sequence[str]) -> list[str]:
    """One phrase for each requirement that this Python does not meet."""
    found = [_flaw(line) for line in lines]
    return [flaw for flaw in found if flaw]


def _parsed(setup: Path) -> ConfigParser:
    parser = ConfigParser()
    parser.read_string(setup.read_text(), str(setup))
    return parser


def _flaw(line: str) -> str:
    parsed = _LINE.fullmatch(line)
    assert parsed is not None
    name, least = parsed["name"], parsed["least"] or "0"
    installed = _installed(name)
    if installed is None:
        return f"{name} is not installed"
    return f"{name} is {installed}, not >={least}" if _release(installed) < _release(least) else ""


def _installed(name: str) -> str | None:
    for candidate in (name, *_SAME.get(name, ())):
        try:
            return version(candidate)
        except PackageNotFoundError:
            continue
    return None


def _release(text: str) -> tuple[int, ...]:
    """Numbers of a version without trailing zeros: "2.15.0+cu132" -> (2, 15)."""
    numbers = re.match(r"\d+(?:\.\d+)*", text)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _few(flaws: Sequence[str], shown: int = 3) -> str:
    """The first flaws and the number of the others: this becomes one line on a terminal."""
    rest = [f"and {len(flaws) - shown} more"] if len(flaws) > shown else []
    return "; ".join([*flaws[:shown], *rest])


def main(arguments: Sequence[str]) -> int:
    options = [argument for argument in arguments if argument.startswith("-")]
    lines = requirements([argument for argument in arguments if argument not in ("core", *options)])
    if "--missing" in options:
        sys.stdout.write(python_flaw() or _few(missing(lines)))
    else:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
