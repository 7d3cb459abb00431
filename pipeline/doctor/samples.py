"""Some images of each pool and task, drawn with a fixed seed and decoded.

Of what is collected, images are drawn from up to SHARDS shards; of what is not, from the first rows of its file.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact
from pipeline.benchmarks import load_adapter
from pipeline.config import Experiment
from pipeline.doctor.places import pools_of, readable
from pipeline.embeddings import read_table
from pipeline.images import Flaw
from pipeline.plan import make_plan, manifest_of
from pipeline.support.errors import UserError
from pipeline.support.findings import FAIL, NOTE, OK, Finding, failed

SHARDS, FIRST_ROWS = 20, 20_000
DECODING = "decoding"

Reference = tuple[str, str]  # id of an item, its image


def findings(experiment: Experiment, count: int) -> Iterator[Finding]:
    """One for each pool and task with images, and how fast one process decodes them."""
    num_decoded, seconds, absent = 0, 0.0, []
    for subject, references in _subjects(experiment):
        try:
            known = references()
            chosen = random.Random(subject).sample(known, min(count, len(known)))
            started = time.perf_counter()
            if chosen:
                yield _decoded(experiment, subject, len(known), chosen)
            num_decoded, seconds = num_decoded + len(chosen), seconds + time.perf_counter() - started
        except UserError as error:
            yield failed(subject, error)
        except _Absent:
            absent.append(subject)
    if absent:
        yield Finding(NOTE, "left out", f"{len(absent)} pools and tasks whose files are not there")
    rate = num_decoded / seconds if seconds else None
    yield Finding(NOTE, DECODING, f"{rate:,.0f} images/s in one process" if rate else "no image was decoded", "", rate)


class _Absent(Exception):
    """What a pool or task is read from is not there: the section on files says so."""


def _subjects(experiment: Experiment) -> Iterator[tuple[str, Callable[[], list[Reference]]]]:
    """What has images, and how to learn which: from collected tables, or else from the benchmark's files."""
    collected = _collected(experiment)
    benchmark, adapter = experiment.benchmark, load_adapter(experiment.benchmark.adapter)
    for pool in pools_of(experiment):
        table = collected.get(f"{benchmark.name}.pool.{pool}")
        yield f"pool {pool}", (partial(_of_table, table) if table
                               else partial(_of_rows, partial(adapter.candidates, benchmark, pool),
                                            adapter.pool_sources(benchmark, pool)))
    for task in experiment.tasks:
        table = collected.get(f"{benchmark.name}.{task.name}")
        yield f"task {task.name}", (partial(_of_table, table) if table
                                    else partial(_of_rows, partial(adapter.queries, benchmark, task),
                                                 adapter.task_sources(benchmark, task)))


def _collected(experiment: Experiment) -> dict[str, Artifact]:
    try:
        jobs = make_plan(experiment).jobs["collect"]
    except UserError:  # the section on the plan says so
        return {}
    return {job.artifact.name: job.artifact for job in jobs if job.artifact.is_complete()}


def _of_table(table: Artifact) -> list[Reference]:
    shards = manifest_of(table.directory)["shards"]
    found: list[Reference] = []
    for shard in random.Random(table.name).sample(shards, min(SHARDS, len(shards))):
        rows = read_table(table.path(shard["file"]), table.fingerprint)
        pictured = rows.filter(rows["image"].is_valid())
        found.extend(zip(pictured.column(0).to_pylist(), pictured["image"].to_pylist()))
    return found


def _of_rows(rows: Callable[[], Iterator[Any]], sources: list[Path]) -> list[Reference]:
    if not all(map(readable, sources)):
        raise _Absent
    return [(row[0], row.image) for row in islice(rows(), FIRST_ROWS) if row.image is not None]


def _decoded(experiment: Experiment, subject: str, known: int, chosen: list[Reference]) -> Finding:
    flaws = []
    for identifier, reference in chosen:
        try:
            experiment.images.open(reference)
        except Flaw as flaw:
            flaws.append(f"{identifier}: {flaw}")
    if not flaws:
        return Finding(OK, subject, f"{len(chosen)} images of {known:,} decoded")
    tolerated = experiment.settings.embed.max_flawed
    return Finding(
        NOTE if len(flaws) <= tolerated else FAIL, subject,
        f"{len(flaws)} of {len(chosen)} images cannot be used, the first is {flaws[0]}",
        "mend or download them, or tolerate them: embed.max_flawed=N collect.max_missing_images=N")
