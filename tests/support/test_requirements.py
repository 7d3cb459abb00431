"""The lists of packages agree with each other, with the code, and with what is installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pipeline.support import requirements as asked
from pipeline.support.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CORE, TEST = asked.requirements(), asked.requirements(["test"])
OPTIONAL = asked.requirements(["wandb", "sentence-transformers", "mteb", "endpoint", "generate", "rag", "siglip",
                               "pictures"])
PYTHONS = ("3.11.7", "3.12.1", "3.13.0")
PROJECT_OF = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn", "faiss": "faiss-cpu",
              "open_clip": "open_clip_torch", "pytrec_eval": "pytrec_eval-terrier", "markdown_it": "markdown-it-py"}
UNNAMED = {"torchvision"}  # open_clip needs it, and it must fit torch


def names(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned(python: str, system: str = "linux") -> dict[str, Version]:
    """Exact versions that a Python on a system gets."""
    facts = {key: str(value) for key, value in default_environment().items()}
    facts |= {"python_full_version": python, "python_version": python.rpartition(".")[0],
              "sys_platform": system, "platform_system": system.capitalize()}
    found: dict[str, Version] = {}
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate(facts):
            name = canonicalize_name(pin.name)
            assert name not in found, f"{name} is pinned twice"
            found[name] = Version(str(pin.specifier).removeprefix("=="))
    return found


def imports(folder: str) -> set[str]:
    """Third-party packages that the code in a folder imports, by the name of their project."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    third = found - set(sys.stdlib_module_names) - {"pipeline", "tests", "conftest"}
    return {str(canonicalize_name(PROJECT_OF.get(name, name))) for name in third}


def test_every_import_is_asked_for_and_every_request_is_used() -> None:
    assert imports("pipeline") <= names(OPTIONAL)
    assert names(CORE) - UNNAMED <= imports("pipeline")
    assert imports("tests") <= names(TEST)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_every_request_has_one_pin_that_meets_it(python: str, system: str) -> None:
    found = pinned(python, system)
    for line in [*TEST, *OPTIONAL]:
        request = Requirement(line)
        assert found[canonicalize_name(request.name)] in request.specifier


@pytest.mark.parametrize("python", PYTHONS)
def test_torch_and_torchvision_are_a_pair(python: str) -> None:
    found = pinned(python)
    assert (found["torch"], found["torchvision"]) == (Version("2.15.0"), Version("0.29.2"))


def test_pins_are_exact_and_name_no_place() -> None:
    for pin in pins():
        assert [specifier.operator for specifier in pin.specifier] == ["=="] and "*" not in str(pin.specifier)
        assert pin.url is None and not pin.extras
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text and "--index" not in text and "--find" not in text


def test_conda_users_get_the_same() -> None:
    """The file names no package of its own, so it cannot drift: pip reads setup.cfg and constraints.txt."""
    file = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert list(file) == ["name", "channels", "dependencies"] and file["channels"] == ["conda-forge"]
    python, pip, packages = file["dependencies"]
    assert pip == "pip" and packages == {"pip": ["-c constraints.txt", "-e .[test]"]}
    name, _, number = python.partition("=")
    assert name == "python"
    assert Version(number) in Requirement(f"python{setup('options', 'python_requires')}").specifier


def setup(section: str, key: str) -> str:
    return asked._parsed(asked.SETUP)[section][key]


def test_setup_cfg_names_every_package_as_setuptools_reads_it() -> None:
    assert names(CORE) < names(TEST) and names(CORE) < names(OPTIONAL)
    assert setup("options.packages.find", "include") == "pipeline*"
    assert setup("metadata", "version") == "attr: pipeline.__version__"


def write_setup(directory: Path, core: str, extra: str = "") -> Path:
    path = directory / "setup.cfg"
    path.write_text(f"[options]\ninstall_requires =\n{core}\n[options.extras_require]\nx =\n{extra}\n")
    return path


def test_lines_are_read_in_order_and_once(tmp_path: Path) -> None:
    path = write_setup(tmp_path, "    b>=1.2\n    a", "    c_d>=3\n    a")
    assert asked.requirements(setup=path) == ["b>=1.2", "a"]
    assert asked.requirements(["x"], path) == ["b>=1.2", "a", "c_d>=3"]


@pytest.mark.parametrize("line", ["a<2", "a==1", "a>=1,<2", "a[x]>=1", "a>=1rc1", "a; python_version<'4'",
                                  "a @ https://x"])
def test_a_line_that_cannot_be_checked_is_refused(line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="form name or name>=version"):
        asked.requirements(setup=write_setup(tmp_path, f"    {line}"))


def test_what_is_missing_is_named() -> None:
    assert asked.missing(["numpy", "numpy>=1.0", f"numpy>={version('numpy')}"]) == []
    assert asked.missing(["numpy>=999.1"]) == [f"numpy is {version('numpy')}, not >=999.1"]
    assert asked.missing(["no-such-package>=1"]) == ["no-such-package is not installed"]


def test_a_package_of_another_name_with_the_same_module_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_gpu(name: str) -> str:
        if name != "faiss-gpu":
            raise asked.PackageNotFoundError(name)
        return "1.12.0"
    monkeypatch.setattr(asked, "version", only_gpu)
    assert asked.missing(["faiss-cpu>=1.11"]) == []
    assert asked.missing(["faiss-cpu>=1.13"]) == ["faiss-cpu is 1.12.0, not >=1.13"]


def test_an_old_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked.python_flaw() == ""
    monkeypatch.setattr(asked, "python_version", lambda: "3.9.18")
    assert asked.python_flaw() == "Python is 3.9.18, not >=3.11"


NUMBERS = st.lists(st.integers(0, 12), min_size=1, max_size=4)


@given(NUMBERS, NUMBERS, st.sampled_from(["", "+cu132", "+cpu", ".post1"]))
def test_versions_compare_as_packaging_compares_them(one: list[int], other: list[int], suffix: str) -> None:
    installed, least = ".".join(map(str, one)) + suffix, ".".join(map(str, other))
    is_enough = asked._release(installed) >= asked._release(least)
    assert is_enough == (Version(installed) in Requirement(f"a>={least}").specifier)


def test_it_runs_where_nothing_is_installed() -> None:
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
               "from pipeline.support.requirements import main; main(sys.argv[1:])"]
    listed = subprocess.run([*command, "test"], capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines() == TEST
    lacking = subprocess.run([*command, "--missing", "core"], capture_output=True, text=True, check=True)
    assert lacking.stdout.startswith("torch is not installed; ")
    assert lacking.stdout.endswith(f"; and {len(CORE) - 3} more")
