"""The README tells the truth: its code runs, its commands, links and options exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import _parser
from pipeline.config import load

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
FILES = {match[1]: text for _, text in BLOCKS if (match := re.match(r"# (\S+\.(?:py|yaml))\n", text))}


@pytest.fixture
def own_code(tmp_path: Path) -> Path:
    """A folder with every file that the README shows."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHONPATH=str(ROOT), NO_COLOR="1")
    return subprocess.run([sys.executable, "-m", "pipeline", *arguments], cwd=folder, env=environment, text=True,
                          capture_output=True)


def test_the_encoder_of_the_readme_runs_the_quick_start(own_code: Path, small_arguments: list[str]) -> None:
    assert "my_lab/my_encoder.py" in FILES
    done = run(own_code, "run", "quickstart", "encoders=[my_lab.my_encoder]", *small_arguments)
    assert done.returncode == 0 and "scenes_task0" in done.stdout, done.stderr


def test_the_benchmark_of_the_readme_runs_and_its_scores_are_right(own_code: Path) -> None:
    (own_code / "my_data").mkdir()
    riddles = [{"id": "q1", "text": "bee bee", "answer": "a1"}, {"id": "q2", "text": "zoo zoo", "answer": "a1"}]
    (own_code / "my_data/riddles.json").write_text(json.dumps(riddles))
    answers = [{"id": "a1", "text": "bee"}, {"id": "a2", "text": "zoo"}]
    (own_code / "my_data/answers.json").write_text(json.dumps(answers))
    done = run(own_code, "run", "my_experiment.yaml", "retrieve.depth=3", "--json")
    assert done.returncode == 0, done.stderr
    scores, = json.loads(done.stdout)["scores"]
    assert scores["metrics"]["hit@1"]["mean"] == 0.5 and scores["metrics"]["mrr"]["mean"] == 0.75


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_command_and_option_of_the_readme_exists() -> None:
    commands = set(_parser()._subparsers._group_actions[0].choices)  # type: ignore[union-attr,arg-type]
    table = set(re.findall(r"^\| ((?:`[a-z-]+` ?)+) \|", README, re.MULTILINE))
    named = {name for row in table for name in re.findall(r"`([a-z-]+)`", row)}
    assert named - {path.stem for path in (ROOT / "pipeline" / "encoders").glob("*.py")} == commands
    option = r"'?\b((?:embed|index|local|log|collect|benchmark|retrieve|training)\.[a-z_.]+)=(\S*?)'?(?=[\s`])"
    for key, value in re.findall(option, README):
        load("mbeir_clip_sf", [f"{key}={value.rstrip(',;')}"])
    for key in re.findall(r"`((?:embed|index|local|log|collect|retrieve|training)\.(?!jsonl)[a-z_]+)`", README):
        assert key in load("quickstart").origins, key
