"""Writes mini M-BEIR in M-BEIR's files: query/, cand_pool/, qrels/, instructions/, mbeir_images/.

Rows are written as they are made. In memory are the pools of one task at a time (those that also answer the
queries of a later task stay), the paths of the pictures drawn so far and, last, the shuffled train queries.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import comb, gcd
from pathlib import Path
from typing import Any, Iterator
from zlib import crc32

from pipeline.benchmarks.mini_mbeir_world.tasks import TASKS, Item, MiniTask
from pipeline.benchmarks.mini_mbeir_world.spaces import Dice, mix
from pipeline.benchmarks.mini_mbeir_world.terms import Asked, Key, Shown, World
from pipeline.benchmarks.mini_mbeir_world.tree import Tree, modality, pool_file, query_files

# Queries and candidates of one task at scale 1, and the fewest at any scale.
QUERIES = {"train": 2200, "val": 80, "test": 170}
CANDIDATES = {"train": 1500, "val": 160, "test": 340}
FEWEST_QUERIES = 6
FEWEST_CANDIDATES = 24
CUTOFF = 5


@dataclass(frozen=True)
class TaskCounts:
    """One split of a task; `candidates` is its local pool, `chance` the hit@5 of a random order of it."""

    name: str
    kind: str
    queries: int
    candidates: int
    positives_per_query: float
    chance: float


@dataclass
class LocalPool:
    """The candidates of one file (of train: of one task), by the keys under which they are correct."""

    items: dict[str, list[Item]] = field(default_factory=dict)              # by split
    candidate_ids: dict[str, list[str]] = field(default_factory=dict)       # by split, in step with the items
    by_key: dict[Key, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(items) for items in self.items.values())


def write_tree(root: Path, scale: float, world: World) -> tuple[tuple[TaskCounts, ...], int, int]:
    """Everything but the marker. Returns the counts of test, the number of pictures and of train queries."""
    tree = Tree(root, scale, world)
    kept: dict[tuple[str, str], LocalPool] = {}
    tested = []
    for task in TASKS:
        shared = (("test",), ("val",)) if task.has_split_pools else (("test", "val"),)
        counts = [_write_task(tree, task, splits, kept) for splits in (*shared, ("train",))]
        tested.append(counts[0])
    _write_instructions(tree)
    _write_unions(tree)
    return tuple(tested), tree.images, _write_union_train(tree)


def _write_task(
    tree: Tree, task: MiniTask, splits: tuple[str, ...], kept: dict[tuple[str, str], LocalPool],
) -> TaskCounts:
    """One pool and the queries of the splits that search it; counts are of the first split."""
    pool = _write_pool(tree, task, splits)
    if any(task.name in other.also for other in TASKS):
        kept[task.name, splits[0]] = pool
    others = [kept[name, splits[0]] for name in task.also]
    return [_write_queries(tree, task, split, [pool, *others]) for split in splits][0]


def _write_pool(tree: Tree, task: MiniTask, splits: tuple[str, ...]) -> LocalPool:
    pool = LocalPool()
    with ExitStack() as stack:
        lines = tree.append(stack, *pool_file(task, splits[0]))
        for split in splits:
            size = tree.amount(CANDIDATES, split, FEWEST_CANDIDATES)
            pool.items[split] = task.items(tree.world, split, size)
            pool.candidate_ids[split] = [tree.next_id(task, "candidates") for _ in pool.items[split]]
            for item, candidate_id in zip(pool.items[split], pool.candidate_ids[split]):
                for key in task.keys(item):
                    pool.by_key.setdefault(key, []).append(candidate_id)
                shown = task.show(tree.world, split, item)
                row = _candidate_row(task, candidate_id, shown, tree.keep_picture(shown))
                lines.write(json.dumps(row) + "\n")
    return pool


def _candidate_row(task: MiniTask, candidate_id: str, shown: Shown, image: str | None) -> dict[str, Any]:
    """M-BEIR's field names. As there, some texts lack img_path and one dataset's rows lack src_content."""
    row: dict[str, Any] = {"did": candidate_id, "txt": shown.text, "img_path": image,
                           "modality": modality(shown), "src_content": json.dumps(shown.words)}
    if task.dataset == "facts":
        del row["img_path"]
    if task.dataset == "streets":
        del row["src_content"]
    return row


def _write_queries(tree: Tree, task: MiniTask, split: str, pools: list[LocalPool]) -> TaskCounts:
    number, positives, chance, kind = 0, 0, 0.0, ""
    query_file, qrels_file = query_files(task, split)
    with ExitStack() as stack:
        lines, judgements = tree.append(stack, *query_file), tree.append(stack, *qrels_file)
        for position, asked in _asked(tree, task, split, pools[0]):
            query_id = tree.next_id(task, split)
            correct = _correct(asked, pools)
            negatives = _neighbours(pools[0], task, split, position, correct)
            row = _query_row(task, query_id, asked.shown, tree.keep_picture(asked.shown), correct, negatives)
            lines.write(json.dumps(row) + "\n")
            judgements.writelines(f"{query_id} 0 {each} 1 {task.task_id}\n" for each in correct)
            number, positives, kind = number + 1, positives + len(correct), row["query_modality"]
            chance += _chance(len(pools[0]), len(_correct(asked, pools[:1])))
    sought = modality(task.show(tree.world, split, pools[0].items[split][0]))
    return TaskCounts(
        task.name, f"{kind} -> {sought}", number, len(pools[0]), positives / number, chance / number)


def _asked(tree: Tree, task: MiniTask, split: str, pool: LocalPool) -> Iterator[tuple[int, Asked]]:
    """Queries for items from all over the split's part of the pool; no two have the same text and picture."""
    items, wanted = pool.items[split], tree.amount(QUERIES, split, FEWEST_QUERIES)
    stride = len(items) * 5 // 8
    while gcd(stride, len(items)) != 1:
        stride += 1
    seen: set[tuple[str | None, str | None]] = set()
    for turn in range(4 * max(wanted, len(items))):
        position = turn * stride % len(items)
        dice = Dice(tree.world.seed, crc32(f"{task.name} {split}".encode()), turn)
        asked = task.ask(tree.world, split, items[position], dice, pool.by_key)
        if asked is None:
            continue
        face = asked.shown.text, asked.shown.picture.path if asked.shown.picture else None
        if face not in seen:
            seen.add(face)
            yield position, asked
        if len(seen) == wanted:
            return


