"""The command `train`, from tables to a usable encoder: killed and resumed, in two processes, with wrong options."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.cli import main
from tests.forks import Forks, alive, fork_server, kill

pytestmark = pytest.mark.timeout(400)  # whole trainings; some start PyTorch anew

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = {
    "embed_dim": 16, "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 32, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1}}
OPTIONS = {"epochs": 0.5, "batch_size": 16, "learning_rate": 1e-3, "precision": "fp32", "chunk_size": 12, "warmup": 0.1,
           "symmetric": True, "hard_negatives": 1, "loaders": 0, "device": "cpu", "log_every": 3, "save_every": 5,
           "keep": 2, "seed": 3}


class Training:
    """A small training in a directory of its own."""

    def __init__(self, directory: Path, data: Path, dimension: int = 16, fusion: str = "score"):
        self.work, self.file = directory / "work", directory / "small.yaml"
        directory.mkdir(exist_ok=True)
        (directory / "architecture.json").write_text(json.dumps({**ARCHITECTURE, "embed_dim": dimension}))
        (directory / "fresh.yaml").write_text(f"encoder: uniir_clip\nseed: 1\nfusion: {fusion}\n"
                                              "architecture: ./architecture.json\n")
        self.file.write_text(f"benchmark: mini_mbeir\nencoders: [{directory / 'fresh.yaml'}]\nwork_dir: {self.work}\n"
                             f"training: {json.dumps(OPTIONS)}\n")
        self.arguments = [f"benchmark.root={data}", "benchmark.options.scale=0.05", "embed.loaders=0",
                          "score.resamples=10"]
        self.directory = self.work / "trainings" / "small"

    def command(self, *more: str) -> list[str]:
        return ["train", str(self.file), *self.arguments, *more]

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "log.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines() if "loss" in line]

    def weights(self, step: int) -> bytes:
        return (self.directory / "checkpoints" / f"step-{step:08d}" / "weights.safetensors").read_bytes()


@pytest.fixture
def training(tmp_path: Path, mini_data: Path) -> Training:
    return Training(tmp_path, mini_data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, mini_data: Path) -> Training:
    """Trained without interruption, in a child with one thread like all others here; read only."""
    whole = Training(tmp_path_factory.mktemp("whole"), mini_data)
    with fork_server() as forks:
        forks.finish(whole.command())
    return whole


def test_every_step_is_told_and_the_loss_falls(finished: Training) -> None:
    lines = finished.lines()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) > 20
    assert sum(finished.losses()[-5:]) < 0.8 * sum(finished.losses()[:5])
    assert lines[1]["learning_rate"] < lines[4]["learning_rate"] and lines[-1]["learning_rate"] < 1e-5
    assert (finished.directory / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "hard_negatives: 1" in (finished.directory / "config.yaml").read_text()


def test_the_last_checkpoints_stay(finished: Training) -> None:
    kept = sorted(path.name for path in (finished.directory / "checkpoints").iterdir())
    steps = len(finished.lines())
    assert kept == [f"step-{(steps - 1) // 5 * 5:08d}", f"step-{steps:08d}"]


def test_the_encoder_is_usable_at_once(finished: Training, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    encoder = finished.directory / "small.yaml"
    command = ["run", "quickstart", f"encoders=[{encoder}]", f"work_dir={tmp_path}", "tasks=[facts_task1]",
               *finished.arguments]
    assert main(command) == 0, capsys.readouterr().err
    assert "facts_task1" in capsys.readouterr().out


def test_a_finished_training_has_nothing_to_do(finished: Training, capsys: pytest.CaptureFixture[str]) -> None:
    before = finished.lines()
    assert main(finished.command()) == 0
    assert "train      0 of" in capsys.readouterr().out and finished.lines() == before


def test_killed_and_resumed_equals_uninterrupted(training: Training, finished: Training,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL at random moments: the log and the weights are, byte for byte, those of a training left alone."""
    chance, kills, steps = random.Random(1), 0, len(finished.lines())
    with fork_server() as forks:
        while _last_step(training) < steps - 10:
            kills += _work_and_be_killed(forks, training, chance)
        forks.finish(training.command())
    assert kills >= 3, "too few to tell anything"
    assert training.lines() == finished.lines()
    assert training.weights(steps) == finished.weights(steps)
    assert [path.name for path in training.directory.rglob(".*")] == [".lock"]
    with capsys.disabled():
        print(f"\n{kills} kills: {steps} steps and their weights equal byte for byte", end="")


