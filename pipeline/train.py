"""train: a benchmark's train split and an encoder -> checkpoints of a better encoder.

The tables come from the stage `collect`, the scores of a validation from all five stages, on the val split: what is
learned from and what is measured are read by the same code. Everything lies in WORK/trainings/<name>; the tables are
shared with the experiments.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.artifacts import canonical_json
from pipeline.config import Experiment, part
from pipeline.devices import resolve_device
from pipeline.encoders import load_encoder
from pipeline.encoders.checkpoints import find_file, load_state, weights_hash
from pipeline.encoders.uniir_clip import own_names
from pipeline.loading import num_loaders
from pipeline.pieces import EncoderChoice
from pipeline.report.tracking import Tracker
from pipeline.support.errors import UserError
from pipeline.support.loaders import let_waiting_threads_sleep
from pipeline.training.draws import Course
from pipeline.training.examples import Examples
from pipeline.training.feeding import Feeder
from pipeline.training.learning import Learner
from pipeline.training.objective import Objective
from pipeline.training.processes import Processes, joined
from pipeline.training.settings import Params, Runtime
from pipeline.training.trainer import CURVE, Trainer
from pipeline.training_set import directory_of, make_examples
from pipeline.validation import Validator

log = logging.getLogger("pipeline")


def train(experiment: Experiment, accept_changes: bool, say: Callable[..., Any]) -> Path:
    """Train from the last checkpoint on, or from the start; returns the configuration of the trained encoder."""
    let_waiting_threads_sleep()
    params, runtime = part(experiment.settings.training, Params), part(experiment.settings.training, Runtime)
    choice = _trainable_encoder(experiment)
    choice.identity()  # weights that are missing are better known before millions of rows are read
    if params.start:
        find_file(params.start, "training.start")
    encoder_file = directory_of(experiment) / f"{experiment.name}.yaml"
    with joined(_device(runtime.device)) as processes:
        if params.batch_size % processes.world:
            what = f"{processes.world} processes cannot share training.batch_size={params.batch_size}"
            raise UserError(what, do=f"set a multiple of {processes.world}")
        _seed_dropout(params.seed + processes.rank)
        validator = Validator(experiment, choice, runtime, processes)
        with _alone(experiment, processes), \
                Tracker(experiment, "training", directory_of(experiment), processes.is_first) as tracker:
            validator.prepare()
            examples = _examples_for_all(experiment, params, processes)
            trainer = _trainer(experiment, params, runtime, examples, processes, validator, tracker)
            first, total = trainer.resume(accept_changes), trainer.course.num_steps
            if processes.is_first:
                experiment.write(trainer.directory / "config.yaml")
                say(f"train      {total - first} of {total} steps to make, {params.batch_size} queries each, "
                    f"{len(examples.queries):,} queries and {len(examples.candidates):,} candidates")
            trainer.run()
        if processes.is_first:
            say(f"encoder    {encoder_file}")
            say(f"curve      {trainer.directory / CURVE}")
    return encoder_file


def _device(asked: str) -> str:
    """One CUDA device for each process of this machine."""
    device = resolve_device(asked)
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


def _seed_dropout(seed: int) -> None:
    """The only chance that is torch's own: all else is drawn by number (draws.py). Another one for each process."""
    import torch
    torch.manual_seed(seed)


def _trainer(experiment: Experiment, params: Params, runtime: Runtime, examples: Examples, processes: Processes,
             validator: Validator, tracker: Tracker) -> Trainer:
    choice, course = validator.choice, Course(examples, params)
    feeder, learner = fed_learner(experiment, params, runtime, course, processes)
    options = {**asdict(params), "start": params.start and weights_hash(Path(params.start))}
    asked = {**{f"training.{key}": value for key, value in options.items()}, "encoder": choice.identity(),
             "examples": [file["sha256"] for file in artifacts.read_manifest(examples.directory)["files"]]}
    return Trainer(directory_of(experiment), experiment.name, course, feeder, learner, runtime, processes,
                   json.loads(canonical_json(asked)), _configuration(choice), validator, tracker.numbers)


