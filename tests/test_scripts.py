"""The two commands: what they pass on, which environment they use, and what survives a killed preparation.

Nothing is installed here: uv, pip and the Pythons that the scripts start are stand-ins that write down calls.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = ("environment.sh", "run_eval_pipeline.sh", "run_tests.sh", ".ci/run")
SCRIPTS = [*(ROOT / name for name in FILES), *sorted((ROOT / "slurm").glob("*.s*"))]
TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "basename", "mkdir", "touch", "rm", "sleep")
BASH = shutil.which("bash") or "bash"

UV = """#!/usr/bin/env bash
echo "uv $*" >> "$CALLS"
if [ "$1" = venv ]; then
    for last; do :; done
    mkdir -p "$last/bin"
    cp "$STANDINS/environment_python" "$last/bin/python"
else
    sleep "${SLOW:-0}"
    if [ -n "${KILLED:-}" ]; then kill -9 "$PPID"; fi
    exit "${INSTALLER_STATUS:-0}"
fi
"""
ENVIRONMENT_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *pipeline.support.requirements*--missing*) printf '%s' "${MISSING:-}" ;;
    *pipeline.support.requirements*) echo "needed for $3" ;;
    "-m pip "*) echo "pip $*" >> "$CALLS"; exit "${INSTALLER_STATUS:-0}" ;;
    *)
        { printf 'ran'; printf ' <%s>' "$@"; echo; } >> "$CALLS"
        echo "in $PWD by $0"
        if [ -n "${FAILING:-}" ]; then case "$*" in *"$FAILING"*) exit 7 ;; esac; fi ;;
esac
"""
BASE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *fcntl*) exec "$REAL" "$@" ;;
    *version_info*) if [ -n "${OLD:-}" ]; then exec "$REAL" -c "raise SystemExit(1)"; fi; echo "$0" ;;
    *ensurepip*) exit "${NO_ENSUREPIP:-0}" ;;
    "-m venv "*)
        echo "venv $3" >> "$CALLS"
        mkdir -p "$3/bin"
        cp "$STANDINS/environment_python" "$3/bin/python" ;;
esac
"""


class Clone:
    """A copy of the scripts in a directory with a blank in its name, and the stand-ins that they meet."""

    def __init__(self, directory: Path, uv: bool = True):
        self.root = directory / "a clone"
        self.standins = directory / "bin"
        self.calls_file = directory / "calls"
        self.standins.mkdir(parents=True)
        (self.root / ".ci").mkdir(parents=True)
        for name in (*FILES, "setup.cfg", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        for tool in TOOLS:
            (self.standins / tool).symlink_to(shutil.which(tool) or tool)
        (self.standins / "env").symlink_to("/usr/bin/env")
        self.stand_in("environment_python", ENVIRONMENT_PYTHON)
        self.stand_in("python3", BASE_PYTHON)
        if uv:
            self.stand_in("uv", UV)

    def stand_in(self, name: str, text: str) -> None:
        path = self.standins / name
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *arguments: str, directory: Path | None = None,
              **variables: str) -> subprocess.Popen[str]:
        command = [BASH, str(self.root / arguments[0]), *arguments[1:]]
        environment = {"PATH": str(self.standins), "CALLS": str(self.calls_file), "REAL": sys.executable,
                       "STANDINS": str(self.standins), **variables}
        return subprocess.Popen(command, cwd=directory or self.root, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)

    def run(self, *arguments: str, directory: Path | None = None,
            **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, directory=directory, **variables)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self) -> list[str]:
        """What was called since the last look."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return lines

    def environment(self, name: str) -> Path:
        """An environment that somebody else made."""
        python = self.root / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        shutil.copy(self.standins / "environment_python", python)
        return python.parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


@pytest.fixture
def ready(clone: Clone) -> Clone:
    """A clone whose .venv is made."""
    assert clone.run("run_tests.sh", "--no-lint").returncode == 0
    clone.calls()
    return clone


