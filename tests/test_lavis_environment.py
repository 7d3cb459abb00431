"""The scripts that make .venv-lavis and run these tests, with stand-ins for uv and Python: nothing is installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.test_scripts import ROOT, Clone, installs

PINS = "constraints-lavis.txt"


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    found = Clone(tmp_path)
    shutil.copy(ROOT / PINS, found.root / PINS)
    return found


def test_the_second_environment_is_made_once_from_its_own_pins(clone: Clone) -> None:
    done = clone.run("environment.sh", "lavis")
    assert (done.returncode, done.stdout) == (0, f"{clone.root}/.venv-lavis/bin/python\n")
    assert "making .venv-lavis" in done.stderr and f"what {PINS} pins" in done.stderr
    made, installed = clone.calls()
    assert made == f"uv venv --quiet --allow-existing --python {clone.standins}/python3 .venv-lavis"
    assert installed.endswith(f"--python .venv-lavis/bin/python --no-deps -r {PINS}")
    again = clone.run("environment.sh", "lavis")
    assert again.stderr == "" and clone.calls() == [] and not (clone.root / ".venv").exists()


def test_a_changed_pin_is_installed_into_the_same_environment(clone: Clone) -> None:
    clone.run("environment.sh", "lavis")
    with (clone.root / PINS).open("a") as file:
        file.write("# changed\n")
    clone.calls()
    clone.run("environment.sh", "lavis")
    assert len(clone.calls()) == 1
    clone.run("run_eval_pipeline.sh")
    clone.calls()
    clone.run("run_eval_pipeline.sh")
    assert installs(clone.calls()) == []  # the main environment has pins of its own


def test_a_killed_installation_is_made_again_from_nothing(clone: Clone) -> None:
    assert clone.run("environment.sh", "lavis", KILLED="yes").returncode != 0
    clone.calls()
    done = clone.run("environment.sh", "lavis")
    assert done.returncode == 0 and "remaking .venv-lavis" in done.stderr
    assert [call.split()[1] for call in clone.calls()] == ["venv", "pip"]


def test_without_uv_it_is_venv_and_pip(tmp_path: Path) -> None:
    clone = Clone(tmp_path, uv=False)
    shutil.copy(ROOT / PINS, clone.root / PINS)
    assert clone.run("environment.sh", "lavis").returncode == 0
    made, installed = clone.calls()
    assert made == "venv .venv-lavis" and installed.endswith(f"--no-deps -r {PINS}")


def test_an_active_environment_is_never_taken_for_it(clone: Clone) -> None:
    active = clone.environment("somebody's")
    done = clone.run("environment.sh", "lavis", VIRTUAL_ENV=str(active))
    assert done.stdout == f"{clone.root}/.venv-lavis/bin/python\n"


def test_the_name_of_an_environment_is_asked_for(clone: Clone) -> None:
    for arguments in ([], ["blip"]):
        done = clone.run("environment.sh", *arguments)
        assert done.returncode == 1 and "core, test or lavis" in done.stderr
    assert clone.calls() == []


def test_the_tests_run_in_both_environments(clone: Clone) -> None:
    done = clone.run("run_tests.sh", "--lavis", "-k", "a or b")
    assert done.returncode == 0
    ran = [call for call in clone.calls() if call.startswith("ran")]
    assert ran == 2 * ["ran <-m> <pytest> <tests/lavis> <-k> <a or b>"]
    assert done.stdout.splitlines() == [f"in {clone.root} by {clone.root}/{name}/bin/python"
                                        for name in (".venv-lavis", ".venv")]
    failed = clone.run("run_tests.sh", "--lavis", FAILING="pytest")
    assert failed.returncode == 1 and failed.stderr.endswith("failed: pytest-in-.venv-lavis pytest\n")


def test_other_tests_do_without_it(clone: Clone) -> None:
    assert clone.run("run_tests.sh", "--no-lint").returncode == 0
    assert not (clone.root / ".venv-lavis").exists()
