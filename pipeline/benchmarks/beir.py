"""Text retrieval in BEIR's layout: corpus.jsonl, queries.jsonl and qrels/<split>.tsv, one folder per task.

`benchmark.root` holds folders named as the tasks, or the three themselves for a single task; `pool` names another
task's folder. As in BEIR, a title stands before its text, and only queries that the split judges are asked. The trade:
a candidate with its query's id stays, whatever some evaluations drop: ids of the two need not be of one space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.artifacts import atomic_path
from pipeline.benchmarks import Benchmark, Task
from pipeline.support.errors import UserError
from pipeline.support.rows import Row, json_rows, text_lines
from pipeline.tables import Candidate, Qrel, Query

_HEADER = "query-id\tcorpus-id\tscore"
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")  # fits the int32 of the qrels table


def prepare(benchmark: Benchmark) -> None:
    """UserError unless every file that the tasks and pools need is there."""
    for task in benchmark.tasks:
        for path in (*task_sources(benchmark, task), *pool_sources(benchmark, task.pool)):
            if not path.is_file():
                raise UserError(f"task {task.name} needs {path.name}, which is not there", str(path), (
                    "BEIR's layout is <root>/<task>/corpus.jsonl, queries.jsonl and qrels/<split>.tsv;\n"
                    "check benchmark.root and benchmark.split, or choose tasks=[...] that are there"))


def task_sources(benchmark: Benchmark, task: Task) -> list[Path]:
    folder = _folder(benchmark, task.name)
    return [folder / "queries.jsonl", folder / "qrels" / f"{benchmark.split}.tsv"]


def pool_sources(benchmark: Benchmark, pool: str) -> list[Path]:
    return [_folder(benchmark, pool) / "corpus.jsonl"]


def candidate_modality(benchmark: Benchmark, task: Task) -> str | None:
    return "text"


def queries(benchmark: Benchmark, task: Task) -> Iterator[Query]:
    """The queries that the split judges, in the order of their file."""
    path, judgements = task_sources(benchmark, task)
    judged = {qrel.query_id for qrel in _judgements(judgements)}
    for row in json_rows(path):
        if (query_id := _identifier(row)) in judged:
            yield Query(query_id, row.string("text") or "", None, "text", [], [])


def candidates(benchmark: Benchmark, pool: str) -> Iterator[Candidate]:
    """The pool in the order of its file: title, a blank, text; whichever of them is there."""
    for row in json_rows(pool_sources(benchmark, pool)[0]):
        parts = ((row.string("title") or "").strip(), (row.string("text") or "").strip())
        yield Candidate(_identifier(row), " ".join(part for part in parts if part), None, "text")


def qrels(benchmark: Benchmark, task: Task) -> Iterator[Qrel]:
    return _judgements(task_sources(benchmark, task)[1])


def write(folder: Path, split: str, corpus: Iterable[tuple[str, str]] | None, asked: Iterable[tuple[str, str]],
          judged: Iterable[Qrel]) -> None:
    """Write (id, text) of candidates and of queries and their judgements into `folder`, each file whole or not at all.

    Without a corpus, the pool stands in another folder. The judgements stand in qrels/<split>.tsv as BEIR reads them,
    and in qrels.jsonl as newer programs do.
    """
    for name, rows in (("corpus.jsonl", corpus), ("queries.jsonl", asked)):
        if rows is not None:
            _write(folder / name, (_json({"_id": identifier, "text": text}) for identifier, text in rows))
    found = list(judged)
    _write(folder / "qrels" / f"{split}.tsv",
           [_HEADER, *(f"{qrel.query_id}\t{qrel.candidate_id}\t{qrel.relevance}" for qrel in found)])
    _write(folder / "qrels.jsonl", (_json({"query-id": qrel.query_id, "corpus-id": qrel.candidate_id,
                                           "score": qrel.relevance}) for qrel in found))


def _write(path: Path, lines: Iterable[str]) -> None:
    file: IO[str]
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def _json(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def _folder(benchmark: Benchmark, name: str) -> Path:
    """Of a task or pool: its own, or the root if that is the folder of a single task."""
    root = Path(benchmark.root)
    single = len(benchmark.tasks) == 1 and not (root / name).is_dir() and (root / "corpus.jsonl").is_file()
    return root if single else root / name


def _identifier(row: Row) -> str:
    """`_id`, which some programs write as a number."""
    value = row.fields.get("_id")
    return str(value) if type(value) is int else row.identifier("_id")


def _judgements(path: Path) -> Iterator[Qrel]:
    """Lines of three columns with tabs between them; a first line whose grade is no number is the header."""
    for number, line in text_lines(path):
        columns = [column.strip() for column in line.split("\t")]
        if number == 1 and len(columns) == 3 and not _INTEGER.fullmatch(columns[2]):
            continue
        if len(columns) != 3 or not all(columns) or not _INTEGER.fullmatch(columns[2]):
            raise UserError("a query id, a candidate id and a whole number are expected, with tabs between",
                            f"{path}:{number}")
        yield Qrel(columns[0], columns[1], int(columns[2]))
