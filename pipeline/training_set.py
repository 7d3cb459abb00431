"""The training set: a benchmark's train split, collected by the stage `collect`, as the examples a training reads.

Made once for each training, in its directory: `examples/<benchmark>-<fingerprint>`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import artifacts
from pipeline.artifacts import Artifact, Identity
from pipeline.benchmarks import load_adapter
from pipeline.config import Experiment, for_split
from pipeline.embeddings import read_table
from pipeline.plan import Plan, make_plan, manifest_of
from pipeline.stages import collect
from pipeline.stages.score import tables_of
from pipeline.support.errors import UserError
from pipeline.training.examples import Examples, TaskTables, write_examples
from pipeline.training.settings import Params
from pipeline.workers import run_stage

log = logging.getLogger("pipeline")
VERSION = 1


@dataclass(frozen=True)
class _ExampleParams(artifacts.Params):
    """What of the options decides the examples."""

    with_negatives: bool
    repeats: str


def directory_of(experiment: Experiment) -> Path:
    """Where everything of a training lies."""
    return experiment.work_dir / "trainings" / experiment.name


def make_examples(experiment: Experiment, params: Params) -> Examples:
    """Collect the train split, and write what a training reads unless it is there."""
    source = for_split(experiment, "train")
    # Hard negatives may come from anywhere; without them only the tasks' own pools are of interest.
    pools = ["union"] if params.hard_negatives else ["local"]
    source = replace(source, settings=replace(source.settings, pools=pools))
    run_stage(source, "collect")
    plan = make_plan(source)
    artifact = _examples_artifact(source, plan, params)
    if not artifact.is_complete():
        facts = write_examples(artifact.directory, list(_tasks(source, plan, params)), _candidates(plan),
                               _repeats(source, params))
        artifact.seal(facts)
        for count, what in ((facts["queries_without_positive"], "queries without a positive in the pools are left out"),
                            (facts["positives_outside_pools"], "positives are not in the pools of the chosen tasks")):
            if count:
                log.warning("%s %s", f"{count:,}", what)
    return Examples(artifact.directory)


def _examples_artifact(source: Experiment, plan: Plan, params: Params) -> Artifact[_ExampleParams]:
    """Tables enter by content, the files that are read beside them by size and time."""
    inputs: dict[str, str] = {}
    for job in plan.jobs["collect"]:
        if not isinstance(job, collect.AuditJob):
            found = manifest_of(job.artifact.directory)
            inputs[job.artifact.name] = " ".join(filter(None, (found["digest"], found.get("qrels_digest"))))
    wanted = _ExampleParams(params.hard_negatives > 0, params.repeats)
    adapter: Any = load_adapter(source.benchmark.adapter)
    if hasattr(adapter, "train_sources") and (wanted.with_negatives or wanted.repeats == "union_train"):
        for path in adapter.train_sources(source.benchmark):
            state = path.stat()
            inputs[f"{path.parent.name}/{path.name}"] = f"{state.st_size}:{state.st_mtime_ns}"
    root = directory_of(source)
    return Artifact(root, source.benchmark.name, Identity("examples", VERSION, wanted, inputs))


def _tasks(source: Experiment, plan: Plan, params: Params) -> Iterator[TaskTables]:
    adapter: Any = load_adapter(source.benchmark.adapter)
    for job in plan.jobs["collect"]:
        if isinstance(job, collect.TaskJob):
            qrels = read_table(job.artifact.path("qrels.parquet"), job.artifact.fingerprint)
            negatives = None
            if params.hard_negatives:
                if not hasattr(adapter, "candidate_lists"):
                    raise UserError(f"benchmark {source.benchmark.name} lists no hard negatives", do=(
                        "set training.hard_negatives=0, or define candidate_lists in its adapter"))
                negatives = ((query_id, own) for query_id, _, own in adapter.candidate_lists(job.benchmark, job.task))
            yield TaskTables(job.task.name, tables_of(job.artifact), qrels, negatives)


def _candidates(plan: Plan) -> pa.Table:
    pools = [job for job in plan.jobs["collect"] if isinstance(job, collect.PoolJob)]
    return pa.concat_tables([tables_of(job.artifact) for job in pools])


def _repeats(source: Experiment, params: Params) -> Mapping[str, int] | None:
    if params.repeats == "once":
        return None
    adapter: Any = load_adapter(source.benchmark.adapter)
    if not hasattr(adapter, "train_repeats"):
        raise UserError(f"benchmark {source.benchmark.name} has no list of repeated train queries", "training.repeats",
                        "set training.repeats=once; training.rows repeats tasks")
    repeats: Mapping[str, int] = adapter.train_repeats(source.benchmark)
    return repeats
