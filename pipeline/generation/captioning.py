"""Pictures of a benchmark turned into captions, and the benchmark into text retrieval: EvalScope's image_caption.

Every picture of the chosen tasks' queries and of their pools is described once by a model; a description takes the
place of its picture, behind whatever text the item has. What comes out has BEIR's layout and a benchmark's file of
ours beside it. The trade: a picture that has no caption for good leaves an item without its content (counted).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts import Artifact, Identity, atomic_path
from pipeline.benchmarks import beir
from pipeline.config import Experiment
from pipeline.embeddings import read_table
from pipeline.generation import answers
from pipeline.generation.answers import Job
from pipeline.generation.model import Model
from pipeline.generation.questions import from_table, table_rows
from pipeline.pieces import load_encoder_choice
from pipeline.plan import Plan, manifest_of
from pipeline.stages.collect import PoolJob, TaskJob
from pipeline.support.errors import UserError
from pipeline.tables import Qrel

DIRECTORY = "captioned"
SPLIT = "test"


@dataclass(frozen=True)
class Captioning:
    """One table of pictures and the job that describes them; `job` is None for a table without pictures."""

    table: Artifact
    job: Job | None


def only(experiment: Experiment, names: Sequence[str]) -> Experiment:
    """The experiment with the tasks of these names (none: all) and their own pools; UserError for an unknown name.

    Its encoders give way to one without weights, because nothing is embedded: their weights need not be there.
    """
    by_name = {task.name: task for task in experiment.tasks}
    for name in names:
        if name not in by_name:
            raise UserError(f"the experiment has no task '{name}'", "--task", f"all: {', '.join(by_name)}")
    return replace(experiment, tasks=tuple(by_name[name] for name in dict.fromkeys(names or by_name)),
                   encoders=(load_encoder_choice("random_vectors"),),
                   settings=replace(experiment.settings, pools=["local"]))


def captionings(plan: Plan, model: Model, prompt: str, max_side: int) -> list[Captioning]:
    """For the tables of the plan's tasks and of their pools, each once, in order; all must be collected."""
    tasks = plan.experiment.tasks
    pools = dict.fromkeys(task.pool for task in tasks)
    by_task = {job.task.name: job.artifact for job in plan.jobs["collect"] if isinstance(job, TaskJob)}
    by_pool = {job.pool: job.artifact for job in plan.jobs["collect"] if isinstance(job, PoolJob)}
    chosen = [*(by_task[task.name] for task in tasks), *(by_pool[pool] for pool in pools)]
    return [_captioning(plan.experiment, table, model, prompt, max_side) for table in chosen]


def _captioning(experiment: Experiment, table: Artifact, model: Model, prompt: str, max_side: int) -> Captioning:
    manifest = manifest_of(table.directory)
    if not any("image" in modality for modality in manifest["modalities"]):
        return Captioning(table, None)
    params = model.params({"prompt": prompt, "max_side": max_side})
    inputs = {"table": manifest["digest"], "images": manifest["image_sizes"]}
    identity = Identity(answers.STAGE, answers.VERSION, params, inputs)
    artifact = Artifact(experiment.directory, f"{table.name}.{model.slug}", identity)
    total = sum(count for modality, count in manifest["modalities"].items() if "image" in modality)
    return Captioning(table, Job(artifact, partial(from_table, table, experiment.images, prompt, max_side), total))


def write_benchmark(experiment: Experiment, done: Sequence[Captioning]) -> Path:
    """Write the folder of each task and `benchmark.yaml`; returns the latter.

    A pool that several tasks search is written once, into the folder of the first.
    """
    directory, tasks = experiment.directory / DIRECTORY, experiment.tasks
    tables, pools = done[:len(tasks)], dict.fromkeys(task.pool for task in tasks)
    by_pool = dict(zip(pools, done[len(tasks):]))
    home: dict[str, str] = {}
    for task, table in zip(tasks, tables):
        first = home.setdefault(task.pool, task.name) == task.name
        candidates = _texts(by_pool[task.pool], "candidate_id") if first else None
        beir.write(directory / task.name, SPLIT, candidates, _texts(table, "query_id"), _qrels(table.table))
    path = directory / "benchmark.yaml"
    piece = {"adapter": "beir", "root": str(directory.absolute()), "split": SPLIT, "tasks": {
        task.name: {"pool": home[task.pool], "headline": task.headline, "cutoffs": list(task.cutoffs)}
        for task in tasks}}
    with atomic_path(path) as temporary:
        temporary.write_text(f"# Pictures of {experiment.benchmark.name} as captions: text -> text.\n"
                             + yaml.safe_dump(piece, sort_keys=False))
    return path


def _texts(captioning: Captioning, key: str) -> Iterator[tuple[str, str]]:
    """(id, text and caption) of each row of a table, in order."""
    captions: Mapping[str, Any] = {}
    if captioning.job is not None:
        captions = {row["query_id"]: row["answer"] for row in answers.rows(captioning.job.artifact)}
    for row in table_rows(captioning.table):
        parts = ((row["text"] or "").strip(), (captions.get(row[key]) or "").strip())
        yield row[key], " ".join(part for part in parts if part)


def _qrels(table: Artifact) -> Iterator[Qrel]:
    for row in read_table(table.path("qrels.parquet"), table.fingerprint).to_pylist():
        yield Qrel(row["query_id"], row["candidate_id"], row["relevance"])
