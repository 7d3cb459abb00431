"""One YAML and `key=value` pairs -> a checked, typed experiment that knows where each value came from.

Merge order: configs/base.yaml, the named benchmark and encoders, the experiment, the command line. Every value is
checked against dataclasses when it is merged; all mistakes are reported at once, with file and line and the
nearest name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.artifacts import atomic_path
from pipeline.benchmarks import Benchmark, Task
from pipeline.encoders import load_encoder
from pipeline.images import ImageStore
from pipeline.pieces import (
    CONFIGS, EncoderChoice, EncoderPiece, benchmark_piece, encoder_pieces, find, task_names,
)
from pipeline.settings import Settings, TaskSettings
from pipeline.sources import Source, read_command_line, read_file
from pipeline.support.errors import UserError, nearest

_BASE = CONFIGS / "base.yaml"


@dataclass(frozen=True)
class Experiment:
    name: str
    settings: Settings
    benchmark: Benchmark
    tasks: tuple[Task, ...]
    encoders: tuple[EncoderChoice, ...]
    resolved: Mapping[str, Any]
    origins: Mapping[str, str]

    @property
    def work_dir(self) -> Path:
        return Path(self.settings.work_dir)

    @property
    def directory(self) -> Path:
        return self.work_dir / "experiments" / self.name

    @cached_property
    def images(self) -> ImageStore:
        """The images of its benchmark."""
        benchmark = self.benchmark
        return ImageStore(Path(benchmark.root), benchmark.archives, benchmark.trusted_roots, self.work_dir / "cache")

    def check_encoders(self) -> None:
        """UserError if weights or an environment are missing: better known before millions of rows are read."""
        for encoder in self.encoders:
            encoder.identity()
            encoder.check_interpreter()

    def write(self, path: Path) -> None:
        """Write the merged configuration as YAML."""
        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(dict(self.resolved), sort_keys=False))

    def members(self, pool: str, task: Task) -> tuple[str, ...]:
        """Pools that a search of `pool` by `task` goes through: a union is always whole, whatever tasks are chosen."""
        if pool == "local":
            return (task.pool,)
        return tuple(self.benchmark.pools if pool == "union" else self.settings.unions[pool])


def load(experiment: str, overrides: Sequence[str] = (), kind: str = "experiments") -> Experiment:
    """The experiment (or training) of this name or path, with overrides; UserError lists every mistake at once."""
    path = find(kind, experiment)
    told = [read_file(path), read_command_line(overrides)]
    chosen = {key: source.values[key] for source in told for key in ("benchmark", "encoders") if key in source.values}
    for key in ("benchmark", "encoders"):
        if key not in chosen:
            raise UserError(f"the experiment names no {key}", str(path), f"add a line like: {key}: ...")
    benchmark, encoders = benchmark_piece(*chosen["benchmark"]), list(encoder_pieces(*chosen["encoders"]))
    names = [encoder.name for encoder in encoders]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two encoders are named '{twice}'", str(path), "rename one of the files")
    schema = _skeleton(Settings)
    schema.encoders = {encoder.name: _skeleton(load_encoder(encoder.module).Params) for encoder in encoders}
    schema.benchmark.tasks = {name: _skeleton(TaskSettings) for name in task_names(benchmark)}
    origins = _merge(schema, [read_file(_BASE), benchmark, *(encoder.source for encoder in encoders), *told])
    return _experiment(schema, path, encoders, origins)


def _skeleton(kind: type[Any]) -> DictConfig:
    """A typed node with all its sections and no values; open, because frozen dataclasses make read-only nodes."""
    node = OmegaConf.structured(kind)
    OmegaConf.set_readonly(node, False)
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            node[name] = _skeleton(hint)  # type: ignore[arg-type]
        elif get_origin(hint) is dict and OmegaConf.is_missing(node, name):
            node[name] = {}
    return node


def _merge(schema: DictConfig, sources: Sequence[Source]) -> dict[str, str]:
    """Put every value in its place, the last word wins; returns where each value came from."""
    origins: dict[str, str] = {}
    mistakes: list[UserError] = []
    for source in sources:
        for key, (value, where) in source.values.items():
            if key in ("benchmark", "encoders"):
                continue
            try:
                OmegaConf.update(schema, key, value, merge=False)
                origins[key] = where
            except OmegaConfBaseException as error:
                mistakes.append(_mistake(schema, key, value, where, error))
    if mistakes:
        raise UserError("\n".join(str(mistake) for mistake in mistakes))
    return origins


def _mistake(schema: DictConfig, key: str, value: Any, where: str, error: Exception) -> UserError:
    node: Any = schema
    parts = key.split(".")
    for depth, name in enumerate(parts):
        if isinstance(node, DictConfig) and name not in node:
            kind = f"an option of {'.'.join(parts[:depth])}" if depth else "an option"
            known = [str(option) for option in node]
            advice = [nearest(name, known), f"all: {', '.join(known)}"]
            return UserError(f"'{name}' is not {kind}", where, "\n".join(line for line in advice if line))
        node = node._get_node(name) if isinstance(node, DictConfig) else None
    return UserError(f"{key}: {value!r} does not fit: {str(error).splitlines()[0]}", where)


def _experiment(schema: DictConfig, path: Path, encoders: Sequence[EncoderPiece],
                origins: Mapping[str, str]) -> Experiment:
    try:
        settings = OmegaConf.to_object(schema)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0], str(path)) from None
    assert isinstance(settings, Settings)
    benchmark = _benchmark(settings)
    experiment = Experiment(
        name=settings.name or path.stem, settings=settings, benchmark=benchmark,
        tasks=_tasks(settings, benchmark, path),
        encoders=tuple(EncoderChoice(encoder.name, encoder.module, settings.encoders[encoder.name], encoder.python)
                       for encoder in encoders),
        resolved=OmegaConf.to_container(schema, resolve=True), origins=origins)  # type: ignore[arg-type]
    _check_pools(experiment, path)
    return experiment


def _benchmark(settings: Settings) -> Benchmark:
    given, tasks = settings.benchmark, []
    for name, task in given.tasks.items():
        pool = (task.pool or name).replace("{split}", given.split)
        tasks.append(Task(name, pool, tuple(task.cutoffs), task.headline))
    return Benchmark(given.name, given.adapter, given.root, given.split, tuple(tasks), tuple(given.archives),
                     tuple(given.trusted_roots), dict(given.options))


def _tasks(settings: Settings, benchmark: Benchmark, path: Path) -> tuple[Task, ...]:
    by_name = {task.name: task for task in benchmark.tasks}
    for name in settings.tasks:
        if name not in by_name:
            raise UserError(f"benchmark {benchmark.name} has no task '{name}'", str(path), "\n".join(
                line for line in (nearest(name, by_name), f"all: {', '.join(by_name)}") if line))
    return tuple(by_name[name] for name in settings.tasks or by_name)


def _check_pools(experiment: Experiment, path: Path) -> None:
    for name in (experiment.name, *experiment.settings.unions):
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"'{name}' cannot be part of a file name", str(path), "use letters, digits, _ - .")
    known = {"local", "union", *experiment.settings.unions}
    for name in experiment.settings.pools:
        if name not in known:
            raise UserError(f"'{name}' is neither local, union nor a name under `unions`", str(path),
                            nearest(name, known))
    for union, members in experiment.settings.unions.items():
        if union in ("local", "union") or not members:
            raise UserError(f"`unions`: '{union}' needs " + ("members" if not members else "another name"), str(path))
        for member in members:
            if member not in experiment.benchmark.pools:
                raise UserError(f"union '{union}': there is no pool '{member}'", str(path),
                                nearest(member, experiment.benchmark.pools))


def for_split(experiment: Experiment, split: str) -> Experiment:
    """A loaded experiment on another split of its benchmark; the pool of a train task is `<task>_train`."""
    given, before = experiment.settings.benchmark, experiment.benchmark.tasks
    tasks = {name: replace(task, pool=f"{name}_train") if split == "train" else task
             for name, task in given.tasks.items()}
    settings = replace(experiment.settings, benchmark=replace(given, split=split, tasks=tasks))
    benchmark = _benchmark(settings)
    unions = {name: list(dict.fromkeys(new.pool for old, new in zip(before, benchmark.tasks) if old.pool in members))
              for name, members in settings.unions.items()}
    return replace(experiment, settings=replace(settings, unions=unions), benchmark=benchmark,
                   tasks=_tasks(settings, benchmark, Path()))


T = TypeVar("T")


def part(settings: Any, kind: type[T]) -> T:
    """The fields of `kind` (a stage's Params or Runtime) out of the settings of its section."""
    return kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})  # type: ignore[arg-type]