def _correct(asked: Asked, pools: list[LocalPool]) -> list[str]:
    """All candidates of all pools that have a wanted key, each once, in the order of the pools."""
    found = [pool.by_key.get(key, []) for pool in pools for key in asked.wants]
    return list(dict.fromkeys(candidate_id for ids in found for candidate_id in ids))


def _neighbours(pool: LocalPool, task: MiniTask, split: str, position: int, correct: list[str]) -> list[str]:
    """Wrong candidates from beside the item in its album, where rows that differ in one attribute lie."""
    ids = pool.candidate_ids[split]
    near = [ids[position + step] for step in (1, -1, 2, -2) if 0 <= position + step < len(ids)]
    return [candidate_id for candidate_id in near if candidate_id not in correct][:task.hard_negatives]


def _query_row(
    task: MiniTask, query_id: str, shown: Shown, image: str | None, correct: list[str], negatives: list[str],
) -> dict[str, Any]:
    return {"qid": query_id, "query_txt": shown.text, "query_img_path": image,
            "query_modality": modality(shown), "query_src_content": json.dumps(shown.words),
            "pos_cand_list": correct, "neg_cand_list": negatives, "task_id": task.task_id}


def _chance(size: int, positives: int) -> float:
    """The probability that the first five of a random order hold a positive (hypergeometric)."""
    return 1.0 - comb(size - positives, CUTOFF) / comb(size, CUTOFF)


def _write_instructions(tree: Tree) -> None:
    with ExitStack() as stack:
        lines = tree.append(stack, "instructions", "query_instructions.tsv")
        lines.write("query_modality\tcand_modality\tdataset_name\tdataset_id\t"
                    "prompt_1\tprompt_2\tprompt_3\tprompt_4\n")
        for task in TASKS:
            item = task.items(tree.world, "test", 1)[0]
            asked = task.ask(tree.world, "test", item, Dice(0), ())
            assert asked is not None
            modalities = modality(asked.shown), modality(task.show(tree.world, "test", item))
            lines.write("\t".join((*modalities, task.dataset, str(task.dataset_id), *task.prompts)) + "\n")


def _write_unions(tree: Tree) -> None:
    """The unions of val and test are the local pools one after the other; so are the union's val queries."""
    for split in ("val", "test"):
        _concatenate(tree, [pool_file(task, split) for task in TASKS],
                     ("cand_pool", "global", f"mbeir_union_{split}_cand_pool.jsonl"))
    _concatenate(tree, [query_files(task, "val")[0] for task in TASKS],
                 ("query", "union_val", "mbeir_union_val.jsonl"))


def _concatenate(tree: Tree, sources: list[tuple[str, str, str]], target: tuple[str, str, str]) -> None:
    with tree.path(*target).open("wb") as whole:
        for source in sources:
            with tree.path(*source).open("rb") as part:
                shutil.copyfileobj(part, whole)


def _write_union_train(tree: Tree) -> int:
    """All train queries, small datasets repeated until they weigh as much as the largest, shuffled."""
    files = dict.fromkeys(query_files(task, "train")[0] for task in TASKS)
    parts = [tree.path(*file).read_bytes().splitlines(keepends=True) for file in files]
    largest = max(len(part) for part in parts)
    lines = [line for part in parts for line in part * round(largest / len(part))]
    order = sorted(range(len(lines)), key=lambda position: mix(tree.world.seed, position))
    with tree.path("query", "union_train", "mbeir_union_up_train.jsonl").open("wb") as union:
        union.writelines(lines[position] for position in order)
    return sum(len(part) for part in parts)
