"""retrieval_results/: runs, retrieved candidates and result tables in the formats other programs read.

Every file is whole or absent, and `exported.json` remembers from which artifacts and options it was made, so
a second export writes only what has changed. Files of cells that left the experiment are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pipeline.artifacts import atomic_path, shard_file, write_json
from pipeline.embeddings import read_table
from pipeline.plan import Plan, Scored, manifest_of
from pipeline.report.retrieved import write_retrieved
from pipeline.report.rows import score_rows
from pipeline.report.trec import write_trec_run
from pipeline.report.uniir import README, result_table
from pipeline.stages.score import Job

VERSION = 1
_RECORD = "exported.json"


@dataclass(frozen=True)
class _File:
    """A file to export: its name below retrieval_results/, what it is made from, and how."""

    name: str
    made_from: Mapping[str, Any]
    write: Callable[[Path], None]


def export(plan: Plan, again: bool = False) -> list[Path]:
    """Write what is missing or made from something else (`again`: everything); returns the files written now.

    NotReady if not everything is scored; UserError if an identifier cannot stand in a TREC file.
    """
    exported = _Exported(plan.experiment.directory / "retrieval_results")
    return [exported.write(file) for file in _files(plan) if again or not exported.is_current(file)]


class _Exported:
    """What stands in the directory, by its record: a file that is not the size it had is not trusted."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.record: dict[str, Any] = {}
        try:
            found = json.loads((directory / _RECORD).read_text())
        except (OSError, ValueError):  # absent or damaged: everything is written anew
            return
        if isinstance(found, dict):
            self.record = found

    def is_current(self, file: _File) -> bool:
        path = self.directory / file.name
        return path.is_file() and self.record.get(file.name) == _entry(file, path)

    def write(self, file: _File) -> Path:
        path = self.directory / file.name
        with atomic_path(path) as temporary:
            file.write(temporary)
        self.record[file.name] = _entry(file, path)
        write_json(self.directory / _RECORD, self.record)
        return path


def _entry(file: _File, path: Path) -> dict[str, Any]:
    return {"version": VERSION, **file.made_from, "bytes": path.stat().st_size}


def _files(plan: Plan) -> Iterator[_File]:
    rows, formats = score_rows(plan), plan.experiment.settings.export.formats
    for scored in plan.scored:
        if "trec" in formats:
            yield _run_file(plan, scored)
        if "jsonl" in formats:
            yield _retrieved_file(plan, scored)
    if "tsv" in formats:
        yield _text_file("final_tsv/README.txt", README)
        for encoder, own in groupby(rows, key=lambda row: row.encoder):
            yield _text_file(f"final_tsv/{encoder}.tsv", result_table(list(own), plan.experiment))


def _run_file(plan: Plan, scored: Scored) -> _File:
    job, depth = scored.job, plan.experiment.settings.export.depth
    made_from = {"run": job.run.label, "depth": depth, "tag": scored.encoder}
    return _File(f"run_files/{_stem(scored)}.txt", made_from, partial(_write_run, job, depth, scored.encoder))


def _retrieved_file(plan: Plan, scored: Scored) -> _File:
    job, settings = scored.job, plan.experiment.settings
    depth, rule = settings.export.depth, settings.embed.instruction
    tables = [artifact.label for artifact in (job.task, *job.pools)]
    made_from = {"run": job.run.label, "tables": tables, "depth": depth, "instruction": rule}
    name = f"retrieved_candidates/{_stem(scored)}.jsonl"
    return _File(name, made_from, lambda path: write_retrieved(job, path, depth, rule))


def _stem(scored: Scored) -> str:
    return f"{scored.encoder}.{scored.task.name}.{scored.pool}"


def _write_run(job: Job, depth: int, tag: str, path: Path) -> None:
    """Shard by shard: a run may be larger than memory."""
    with path.open("wb") as file:
        for number in range(manifest_of(job.run.directory)["shards"]):
            run = read_table(job.run.path(shard_file("run", number)), job.run.fingerprint)
            write_trec_run(run.filter(pc.less_equal(run["rank"], depth)), file, tag)


def _text_file(name: str, text: str) -> _File:
    content = text.encode()
    return _File(name, {"sha256": sha256(content).hexdigest()}, partial(_write_bytes, content))


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)