def test_resumed_dropout_is_that_of_an_uninterrupted_training(tmp_path: Path, mini_data: Path) -> None:
    """Feature fusion drops out at random: the random states of a checkpoint go on where they stood."""
    fused = Training(tmp_path, mini_data, 32, "feature")
    assert main(fused.command("training.epochs=0.1")) == 0
    lines, weights = fused.lines(), fused.weights(10)
    shutil.rmtree(fused.directory / "checkpoints" / "step-00000010")
    assert main(fused.command("training.epochs=0.1", "training.loaders=1")) == 0
    assert fused.lines() == lines and fused.weights(10) == weights


def _work_and_be_killed(forks: Forks, training: Training, chance: random.Random) -> bool:
    """Kill soon after more lines were written than there were, or while a checkpoint is; was it alive?"""
    log = training.directory / "log.jsonl"
    group, before = forks.start(training.command()), _size(log)
    while _size(log) <= before and alive(group):
        time.sleep(0.002)
    time.sleep(chance.random() * 0.1)
    was_alive = alive(group)
    kill(group)
    return was_alive


def _last_step(training: Training) -> int:
    return max((int(path.name[5:]) for path in (training.directory / "checkpoints").glob("step-*")), default=0)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_other_options_are_refused_unless_told(finished: Training, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(finished.command("training.learning_rate=0.5", "training.seed=9")) == 2
    told = capsys.readouterr().err
    assert "training.learning_rate: 0.001 -> 0.5" in told and "training.seed: 3 -> 9" in told
    assert main(finished.command("training.log_every=7")) == 0  # what changes no number is free
    assert main(finished.command("training.weight_decay=0.3", "--accept-changes")) == 0


def test_validation_goes_through_the_stages(training: Training, capsys: pytest.CaptureFixture[str]) -> None:
    """Its scores are those of `run` on the val split; the best checkpoint stays and is the encoder."""
    tasks = "[streets_task3, facts_task1]"
    more = ["training.validate_every=8", f"training.validation_tasks={tasks}", "training.keep=1", "training.epochs=0.4"]
    assert main(training.command(*more)) == 0, capsys.readouterr().err
    found = [line for line in training.lines() if "validation" in line]
    assert len(found) >= 3
    assert {task for line in found for task in line["validation"]} == {"streets_task3", "facts_task1", "average"}
    best = max(found, key=lambda line: line["validation"]["average"])
    encoder = training.directory / "small.yaml"
    assert f"step-{best['step']:08d}" in encoder.read_text()
    capsys.readouterr()
    assert main(["run", "quickstart", f"encoders=[{encoder}]", f"work_dir={training.work}", "benchmark.split=val",
                 f"tasks={tasks}", "pools=[union]", "--json", *training.arguments]) == 0
    cells = json.loads(capsys.readouterr().out)["scores"]
    scores = {cell["task"]: cell["metrics"][cell["headline"]]["mean"] for cell in cells}
    # a union is all pools of the experiment's tasks, in both cases those of the whole benchmark
    assert scores == {task: value for task, value in best["validation"].items() if task != "average"}
    left = [path.name for path in (training.work / "artifacts" / "embed").iterdir() if "step-" in path.name]
    assert left == []


def test_two_processes_learn_what_one_does(training: Training, finished: Training) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    validation = ["training.validate_every=1000", "training.validation_tasks=[facts_task1]",
                  "training.validation_pool=local"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={port}",
         "-m", "pipeline", *training.command(*validation)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert training.losses() == pytest.approx(finished.losses(), abs=1e-5)
    assert done.stdout.count("train      ") == 1, "the second process speaks as well"
    assert set(training.lines()[-1]["validation"]) == {"facts_task1", "average"}
    last = f"checkpoints/step-{len(finished.lines()):08d}/weights.safetensors"
    ours, theirs = load_file(training.directory / last), load_file(finished.directory / last)
    for name, values in theirs.items():
        # A bias of attention's keys moves no vector: its gradient is rounding, which the optimiser blows up.
        moves = np.ones(len(values), bool) if values.ndim else ...
        if name.endswith("attn.in_proj_bias"):
            moves[len(values) // 3:2 * len(values) // 3] = False  # type: ignore[index]
        assert ours[name][moves] == pytest.approx(values[moves], abs=1e-4), name


def test_a_start_from_weights_of_other_layers(tmp_path: Path, mini_data: Path, finished: Training,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Feature fusion begins with the towers of a score fusion; its own layers are still random."""
    towers, fused = (Training(tmp_path / fusion, mini_data, 32, fusion) for fusion in ("score", "feature"))
    assert main(towers.command("training.epochs=0.05")) == 0, capsys.readouterr().err
    start = towers.directory / "checkpoints" / "step-00000005" / "weights.safetensors"
    arguments = ["training.epochs=0.05", "training.cached_gradients=true", "training.learning_rate=0"]
    assert main(fused.command(f"training.start={start}", *arguments)) == 0, capsys.readouterr().err
    told = capsys.readouterr().err
    assert "stay as the encoder has them (t5_layers." in told and "of the file are not used (text_projection" in told
    before, after = load_file(start), load_file(fused.directory / "checkpoints/step-00000005/weights.safetensors")
    assert before.keys() - after.keys() == {"text_projection"}
    same = [name for name in before.keys() & after.keys() if (before[name] == after[name]).all()]
    assert len(same) == len(before) - 1  # the towers did not learn, but the new layers did
    assert main(finished.command(f"training.start={start}", "name=other")) == 2
    assert "has another shape" in capsys.readouterr().err


@pytest.mark.parametrize("more, told", [
    (["encoders=[tests.toy_encoder]"], "cannot be trained"),
    (["encoders=[tests.toy_encoder, clip_vit_b32_openai]"], "one encoder"),
    (["training.validation_tasks=[facts_task2]"], "nearest: facts_task1"),
    (["training.start=/no/where.safetensors"], "training.start not found"),
    (["training.batch_size=100000"], "training.batch_size is 100000"),
    (["training.rows={digit: 4}"], "training.rows names 'digit'"),
    (["training.batchsize=3"], "nearest: batch_size"),
    (["training.betas=[0.9]"], "training.betas"),
    (["training.precision=fp8"], "training.precision"),
    (["benchmark.options.negatives=/no/where"], "/no/where"),
])
def test_mistakes_are_told(training: Training, capsys: pytest.CaptureFixture[str], more: list[str], told: str) -> None:
    assert main(training.command(*more)) == 2
    assert told in capsys.readouterr().err
    assert not (training.directory / "checkpoints").exists()


def test_an_unknown_training_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny_clip"]) == 2
    assert "tiny_clip_sf" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_the_step_it_has_made(training: Training, number: signal.Signals,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """Control-C, or a scheduler's SIGTERM: a word, no traceback, nothing lost. Meanwhile nobody else trains here."""
    command = training.command("training.epochs=200", "training.save_every=100000", "training.loaders=1")
    with subprocess.Popen([sys.executable, "-m", "pipeline", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True) as child:
        while _size(training.directory / "log.jsonl") < 500:
            assert child.poll() is None
            time.sleep(0.05)
        assert main(command) == 2 and "is running already" in capsys.readouterr().err
        os.killpg(child.pid, number)  # to its loader as well, as a terminal and `timeout` do
        assert child.stderr is not None
        told = child.stderr.read()
    assert child.returncode == 130 and "the same command goes on" in told and "Traceback" not in told
    checkpoint, = (training.directory / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{training.lines()[-1]['step']:08d}"


def test_what_a_kill_left_undone_is_done_later(finished: Training, tmp_path: Path, mini_data: Path) -> None:
    """Killed behind the last checkpoint: the encoder's file and the picture are made by the next call."""
    copy = Training(tmp_path, mini_data)
    shutil.copytree(finished.directory, copy.directory)
    (copy.directory / "small.yaml").unlink()
    (copy.directory / "curve.png").unlink()
    assert main(copy.command()) == 0
    assert (copy.directory / "small.yaml").exists() and (copy.directory / "curve.png").exists()


def test_a_loss_that_is_no_number_ends_it_with_its_lines(training: Training,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert main(training.command("training.learning_rate=1e30", "training.warmup=0", "training.save_every=1000")) == 2
    told = capsys.readouterr().err
    assert "the loss is nan near step" in told and "learning_rate" in told
    assert len(training.lines()) >= 3 and not (training.directory / "checkpoints").exists()


def test_fewer_epochs_than_there_were_are_refused(finished: Training, tmp_path: Path, mini_data: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    copy = Training(tmp_path, mini_data)
    shutil.copytree(finished.directory, copy.directory)
    assert main(copy.command("training.epochs=0.2", "--accept-changes")) == 2
    assert "is behind the last one" in capsys.readouterr().err
    assert main(copy.command("training.precision=bf16", "training.epochs=0.6", "--accept-changes")) == 0