def installs(calls: list[str]) -> list[str]:
    return [call for call in calls if call.startswith(("uv pip install", "pip "))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid(script: Path) -> None:
    assert subprocess.run([BASH, "-n", str(script)], capture_output=True, text=True).stderr == ""
    if checker := shutil.which("shellcheck"):
        checked = subprocess.run([checker, "-x", str(script)], cwd=ROOT, capture_output=True, text=True)
        assert checked.stdout == ""


@pytest.mark.parametrize("given, passed", [
    ([], "<quickstart>"),
    (["quickstart", "embed.batch_size=8"], "<quickstart> <embed.batch_size=8>"),
    (["embed.batch_size=8"], "<quickstart> <embed.batch_size=8>"),
    (["--json"], "<quickstart> <--json>"),
    (["mbeir_clip_sf", "tasks=[a, b]", "--json"], "<mbeir_clip_sf> <tasks=[a, b]> <--json>"),
    (["runs/rate=1/mine.yaml"], "<runs/rate=1/mine.yaml>"),
    (["quickstart", "name=two words", "*"], "<quickstart> <name=two words> <*>"),
])
def test_arguments_are_passed_on(given: list[str], passed: str, ready: Clone) -> None:
    done = ready.run("run_eval_pipeline.sh", *given)
    assert done.returncode == 0
    assert ready.calls() == [f"ran <-m> <pipeline> <run> {passed}"]


def test_an_experiment_file_is_found_from_where_the_user_stands(ready: Clone, tmp_path: Path) -> None:
    elsewhere = tmp_path / "some where"
    elsewhere.mkdir()
    (elsewhere / "mine.yaml").touch()
    done = ready.run("run_eval_pipeline.sh", "mine.yaml", "a=1", directory=elsewhere)
    assert ready.calls() == [f"ran <-m> <pipeline> <run> <{elsewhere}/mine.yaml> <a=1>"]
    assert done.stdout == f"in {ready.root} by {ready.root}/.venv/bin/python\n"


def test_the_pipelines_exit_code_and_output_are_the_scripts(clone: Clone) -> None:
    done = clone.run("run_eval_pipeline.sh", FAILING="pipeline")
    assert done.returncode == 7
    assert done.stdout == f"in {clone.root} by {clone.root}/.venv/bin/python\n"
    assert "making .venv" in done.stderr and "installing" in done.stderr


@pytest.mark.parametrize("script", ["run_eval_pipeline.sh", "run_tests.sh"])
def test_help_installs_nothing(script: str, clone: Clone) -> None:
    done = clone.run(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: bash {script}")
    assert clone.calls() == [] and not (clone.root / ".venv").exists()


def test_the_first_start_installs_the_pins_and_the_second_does_not(clone: Clone) -> None:
    clone.run("run_eval_pipeline.sh")
    made, installed, ran = clone.calls()
    assert made == f"uv venv --quiet --allow-existing --python {clone.standins}/python3 .venv"
    assert installed.startswith("uv pip install")
    assert installed.endswith("-r .venv/requirements.txt -c constraints.txt")
    assert (clone.root / ".venv" / "requirements.txt").read_text() == "needed for core\n"
    second = clone.run("run_eval_pipeline.sh")
    assert clone.calls() == [ran] and second.stderr == ""


def test_without_uv_it_is_venv_and_pip(tmp_path: Path) -> None:
    clone = Clone(tmp_path, uv=False)
    assert clone.run("run_eval_pipeline.sh").returncode == 0
    made, installed, _ = clone.calls()
    assert made == "venv .venv"
    assert "install" in installed and installed.endswith("-r .venv/requirements.txt -c constraints.txt")


def test_tests_need_more_than_the_pipeline(clone: Clone) -> None:
    clone.run("run_eval_pipeline.sh")
    clone.calls()
    clone.run("run_tests.sh")
    assert len(installs(clone.calls())) == 1
    assert (clone.root / ".venv" / "requirements.txt").read_text() == "needed for test\n"
    clone.run("run_eval_pipeline.sh")
    clone.run("run_tests.sh")
    assert installs(clone.calls()) == []


@pytest.mark.parametrize("name", ["constraints.txt", "setup.cfg"])
def test_a_changed_pin_is_installed_into_the_same_environment(name: str, ready: Clone) -> None:
    (ready.root / ".venv" / "kept").touch()
    with (ready.root / name).open("a") as file:
        file.write("# changed\n")
    ready.run("run_eval_pipeline.sh")
    calls = ready.calls()
    assert len(installs(calls)) == 1 and not any(call.startswith("uv venv") for call in calls)
    assert (ready.root / ".venv" / "kept").exists()


def test_preparing_leaves_the_pins_alone(clone: Clone) -> None:
    clone.run("run_eval_pipeline.sh")
    assert (clone.root / "constraints.txt").read_bytes() == (ROOT / "constraints.txt").read_bytes()


def test_a_killed_installation_is_made_again_from_nothing(clone: Clone) -> None:
    assert clone.run("run_eval_pipeline.sh", KILLED="yes").returncode != 0
    (clone.root / ".venv" / "half a package").touch()
    assert not any(call.startswith("ran") for call in clone.calls())
    done = clone.run("run_eval_pipeline.sh")
    assert done.returncode == 0 and "cut short" in done.stderr
    assert [call.split()[1] for call in clone.calls()] == ["venv", "pip", "<-m>"]
    assert not (clone.root / ".venv" / "half a package").exists()


def test_an_environment_whose_python_is_gone_is_made_again(ready: Clone) -> None:
    python = ready.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3")
    done = ready.run("run_eval_pipeline.sh")
    assert done.returncode == 0 and "Python is gone" in done.stderr


def test_an_installer_that_gives_up_costs_nothing(ready: Clone) -> None:
    (ready.root / ".venv" / "kept").touch()
    pins = (ready.root / "constraints.txt").read_text()
    (ready.root / "constraints.txt").write_text(pins + "# changed\n")
    failed = ready.run("run_eval_pipeline.sh", INSTALLER_STATUS="1")
    assert failed.returncode == 1 and "installation failed" in failed.stderr
    assert not any(call.startswith("ran") for call in ready.calls())
    (ready.root / "constraints.txt").write_text(pins)
    assert ready.run("run_eval_pipeline.sh").returncode == 0
    assert installs(ready.calls()) == [] and (ready.root / ".venv" / "kept").exists()


def test_a_moved_clone_installs_again(ready: Clone) -> None:
    moved = ready.root.with_name("moved")
    ready.root.rename(moved)
    ready.root = moved
    assert ready.run("run_eval_pipeline.sh").returncode == 0
    assert len(installs(ready.calls())) == 1


@pytest.mark.parametrize("variables", [{}, {"KILLED": "yes"}])
def test_somebodys_own_environment_is_never_removed(variables: dict[str, Any], clone: Clone) -> None:
    own = clone.environment(".venv")
    (own / "kept").touch()
    clone.run("run_eval_pipeline.sh", **variables)
    assert clone.run("run_eval_pipeline.sh").returncode == 0
    calls = clone.calls()
    assert installs(calls) and not any(call.startswith("uv venv") for call in calls)
    assert (own / "kept").exists()


def test_scripts_started_together_install_once(clone: Clone) -> None:
    started = [clone.start("run_eval_pipeline.sh", f"number={number}", SLOW="0.7") for number in range(4)]
    messages = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4
    calls = clone.calls()
    assert len(installs(calls)) == 1 and sum(call.startswith("uv venv") for call in calls) == 1
    assert sum(call.startswith("ran") for call in calls) == 4
    assert sum("making .venv" in message for message in messages) == 1


def test_the_lock_ends_with_the_preparation(clone: Clone) -> None:
    """What the pipeline starts must not inherit it: the next start would wait for them."""
    probing = ENVIRONMENT_PYTHON.replace('echo "in', '[ -e /dev/fd/9 ] && echo locked; echo "in')
    clone.stand_in("environment_python", probing)
    assert "locked" not in clone.run("run_eval_pipeline.sh").stdout


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_a_suitable_active_environment_is_used(variable: str, clone: Clone, tmp_path: Path) -> None:
    active = clone.environment("somebody's")
    variables: dict[str, Any] = {variable: str(active)}
    done = clone.run("run_eval_pipeline.sh", **variables)
    assert done.stdout == f"in {clone.root} by {active}/bin/python\n"
    assert done.stderr == "" and not (clone.root / ".venv").exists()
    assert clone.calls() == ["ran <-m> <pipeline> <run> <quickstart>"]


def test_an_unsuitable_active_environment_is_named_and_left_alone(clone: Clone) -> None:
    active = clone.environment("somebody's")
    done = clone.run("run_eval_pipeline.sh", VIRTUAL_ENV=str(active), MISSING="torch is not installed")
    assert f"using .venv, not the active {active}: torch is not installed" in done.stderr
    assert done.stdout == f"in {clone.root} by {clone.root}/.venv/bin/python\n"


def test_condas_base_is_passed_over_in_silence(ready: Clone) -> None:
    base = ready.environment("conda")
    conda: dict[str, Any] = {"CONDA_PREFIX": str(base), "CONDA_DEFAULT_ENV": "base"}
    done = ready.run("run_eval_pipeline.sh", MISSING="torch is not installed", **conda)
    assert done.stderr == "" and ".venv" in done.stdout


def test_an_active_dot_venv_is_still_kept_up_to_date(ready: Clone) -> None:
    (ready.root / "constraints.txt").write_text("torch==2.15.1\n")
    ready.run("run_eval_pipeline.sh", VIRTUAL_ENV=str(ready.root / ".venv"))
    assert len(installs(ready.calls())) == 1


def test_the_users_choice_of_python_is_taken(clone: Clone) -> None:
    clone.stand_in("my python", BASE_PYTHON)
    clone.run("run_eval_pipeline.sh", PLUMBLINE_PYTHON=str(clone.standins / "my python"))
    assert f"--python {clone.standins}/my python .venv" in clone.calls()[0]


@pytest.mark.parametrize("variables, message", [
    ({"OLD": "yes"}, "Python 3.11 or newer was not found"),
    ({"OLD": "yes", "PLUMBLINE_PYTHON": "python3"}, "PLUMBLINE_PYTHON=python3 is not a Python 3.11"),
    ({"PLUMBLINE_PYTHON": "/no/python"}, "PLUMBLINE_PYTHON=/no/python is not a Python 3.11"),
    ({"NO_ENSUREPIP": "1"}, "apt install python3-venv"),
])
def test_without_a_python_it_says_what_to_do(variables: dict[str, Any], message: str, tmp_path: Path) -> None:
    clone = Clone(tmp_path, uv=False)
    done = clone.run("run_eval_pipeline.sh", **variables)
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (clone.root / ".venv").exists()


def test_uv_needs_neither_python_nor_ensurepip(clone: Clone) -> None:
    assert clone.run("run_eval_pipeline.sh", OLD="yes").returncode == 0
    assert "--python >=3.11 .venv" in clone.calls()[0]


def test_lint_types_and_tests_run_in_this_order(ready: Clone) -> None:
    assert ready.run("run_tests.sh", "tests/metrics", "-k", "a or b").returncode == 0
    assert ready.calls() == ["ran <-m> <flake8> <pipeline> <tests>", "ran <-m> <mypy>",
                             "ran <-m> <pytest> <tests/metrics> <-k> <a or b>"]


@pytest.mark.parametrize("failing", ["flake8", "mypy", "pytest"])
def test_one_failure_fails_all_and_hides_nothing(failing: str, ready: Clone) -> None:
    done = ready.run("run_tests.sh", FAILING=failing)
    assert done.returncode == 1 and done.stderr.endswith(f"failed: {failing}\n")
    assert len(ready.calls()) == 3


@pytest.mark.parametrize("option, tools", [("--lint", ["flake8", "mypy"]), ("--no-lint", ["pytest"])])
def test_half_of_it_on_request(option: str, tools: list[str], ready: Clone) -> None:
    assert ready.run("run_tests.sh", option).returncode == 0
    assert [call.split("<")[2].partition(">")[0] for call in ready.calls()] == tools


def test_continuous_integration_runs_the_tests(ready: Clone, tmp_path: Path) -> None:
    (ready.root / "run_tests.sh").write_text('echo "CI=$CI, $# arguments, input: $(cat)"\n')
    (ready.root / ".ci" / "programs").write_text('echo "programs, input: $(cat)"\n')
    assert ready.run(".ci/run", directory=tmp_path).stdout.splitlines() == [
        "programs, input: ", "CI=true, 0 arguments, input: ", "CI=true, 5 arguments, input: ",
        "CI=true, 1 arguments, input: "]
    assert all(os.access(ROOT / ".ci" / name, os.X_OK) for name in ("run", "programs"))
