"""What export writes: each file's name, what it is made from, and how. Nothing is written, and little computed, here.

`made_from` names everything that a file's content depends on by fingerprint, so that whether it is current is known
without making it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pipeline.artifacts import Artifact, shard_file
from pipeline.embeddings import read_table
from pipeline.plan import Plan, Scored, manifest_of
from pipeline.report import mteb_json, per_query
from pipeline.report.comparison import comparison
from pipeline.report.latex import latex_scores
from pipeline.report.retrieved import write_retrieved
from pipeline.report.rows import ScoreRow
from pipeline.report.tables import markdown_table
from pipeline.report.trec import write_trec_qrels, write_trec_run
from pipeline.report.uniir import README, result_table
from pipeline.stages.score import Job
from pipeline.status import warnings_of


@dataclass(frozen=True)
class File:
    """A file to export: its name below retrieval_results/, what it is made from, and how."""

    name: str
    made_from: Mapping[str, Any]
    write: Callable[[Path], object]


def files_of(plan: Plan, rows: Sequence[ScoreRow]) -> dict[str, list[File]]:
    """Every format that there is -> its files. `rows` are those of the plan, in its order."""
    return {"trec": [_run_file(plan, scored) for scored in plan.scored],
            "qrels": list(_qrels(plan)),
            "jsonl": [_retrieved_file(plan, scored) for scored in plan.scored],
            "tsv": list(_tsv(plan, rows)),
            "mteb": list(_mteb(plan, rows)),
            "per_query": [_per_query(plan)],
            "per_query_csv": [_per_query_csv(scored) for scored in plan.scored],
            "markdown": [_text_file("tables/scores.md", markdown_table(rows, plan.experiment, warnings_of(plan)))],
            "latex": [_latex(plan, rows)]}


def _run_file(plan: Plan, scored: Scored) -> File:
    job, depth = scored.job, plan.experiment.settings.export.depth
    made_from = {"run": job.run.label, "depth": depth, "tag": scored.encoder}
    return File(f"run_files/{_stem(scored)}.txt", made_from, partial(_write_run, job, depth, scored.encoder))


def _qrels(plan: Plan) -> Iterator[File]:
    """One per task, whatever searched it."""
    for task, artifact in {scored.task.name: scored.job.task for scored in plan.scored}.items():
        made_from = {"task": artifact.label, "digest": manifest_of(artifact.directory)["qrels_digest"]}
        yield File(f"qrels/{task}.txt", made_from, partial(_write_qrels, artifact))


def _retrieved_file(plan: Plan, scored: Scored) -> File:
    job, settings = scored.job, plan.experiment.settings
    depth, rule = settings.export.depth, settings.embed.instruction
    tables = [artifact.label for artifact in (job.task, *job.pools)]
    made_from = {"run": job.run.label, "tables": tables, "depth": depth, "instruction": rule}
    name = f"retrieved_candidates/{_stem(scored)}.jsonl"
    return File(name, made_from, lambda path: write_retrieved(job, path, depth, rule))


def _tsv(plan: Plan, rows: Sequence[ScoreRow]) -> Iterator[File]:
    yield _text_file("final_tsv/README.txt", README)
    for encoder, own in groupby(rows, key=lambda row: row.encoder):
        yield _text_file(f"final_tsv/{encoder}.tsv", result_table(list(own), plan.experiment))


def _mteb(plan: Plan, rows: Sequence[ScoreRow]) -> Iterator[File]:
    split = plan.experiment.benchmark.split
    for row in {row.encoder: row for row in rows}.values():
        yield _text_file(f"mteb/{mteb_json.folder(row)}/model_meta.json", mteb_json.model_meta(row))
    for scored, row in zip(plan.scored, rows):
        name = f"mteb/{mteb_json.folder(row)}/{mteb_json.task_name(row)}.json"
        yield _text_file(name, mteb_json.task_result(scored, row, split))


def _per_query(plan: Plan) -> File:
    made_from = {"scores": _labels(plan), "cells": [_stem(scored) for scored in plan.scored]}
    return File("per_query/per_query.parquet", made_from, partial(per_query.write_parquet, plan.scored))


def _per_query_csv(scored: Scored) -> File:
    made_from = {"score": scored.job.artifact.label}
    return File(f"per_query/{_stem(scored)}.csv", made_from, partial(per_query.write_csv, scored))


def _latex(plan: Plan, rows: Sequence[ScoreRow]) -> File:
    """The comparison is made only when the file is written."""
    made_from = {"scores": _labels(plan), "names": [_stem(scored) for scored in plan.scored],
                 "experiment": plan.experiment.name}
    return File("tables/scores.tex", made_from, partial(_write_latex, plan, rows))


def _write_latex(plan: Plan, rows: Sequence[ScoreRow], path: Path) -> None:
    compared = comparison(plan) if len(plan.experiment.encoders) > 1 else None
    path.write_text(latex_scores(rows, compared, f"Scores of {plan.experiment.name}."), encoding="utf-8")


def _labels(plan: Plan) -> list[str]:
    return [scored.job.artifact.label for scored in plan.scored]


def _stem(scored: Scored) -> str:
    return f"{scored.encoder}.{scored.task.name}.{scored.pool}"


def _write_run(job: Job, depth: int, tag: str, path: Path) -> None:
    """Shard by shard: a run may be larger than memory."""
    with path.open("wb") as file:
        for number in range(manifest_of(job.run.directory)["shards"]):
            run = read_table(job.run.path(shard_file("run", number)), job.run.fingerprint)
            write_trec_run(run.filter(pc.less_equal(run["rank"], depth)), file, tag)


def _write_qrels(task: Artifact, path: Path) -> None:
    write_trec_qrels(read_table(task.path("qrels.parquet"), task.fingerprint), path)


def _text_file(name: str, text: str) -> File:
    content = text.encode()
    return File(name, {"sha256": sha256(content).hexdigest()}, partial(_write_bytes, content))


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)
