"""M-BEIR, read from its published layout: query/, cand_pool/, qrels/, instructions/ below `benchmark.root`.

Rows stream, so memory does not grow with a pool. Texts and instructions are composed as in UniIR
(data/mbeir_dataset.py), but all prompts of a query are given, none is drawn by chance. What a task seeks
is known from its number, so no pool is read for it. A row that contradicts itself, or its task, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pipeline.benchmarks import Benchmark, Task
from pipeline.benchmarks.mbeir_negatives import Lists, MinedNegatives, copy_with_negatives
from pipeline.benchmarks.mbeir_rows import TASKS, Key, content, judgements, listed, read_prompts, task_number
from pipeline.benchmarks.mbeir_train import train_repeats, train_sources  # noqa: F401  parts of this adapter
from pipeline.support.errors import UserError, nearest
from pipeline.support.rows import Row, json_rows
from pipeline.tables import Candidate, Qrel, Query

SPLITS = ("train", "val", "test")
_WITHOUT = "do without instructions: benchmark.options.instructions=false"


def prepare(benchmark: Benchmark) -> None:
    """UserError unless every file that the tasks and pools need is there."""
    if benchmark.split not in SPLITS:
        raise UserError(f"M-BEIR has no split '{benchmark.split}'", do=f"splits: {', '.join(SPLITS)}")
    root = Path(benchmark.root).absolute()
    if not (root / "query").is_dir() or not (root / "cand_pool").is_dir():
        raise UserError("this directory does not hold M-BEIR: query/ or cand_pool/ is missing", str(root), (
            "set MBEIR_DATA_DIR or benchmark.root to the directory that holds them; the data:\n"
            "https://huggingface.co/datasets/TIGER-Lab/M-BEIR"))
    for task in benchmark.tasks:
        for path in (*task_sources(benchmark, task), *pool_sources(benchmark, task.pool)):
            _require(path)


def task_sources(benchmark: Benchmark, task: Task) -> list[Path]:
    instructions = [_instructions_path(benchmark)] if _wants_instructions(benchmark) else []
    return [_query_path(benchmark, task.name), _qrels_path(benchmark, task.name), *instructions]


def pool_sources(benchmark: Benchmark, pool: str) -> list[Path]:
    if benchmark.split == "train":  # its first query tells the data set's number
        return [_pool_path(benchmark, pool), _query_path(benchmark, _train_task(pool))]
    return [_pool_path(benchmark, pool)]


def candidate_modality(benchmark: Benchmark, task: Task) -> str | None:
    return TASKS[_number(task.name)][1]


def queries(benchmark: Benchmark, task: Task) -> Iterator[Query]:
    """The task's queries in the order of their file, each with all prompts for what the task seeks."""
    asked_with, sought = TASKS[_number(task.name)]
    prompts = read_prompts(_instructions_path(benchmark)) if _wants_instructions(benchmark) else None
    for row in _query_rows(benchmark, task):
        query_id = row.identifier("qid")
        text, image, modality = content(row, "query_txt", "query_img_path", "query_modality")
        if modality != asked_with:
            raise row.error(f"query_modality is '{modality}', but in {task.name} it must be '{asked_with}'")
        key = _dataset_id(query_id), modality, sought
        chosen = [] if prompts is None else _prompts_for(key, prompts, benchmark)
        instructed = [format_string(f"{prompt} {text or ''}") for prompt in chosen]
        yield Query(query_id, _formatted(text, modality), image, modality, chosen, instructed)


def candidates(benchmark: Benchmark, pool: str) -> Iterator[Candidate]:
    """The pool's candidates in the order of its file.

    The pool of a train task is the part of the published union with the task's data set and modality.
    """
    selected = _train_selection(benchmark, pool) if benchmark.split == "train" else None
    for row in json_rows(_pool_path(benchmark, pool)):
        candidate_id = row.identifier("did")
        text, image, modality = content(row, "txt", "img_path", "modality")
        if selected is None or selected == (_dataset_id(candidate_id), modality):
            yield Candidate(candidate_id, _formatted(text, modality), image, modality)


def qrels(benchmark: Benchmark, task: Task) -> Iterator[Qrel]:
    """The task's judgements; the fifth of M-BEIR's columns is the task of the query.

    A file of test or val is that of one task and is read whole; one of train holds all tasks of a data set.
    Grades stay as they are. Relevant candidates outside the pool (OVEN and InfoSeek have them) and judgements
    of unknown queries stay too: the audit counts them.
    """
    number = _number(task.name)
    tasks = _train_tasks(benchmark, task) if benchmark.split == "train" else {}
    for qrel, _ in judgements(_qrels_path(benchmark, task.name)):
        if tasks.get(qrel.query_id, number) == number:
            yield qrel


def candidate_lists(benchmark: Benchmark, task: Task) -> Iterator[tuple[str, list[str], list[str]]]:
    """(query id, ids of its positives, ids of its own hard negatives), as the query file lists them.

    With `benchmark.options.negatives`, a folder, the hard negatives of train queries are those of its file of the
    same name.
    """
    folder, path = benchmark.options.get("negatives"), _query_path(benchmark, task.name)
    mined = MinedNegatives(Path(str(folder), path.name)) if folder and benchmark.split == "train" else None
    for row in _query_rows(benchmark, task):
        query_id = row.identifier("qid")
        negatives = mined.of(query_id) if mined else listed(row, "neg_cand_list")
        yield query_id, listed(row, "pos_cand_list"), negatives