def fed_learner(experiment: Experiment, params: Params, runtime: Runtime, course: Course,
                processes: Processes) -> tuple[Feeder, Learner]:
    """The encoder with its initial weights, ready to learn, and what feeds it."""
    choice = _trainable_encoder(experiment)
    encoder: Any = load_encoder(choice.module).build(choice.params, _device(runtime.device), params.precision)
    if not hasattr(encoder, "embed") or not hasattr(getattr(encoder, "model", None), "logit_scale"):
        raise _not_trainable(choice)
    if params.start:
        _start_from(encoder.model, Path(params.start))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share the cores of this machine
    loaders = num_loaders(runtime.loaders, course.num_steps * params.batch_size, here)
    feeder = Feeder(course, experiment.images, encoder, runtime.chunk_size, loaders, runtime.max_flawed,
                    processes.rank, processes.world)
    objective = Objective(course.examples, params.symmetric, processes)
    return feeder, Learner(encoder, objective, params, runtime, course.num_steps)


def _start_from(model: Any, path: Path) -> None:
    """Take the weights of a file wherever a name of the model is in it; what is not stays as the encoder has it."""
    given = own_names(load_state(path))
    own = model.state_dict()
    taken = {name: tensor for name, tensor in given.items() if name in own}
    wrong = [name for name, tensor in taken.items() if tensor.shape != own[name].shape]
    if wrong or not taken:
        what = f"'{wrong[0]}' has another shape than in the encoder" if wrong else "no name fits the encoder"
        raise UserError(f"these weights cannot be started from: {what}", str(path),
                        "choose the architecture that these weights were trained with")
    model.load_state_dict(taken, strict=False)
    for names, what in ((own.keys() - taken.keys(), "stay as the encoder has them"),
                        (given.keys() - own.keys(), "of the file are not used")):
        if names:
            log.info("start: %d weights are taken, %d %s (%s ...)", len(taken), len(names), what, min(names))


def _trainable_encoder(experiment: Experiment) -> EncoderChoice:
    if len(experiment.encoders) != 1:
        raise UserError(f"a training has one encoder, not {len(experiment.encoders)}", do="encoders: [<one name>]")
    choice = experiment.encoders[0]
    if not hasattr(load_encoder(choice.module), "with_weights"):
        raise _not_trainable(choice)
    return choice


def _configuration(choice: EncoderChoice) -> Callable[[str], Mapping[str, Any]]:
    """Given a weights file: the encoder's configuration with it."""
    module: Any = load_encoder(choice.module)
    return lambda weights: {"encoder": choice.module, **asdict(module.with_weights(choice.params, weights))}


def _not_trainable(choice: EncoderChoice) -> UserError:
    return UserError(f"encoder '{choice.name}' cannot be trained", choice.module, (
        "it needs `model`, a torch module with `logit_scale`, and `embed`, from prepared items to vectors with\n"
        "gradients; its module needs `with_weights`: see pipeline/encoders/__init__.py"))


@contextmanager
def _alone(experiment: Experiment, processes: Processes) -> Iterator[None]:
    """Nobody else trains in this directory meanwhile. The lock ends with this process, however it ends."""
    path = directory_of(experiment) / ".lock"
    if not processes.is_first:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loader processes would inherit it
        except BlockingIOError:
            raise UserError("this training is running already", str(path.parent),
                            "wait for it, or begin another one: name=...") from None
        yield


def _examples_for_all(experiment: Experiment, params: Params, processes: Processes) -> Examples:
    """The first process makes them if they are missing, then all open them."""
    made = make_examples(experiment, params) if processes.is_first else None
    directory = processes.all_of(made.directory if made else None)[0]
    assert directory is not None, "the first process makes the examples"
    return Examples(directory)
