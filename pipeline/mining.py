"""Hard negatives: what an encoder ranks first among the candidates that do not answer a query, for the next training.

The train split is searched by the stages that measure, from collect to retrieve, so that a mining is resumed and
its parts are shared like those of any experiment. All queries are looked at before a file is written: either every
query gets as many negatives as were asked for, or the user is told what depth gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pipeline.artifacts import shard_file
from pipeline.benchmarks import load_adapter
from pipeline.config import Experiment, for_split
from pipeline.embeddings import read_table
from pipeline.plan import Scored, make_plan, manifest_of
from pipeline.run import describe
from pipeline.stages import STAGES
from pipeline.support.errors import UserError
from pipeline.workers import run_stage

DIRECTORY = "mined_negatives"
NEEDS = ("candidate_lists", "rewrite_negatives")
SPLIT = "train"

Say = Callable[..., Any]


@dataclass(frozen=True)
class Wanted:
    """`count` negatives per query, after the first `skip`: at the very top stand candidates nobody has judged."""

    count: int
    skip: int

    def of(self, ranked: Sequence[str], positives: set[str]) -> list[str]:
        """The negatives among candidates that stand best first; fewer than wanted if they end before."""
        others = [candidate_id for candidate_id in ranked if candidate_id not in positives]
        return others[self.skip:self.skip + self.count]


def mine(experiment: Experiment, count: int, skip: int, say: Say) -> list[Path]:
    """Search the union of the train pools and write `mined_negatives/` below the experiment: one file per data set.

    A negative is no candidate with a relevance above 0 in the qrels, and none that the query file lists as a
    positive. UserError if retrieve.depth is too small to leave `count` of them to every query.
    """
    searched, wanted = on_train(experiment), Wanted(count, skip)
    _check(searched, wanted)
    searched.check_encoders()
    for stage in STAGES[:STAGES.index("score")]:
        say(describe(run_stage(searched, stage)))
    cells = make_plan(searched).scored
    _check_depth(searched, cells, wanted)
    adapter: Any = load_adapter(searched.benchmark.adapter)
    negatives = {cell.task: _negatives(searched, cell, wanted) for cell in cells}
    paths: list[Path] = adapter.rewrite_negatives(searched.benchmark, negatives, experiment.directory / DIRECTORY)
    return paths


def on_train(experiment: Experiment) -> Experiment:
    """The experiment on the train split, where every task searches the union of all train pools."""
    settings = experiment.settings
    # What was mined before has no bearing: files are written anew from the benchmark's own.
    options = {name: value for name, value in settings.benchmark.options.items() if name != "negatives"}
    benchmark = replace(settings.benchmark, options=options)
    return for_split(replace(experiment, settings=replace(settings, benchmark=benchmark, pools=["union"])), SPLIT)


def _check(searched: Experiment, wanted: Wanted) -> None:
    if wanted.count < 1 or wanted.skip < 0:
        raise UserError(f"{wanted.count} negatives after the first {wanted.skip} cannot be mined",
                        do="ask for at least 1, and skip 0 or more")
    if len(searched.encoders) != 1:
        names = ", ".join(encoder.name for encoder in searched.encoders)
        raise UserError(f"one encoder finds the negatives, not {len(searched.encoders)}: {names or 'none'}",
                        searched.name, "choose it: encoders=[...]")
    adapter = load_adapter(searched.benchmark.adapter)
    if lacking := [name for name in NEEDS if not hasattr(adapter, name)]:
        raise UserError(f"benchmark adapter '{searched.benchmark.adapter}' cannot be mined",
                        do=f"it defines no {', '.join(lacking)}; see pipeline/benchmarks/mbeir.py")
    depth, least = searched.settings.retrieve.depth, wanted.count + wanted.skip
    if depth < least:
        raise UserError(f"retrieve.depth is {depth}; {least} candidates and the positives among them are needed",
                        searched.name, f"set retrieve.depth={least} and something for the positives")


def _check_depth(searched: Experiment, cells: Sequence[Scored], wanted: Wanted) -> None:
    """Every query must keep enough; a depth by which all its positives could be dropped is always enough."""
    depth, short, needed = searched.settings.retrieve.depth, 0, 0
    for cell in cells:
        for query_id, ranked, positives in _ranked(searched, cell):
            if len(wanted.of(ranked, positives)) == wanted.count:
                continue
            if len(ranked) < depth:
                raise UserError(f"only {len(ranked)} candidates were found for query '{query_id}': too few to leave "
                                f"{wanted.count} negatives after the first {wanted.skip}", cell.task.name,
                                "ask for fewer, or skip fewer: a greater depth finds no more")
            short, needed = short + 1, max(needed, wanted.count + wanted.skip + len(positives))
    if short:
        raise UserError(f"{short} queries have fewer than {wanted.count} negatives after the first {wanted.skip}",
                        f"retrieve.depth is {depth}", f"set retrieve.depth={needed}")


def _negatives(searched: Experiment, cell: Scored, wanted: Wanted) -> Iterator[tuple[str, list[str]]]:
    for query_id, ranked, positives in _ranked(searched, cell):
        yield query_id, wanted.of(ranked, positives)


def _ranked(searched: Experiment, cell: Scored) -> Iterator[tuple[str, list[str], set[str]]]:
    """(query id, ids of its candidates best first, ids of its positives) for all queries of a task, in its order."""
    positives, task, run = _positives(searched, cell), cell.job.task, cell.job.run
    for number, shard in enumerate(manifest_of(task.directory)["shards"]):
        query_ids = read_table(task.path(shard["file"]), task.fingerprint, ["query_id"])["query_id"].to_pylist()
        hits = read_table(run.path(shard_file("run", number)), run.fingerprint)
        pairs = zip(hits["query_id"].to_pylist(), hits["candidate_id"].to_pylist())
        ranked = {query_id: [candidate_id for _, candidate_id in own]
                  for query_id, own in groupby(pairs, key=itemgetter(0))}
        for query_id in query_ids:
            yield query_id, ranked.get(query_id, []), positives.get(query_id, set())


def _positives(searched: Experiment, cell: Scored) -> dict[str, set[str]]:
    adapter: Any = load_adapter(searched.benchmark.adapter)
    task = cell.job.task
    qrels = read_table(task.path("qrels.parquet"), task.fingerprint)
    relevant = qrels.filter(pc.greater(qrels["relevance"], 0))
    found: dict[str, set[str]] = {}
    for query_id, candidate_id in zip(relevant["query_id"].to_pylist(), relevant["candidate_id"].to_pylist()):
        found.setdefault(query_id, set()).add(candidate_id)
    for query_id, candidate_ids, _ in adapter.candidate_lists(searched.benchmark, cell.task):
        found.setdefault(query_id, set()).update(candidate_ids)
    return found
