"""Two processes that share each batch learn what one learns from the whole of it.

The two are started as torchrun starts them, once for all cases; what one learns is learned here.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pipeline.images import ImageStore
from pipeline.support.errors import UserError
from pipeline.training.examples import Examples
from pipeline.training.feeding import Layout
from pipeline.training.learning import Learner
from pipeline.training.objective import Objective
from pipeline.training.processes import Processes, joined
from tests.training.tiny import ToyEncoder, Toys, feeder_of, params_of, runtime_of, tiny_clip, toys, weights_of

pytestmark = pytest.mark.timeout(400)  # two processes that start PyTorch anew

STEPS = 5
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Case(NamedTuple):
    """Kinds of tasks, chunks of items, cached gradients or not, options of the training, and the encoder."""

    kinds: tuple[str, ...]
    chunk_size: int = 0
    cached: bool = False
    options: dict[str, Any] = {}
    is_clip: bool = True


# Of the eight queries of a step each process has four of one task; without prompts pictures bring no text.
APART = {"same_task": 4, "instruction": "none"}
CASES = {
    "mixed": Case(("words", "pictures", "captions", "both")),
    "towers apart": Case(("words", "pictures"), 3, False, APART),
    "cached": Case(("words", "captions", "both"), 3, True),
    "cached, towers apart": Case(("words", "pictures"), 3, True, APART),
    "cached, the last chunk has images only": Case(("captions",), 4, True),
    "cached, the last chunk has images only, toys": Case(("captions",), 2, True, {}, False),
    "symmetric with hard negatives": Case(("words", "captions", "both"), 5, False,
                                          {"symmetric": True, "hard_negatives": 2}),
    "everything": Case(("words", "captions", "pictures"), 3, True, {
        "symmetric": True, "hard_negatives": 2, "clip_norm": 0.5, "max_scale": 14.3, "warmup": 0.4, **APART}, False),
}


class Learned(NamedTuple):
    losses: list[float]
    accuracies: list[float]
    weights: dict[str, torch.Tensor]


def data_of(directory: Path, case: Case) -> Toys:
    own = directory / "-".join(case.kinds)
    return Toys(Examples(own / "examples"), ImageStore(own), own)


def encoder_of(directory: Path, case: Case) -> Any:
    return _clip_once(directory)() if case.is_clip else ToyEncoder()


@lru_cache
def _clip_once(directory: Path) -> Callable[[], Any]:
    """Made once and copied, because making its tokenizer takes longer than learning."""
    path = directory / str(os.getpid())
    path.mkdir()
    return partial(deepcopy, tiny_clip(path))


def learn(directory: Path, case: Case, processes: Processes) -> Learned:
    """Five steps; losses and accuracies are means over the processes.

    Epsilon is large, because gradients that are zero but for rounding (the bias of attention's keys) differ.
    """
    toy, encoder = data_of(directory, case), encoder_of(directory, case)
    params = params_of(**{"epsilon": 1e-4, "epochs": 20, "batch_size": 8, **case.options})
    runtime = runtime_of(chunk_size=case.chunk_size, cached_gradients=case.cached)
    feeder = feeder_of(toy, params, runtime, encoder, processes)
    learner = Learner(encoder, Objective(toy.examples, params.symmetric, processes), params, runtime, STEPS)
    told = []
    for number, prepared in zip(range(STEPS), feeder.steps(0)):
        outcome = learner.step(prepared, feeder.course.step(number))
        told.append(torch.stack([outcome.loss, outcome.accuracy]))
    means = processes.mean(torch.stack(told)).tolist()
    return Learned([loss for loss, _ in means], [accuracy for _, accuracy in means], weights_of(encoder))


def work(directory: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    with joined("cpu") as processes:
        assert processes.all_of(processes.rank * 7) == [0, 7]
        learned = {name: tuple(learn(directory, case, processes)) for name, case in CASES.items()}
        torch.save(learned, directory / f"{processes.rank}.pt")
        processes.wait()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the data of all cases, which the processes only read."""
    directory = tmp_path_factory.mktemp("processes")
    for kinds in {case.kinds for case in CASES.values()}:
        toys(directory / "-".join(kinds), kinds)
    return directory


@pytest.fixture(scope="module")
def two(directory: Path) -> list[dict[str, Learned]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank in range(2):
        told = dict(zip(NAMES, (str(rank), "2", str(rank), "127.0.0.1", port)))
        command = [sys.executable, "-m", "tests.training.test_processes", str(directory)]
        running.append(subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True,
                                        env={**os.environ, **told, "GLOO_SOCKET_IFNAME": "lo"}))
    told_by = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(told_by)
    found = [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return [{name: Learned(*learned) for name, learned in own.items()} for own in found]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(two: list[dict[str, Learned]], directory: Path, name: str) -> None:
    alone = learn(directory, CASES[name], Processes())
    for own in two:
        assert own[name].losses == pytest.approx(alone.losses, abs=1e-5)
        assert own[name].accuracies == pytest.approx(alone.accuracies)
        for parameter, tensor in alone.weights.items():
            torch.testing.assert_close(own[name].weights[parameter], tensor, rtol=0, atol=1e-5, msg=parameter)
    for parameter, tensor in two[0][name].weights.items():
        assert torch.equal(tensor, two[1][name].weights[parameter]), "both hold the very same weights"
    assert len(set(alone.losses)) == STEPS


@pytest.mark.parametrize("name", CASES)
def test_every_tower_learns_something(directory: Path, name: str) -> None:
    """Weights that stay where they were would be equal as well."""
    case = CASES[name]
    before = weights_of(encoder_of(directory, case))
    after = learn(directory, case, Processes()).weights
    still = [parameter for parameter, tensor in after.items()
             if tensor.is_floating_point() and float((tensor - before[parameter]).abs().max()) < 1e-4]
    assert still == []


def towers(layout: Layout, chunk: int, toy: Toys) -> set[str]:
    """Which towers a chunk of this layout runs."""
    table = (toy.examples.candidates, toy.examples.queries)
    found = set()
    for is_query, row, prompt in layout.chunks[chunk]:
        own = table[is_query].slice(row, 1).to_pylist()[0]
        found |= {"image"} if own["image"] else set()
        found |= {"text"} if own["text"] or prompt >= 0 else set()
    return found


def test_the_cases_are_what_they_are_called(directory: Path) -> None:
    apart, images_last = CASES["cached, towers apart"], CASES["cached, the last chunk has images only"]
    for case, wanted in ((apart, [{"text"}, {"image"}]), (images_last, [{"image"}, {"image"}])):
        toy, seen = data_of(directory, case), []
        for number in range(STEPS):
            params = params_of(epochs=20, **case.options)
            runtime = runtime_of(chunk_size=case.chunk_size)
            layouts = [feeder_of(toy, params, runtime, ToyEncoder(), Processes(rank, 2)).layout(number)
                       for rank in range(2)]
            seen.append([towers(layout, len(layout.chunks) - 1, toy) for layout in layouts])
            assert all(len(layout.chunks) > 1 for layout in layouts)
        assert wanted in seen or wanted[::-1] in seen


def test_alone_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    with joined("cpu") as processes:
        assert processes == Processes(0, 1) and processes.is_first
        vectors, module = torch.ones(2, 3), torch.nn.Linear(1, 1)
        assert processes.gather(vectors) is vectors and processes.mean(vectors) is vectors
        assert processes.all_of("x") == ["x"] and processes.share(module) is module
        processes.wait()


@pytest.mark.parametrize("given", [{"RANK": "0"}, {"WORLD_SIZE": "2", "LOCAL_RANK": "0"},
                                   {"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}])
def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="only some are set"), joined("cpu"):
        pass


if __name__ == "__main__":
    work(Path(sys.argv[1]))