def rewrite_negatives(benchmark: Benchmark, negatives: Mapping[Task, Iterable[tuple[str, list[str]]]],
                      directory: Path) -> list[Path]:
    """Write the train query files of these tasks into `directory`, one per data set, with other hard negatives.

    `negatives` gives all query ids of a task in the order of `queries`, each with its new `neg_cand_list`. Lines of
    other tasks and all other fields stay as they are. UserError if the file has other queries.
    """
    assert benchmark.split == "train", "only train files hold hard negatives"
    by_source: dict[Path, dict[Task, Lists]] = {}
    for task, lists in negatives.items():
        by_source.setdefault(_query_path(benchmark, task.name), {})[task] = iter(lists)
    for source, given in by_source.items():
        by_number = {_number(task.name): lists for task, lists in given.items()}
        copy_with_negatives(source, directory / source.name, _train_tasks(benchmark, next(iter(given))), by_number)
    return [directory / source.name for source in by_source]


def format_string(text: str | None) -> str:
    """Text as M-BEIR stores it and UniIR reads it (UniIR, data/preprocessing/utils.py, `format_string`).

    Carriage returns, outer white space and outer quotes go, the first letter is raised, a full stop is added
    unless the text ends with one of `.?!`. Twice is not always once: it is applied exactly where UniIR does.
    """
    text = (text or "").replace("\r", "").strip().strip('"')
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")


def _formatted(text: str | None, modality: str) -> str | None:
    """None for an empty text, unless the text is all there is: then UniIR encodes the empty text."""
    formatted = format_string(text)
    return formatted if formatted or modality == "text" else None


def _number(task_name: str) -> int:
    return _parts(task_name)[1]


def _parts(task_name: str) -> tuple[str, int]:
    """("mscoco", 3) of "mscoco_task3"."""
    found = re.fullmatch(r"(\w+)_task([0-8])", task_name)
    if not found:
        raise UserError(f"'{task_name}' is not a task of M-BEIR", do="names are like mscoco_task0")
    return found[1], int(found[2])


def _train_task(pool: str) -> str:
    return pool.removesuffix("_train")


def _query_path(benchmark: Benchmark, task_name: str) -> Path:
    dataset, _ = _parts(task_name)
    stem = dataset if benchmark.split == "train" else task_name
    return Path(benchmark.root, "query", benchmark.split, f"mbeir_{stem}_{benchmark.split}.jsonl")


def _qrels_path(benchmark: Benchmark, task_name: str) -> Path:
    name = _query_path(benchmark, task_name).name.replace(".jsonl", "_qrels.txt")
    return Path(benchmark.root, "qrels", benchmark.split, name)


def _pool_path(benchmark: Benchmark, pool: str) -> Path:
    if benchmark.split == "train":
        return Path(benchmark.root, "cand_pool", "global", "mbeir_union_train_cand_pool.jsonl")
    return Path(benchmark.root, "cand_pool", "local", f"mbeir_{pool}_cand_pool.jsonl")


def _instructions_path(benchmark: Benchmark) -> Path:
    return Path(benchmark.root, "instructions", "query_instructions.tsv")


def _wants_instructions(benchmark: Benchmark) -> bool:
    return bool(benchmark.options.get("instructions", True))


def _require(path: Path) -> None:
    if path.is_file():
        return
    if path.suffix == ".tsv":
        do = f"put M-BEIR's file there, or {_WITHOUT}"
    else:
        do = nearest(path.name, (other.name for other in path.parent.glob("mbeir_*")))
    raise UserError(f"M-BEIR's file {path.name} is not there", str(path), do or "check benchmark.tasks")


def _query_rows(benchmark: Benchmark, task: Task) -> Iterator[Row]:
    """Rows of the task's queries, in order."""
    number, is_train = _number(task.name), benchmark.split == "train"
    tasks = _train_tasks(benchmark, task) if is_train else {}
    for row in json_rows(_query_path(benchmark, task.name)):
        if not is_train and task_number(row) not in (None, number):
            raise row.error(f"task_id is {task_number(row)} in a file of {task.name}")
        if tasks.get(row.identifier("qid"), number) == number:
            yield row


def _train_tasks(benchmark: Benchmark, task: Task) -> dict[str, int]:
    """Query id -> number of its task: its own task_id, or else the fifth column of its first judgement."""
    tasks: dict[str, int] = {}
    for qrel, judged_task in judgements(_qrels_path(benchmark, task.name)):
        tasks.setdefault(qrel.query_id, judged_task)
    for row in json_rows(_query_path(benchmark, task.name)):
        query_id, task_id = row.identifier("qid"), task_number(row)
        if task_id is not None:
            tasks[query_id] = task_id
        elif query_id not in tasks:
            raise row.error("the task of this query is not known",
                            "give it a task_id, or a judgement in the qrels")
    return tasks


def _train_selection(benchmark: Benchmark, pool: str) -> tuple[str, str]:
    """Data set id and modality of the candidates in the pool of a train task."""
    task_name = _train_task(pool)
    path = _query_path(benchmark, task_name)
    first = next(json_rows(path), None)
    if first is None:
        raise UserError("no query tells the number of the data set", str(path))
    return _dataset_id(first.identifier("qid")), TASKS[_number(task_name)][1]


def _dataset_id(identifier: str) -> str:
    return identifier.partition(":")[0]


def _prompts_for(key: Key, prompts: dict[Key, list[str]], benchmark: Benchmark) -> list[str]:
    chosen = [formatted for prompt in prompts.get(key, ()) if (formatted := format_string(prompt))]
    if not chosen:
        what = "no instructions for data set {}, {} -> {}".format(*key)
        raise UserError(what, str(_instructions_path(benchmark)), f"add a row, or {_WITHOUT}")
    return chosen
