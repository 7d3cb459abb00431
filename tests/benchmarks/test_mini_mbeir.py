"""Mini M-BEIR as a tree of files: the layout, the splits, and what the adapter makes of it.

Whether its positives are right is asked in test_mini_mbeir_truth.py.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.benchmarks import Benchmark, Task, mbeir, mini_mbeir
from pipeline.benchmarks.mini_mbeir_world import spaces
from pipeline.benchmarks.mini_mbeir_world.tasks import TASKS

SCALE = 0.05
CONFIG = Path(__file__).parents[2] / "configs" / "benchmarks" / "mini_mbeir.yaml"
KINDS = {0: ("text", "image"), 1: ("text", "text"), 2: ("text", "image,text"), 3: ("image", "text"),
         4: ("image", "image"), 6: ("image,text", "text"), 7: ("image,text", "image"),
         8: ("image,text", "image,text")}

Row = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mini") / "mini_mbeir"
    mini_mbeir.generate(directory, SCALE)
    return directory


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pool_name(task: str, split: str) -> str:
    return f"{task}_{split}" if task.startswith("streets") else task


def local_pool(root: Path, task: str, split: str = "test") -> list[Row]:
    return rows(root / "cand_pool" / "local" / f"mbeir_{pool_name(task, split)}_cand_pool.jsonl")


def queries(root: Path, task: str, split: str = "test") -> list[Row]:
    return rows(root / "query" / split / f"mbeir_{task}_{split}.jsonl")


def benchmark(root: Path, split: str = "test", **options: Any) -> Benchmark:
    pools = [task.name if split == "train" else pool_name(task.name, split) for task in TASKS]
    tasks = tuple(Task(task.name, pool, (1, 5), "hit@5") for task, pool in zip(TASKS, pools))
    return Benchmark("mini_mbeir", "mini_mbeir", str(root), split, tasks, (), (), options)


def test_another_seed_gives_other_data_but_never_another_split(root: Path, tmp_path: Path) -> None:
    mini_mbeir.generate(tmp_path / "other", SCALE, seed=1)
    assert queries(tmp_path / "other", "scenes_task0") != queries(root, "scenes_task0")
    assert_no_leak(train=tmp_path / "other", evaluation=root)


def test_the_layout_is_that_of_m_beir(root: Path) -> None:
    expected = {"instructions/query_instructions.tsv", "query/union_train/mbeir_union_up_train.jsonl",
                "query/union_val/mbeir_union_val.jsonl", mini_mbeir.MARKER}
    expected |= {f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl" for split in spaces.SPLITS}
    for task, split in itertools.product((task.name for task in TASKS), ("val", "test")):
        expected |= {f"query/{split}/mbeir_{task}_{split}.jsonl",
                     f"qrels/{split}/mbeir_{task}_{split}_qrels.txt",
                     f"cand_pool/local/mbeir_{pool_name(task, split)}_cand_pool.jsonl"}
    for dataset in {task.dataset for task in TASKS}:
        expected |= {f"query/train/mbeir_{dataset}_train.jsonl",
                     f"qrels/train/mbeir_{dataset}_train_qrels.txt"}
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert {path for path in found if not path.startswith("mbeir_images/")} == expected
    shown = {row[key] for path in root.rglob("*.jsonl") for row in rows(path)
             for key in ("img_path", "query_img_path") if row.get(key)}
    assert {path for path in found if path.startswith("mbeir_images/")} == shown


def test_every_kind_of_task_has_enough_queries_and_candidates(root: Path) -> None:
    assert {task.task_id for task in TASKS} == set(KINDS)
    for task, split in itertools.product(TASKS, ("test", "val")):
        asked, pool = queries(root, task.name, split), local_pool(root, task.name, split)
        assert len(asked) >= 5 and len(pool) >= 20
        assert {row["query_modality"] for row in asked} == {KINDS[task.task_id][0]}
        assert {row["modality"] for row in pool} == {KINDS[task.task_id][1]}


def test_rows_have_the_published_fields(root: Path) -> None:
    for path in root.glob("query/*/*.jsonl"):
        for row in rows(path):
            assert list(row) == ["qid", "query_txt", "query_img_path", "query_modality", "query_src_content",
                                 "pos_cand_list", "neg_cand_list", "task_id"]
            assert (row["query_txt"] is None) == ("text" not in row["query_modality"])
            assert (row["query_img_path"] is None) == ("image" not in row["query_modality"])
            assert row["pos_cand_list"] and not set(row["pos_cand_list"]) & set(row["neg_cand_list"])
            assert isinstance(json.loads(row["query_src_content"]), dict)
    without_image, without_content = Counter[str](), Counter[str]()
    for path in root.glob("cand_pool/*/*.jsonl"):
        for row in rows(path):
            assert set(row) <= {"did", "txt", "img_path", "modality", "src_content"}
            assert (row["txt"] is None) == ("text" not in row["modality"])
            assert (row.get("img_path") is None) == ("image" not in row["modality"])
            without_image[row["did"].split(":")[0]] += "img_path" not in row
            without_content[row["did"].split(":")[0]] += "src_content" not in row
    assert {key for key, number in without_image.items() if number} == {"2"}
    assert {key for key, number in without_content.items() if number} == {"1"}


def test_qrels_repeat_the_positives_and_ids_are_unique(root: Path) -> None:
    for split in ("train", "val", "test"):
        for path in (root / "query" / split).glob("*.jsonl"):
            asked = rows(path)
            lines = (root / "qrels" / split / f"{path.stem}_qrels.txt").read_text().splitlines()
            assert lines == [f"{row['qid']} 0 {each} 1 {row['task_id']}"
                             for row in asked for each in row["pos_cand_list"]]
        ids = [row["qid"] for path in (root / "query" / split).glob("*.jsonl") for row in rows(path)]
        assert len(ids) == len(set(ids))
    for split in ("train", "test", "val"):
        pool = rows(root / "cand_pool" / "global" / f"mbeir_union_{split}_cand_pool.jsonl")
        assert len(pool) == len({row["did"] for row in pool})


def test_the_union_is_the_local_pools_one_after_the_other(root: Path) -> None:
    union = rows(root / "cand_pool" / "global" / "mbeir_union_test_cand_pool.jsonl")
    assert union == [row for task in TASKS for row in local_pool(root, task.name)]


def content(root: Path, row: Row) -> tuple[str | None, bytes | None]:
    image = row.get("img_path") or row.get("query_img_path")
    return row.get("txt", row.get("query_txt")), (root / image).read_bytes() if image else None


def assert_no_leak(train: Path, evaluation: Path) -> None:
    """No candidate and no picture of val or test is in train."""
    seen = [content(train, row) for row in rows(train / "cand_pool/global/mbeir_union_train_cand_pool.jsonl")]
    asked = [content(train, row) for path in (train / "query/train").glob("*.jsonl") for row in rows(path)]
    candidates, pictures = set(seen), {image for _, image in seen + asked if image}
    for split in ("val", "test"):
        for row in rows(evaluation / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl"):
            found = content(evaluation, row)
            assert found not in candidates and found[1] not in pictures, row
        for path in (evaluation / "query" / split).glob("*.jsonl"):
            assert not pictures & {content(evaluation, row)[1] for row in rows(path)}


def test_train_has_no_candidate_and_no_picture_of_val_and_test(root: Path) -> None:
    assert_no_leak(train=root, evaluation=root)


def test_val_and_test_ask_about_different_things(root: Path) -> None:
    for task in TASKS:
        val, test = ({(row["query_txt"], row["query_img_path"]) for row in queries(root, task.name, split)}
                     for split in ("val", "test"))
        assert not val & test


def test_digits_of_the_three_splits_and_of_queries_come_from_different_scans() -> None:
    groups = [np.concatenate(group) for hands in mini_mbeir._hands().values() for group in hands]
    scans = [{scan.tobytes() for scan in group} for group in groups]
    assert sum(map(len, groups)) == 1797 and len(scans) == 6
    assert not any(a & b for a, b in itertools.combinations(scans, 2))


def test_some_queries_have_several_positives_and_one_dataset_lists_another_ones(root: Path) -> None:
    several = {task.name for task in TASKS
               if any(len(row["pos_cand_list"]) > 1 for row in queries(root, task.name))}
    assert several >= {"streets_task0", "streets_task3", "facts_task1", "digits_task4", "quiz_task8"}
    local = {row["did"] for row in local_pool(root, "quiz_task8")}
    outside = {each for row in queries(root, "quiz_task8") for each in row["pos_cand_list"]} - local
    assert outside and outside <= {row["did"] for row in local_pool(root, "museum_task8")}


def test_pools_hold_distractors_that_differ_in_one_attribute(root: Path) -> None:
    for task in ("scenes_task0", "scenes_task3", "facts_task1", "edits_task7", "quiz_task6", "museum_task8"):
        pool = {row["did"]: sorted(json.loads(row["src_content"]).items()) for row in local_pool(root, task)}
        hard = 0
        for row in queries(root, task):
            positive = pool[row["pos_cand_list"][0]]
            wrong = [words for did, words in pool.items() if did not in row["pos_cand_list"]]
            hard += any(sum(a != b for a, b in zip(positive, words)) == 1 for words in wrong)
        assert hard >= len(queries(root, task)) / 2, task


def test_on_the_union_only_the_instruction_tells_what_is_sought(root: Path) -> None:
    """Scenes that are asked for by caption are in the union as picture, as caption and as noted photo."""
    def scenes(task: str) -> set[tuple[str, ...]]:
        found = (json.loads(row["src_content"]) for row in local_pool(root, task))
        return {tuple(words[key] for key in ("first", "relation", "second", "background")) for words in found}

    assert scenes("scenes_task0") == scenes("scenes_task3")
    assert len(scenes("scenes_task0") & scenes("headlines_task2")) >= 20
    assert not scenes("scenes_task0") & scenes("edits_task7")


def test_texts_and_prompts_are_formatted_already(root: Path) -> None:
    texts = {row.get("txt") or row.get("query_txt") for path in root.rglob("*.jsonl") for row in rows(path)}
    texts |= {prompt for task in TASKS for prompt in task.prompts}
    assert len(texts) > 1000
    for text in texts - {None}:
        assert mbeir.format_string(text) == text and text.isascii() and len(text.split()) <= 40


def test_there_are_four_prompts_for_every_row_of_the_instructions(root: Path) -> None:
    header, *lines = (root / "instructions" / "query_instructions.tsv").read_text().splitlines()
    assert header.split("\t")[:4] == ["query_modality", "cand_modality", "dataset_name", "dataset_id"]
    keys = [tuple(line.split("\t")[:4]) for line in lines]
    expected = [(*KINDS[task.task_id], task.dataset, str(task.dataset_id)) for task in TASKS]
    assert sorted(keys) == sorted(expected)
    assert all(len(set(line.split("\t")[4:])) == 4 for line in lines)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_adapter_reads_what_was_written(root: Path, split: str) -> None:
    here = benchmark(root, split, scale=SCALE, seed=0)
    mini_mbeir.prepare(here)
    for task in here.tasks:
        asked = list(mini_mbeir.queries(here, task))
        pool = list(mini_mbeir.candidates(here, task.pool))
        judged = list(mini_mbeir.qrels(here, task))
        assert asked and {query.query_id for query in asked} == {qrel.query_id for qrel in judged}
        assert all(len(query.instructions) == 4 for query in asked)
        assert {candidate.modality for candidate in pool} == {mini_mbeir.candidate_modality(here, task)}
        inside = {candidate.candidate_id for candidate in pool}
        assert all(any(qrel.candidate_id in inside for qrel in group) for _, group in itertools.groupby(
            judged, key=lambda qrel: qrel.query_id))


def test_union_train_repeats_small_datasets_and_is_shuffled(root: Path) -> None:
    union = rows(root / "query" / "union_train" / "mbeir_union_up_train.jsonl")
    parts = {path.stem: rows(path) for path in (root / "query" / "train").glob("*.jsonl")}
    assert {json.dumps(row) for row in union} == {json.dumps(row) for part in parts.values() for row in part}
    numbers = Counter(row["qid"].split(":")[0] for row in union)
    assert min(numbers.values()) * 2 > max(numbers.values())
    assert len({row["qid"].split(":")[0] for row in union[:100]}) == len(numbers)


def test_the_configuration_lists_the_tasks() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    assert set(config["tasks"]) == {task.name for task in TASKS}
    assert {name for name, task in config["tasks"].items() if task.get("pool") == f"{name}_{{split}}"} == {
        task.name for task in TASKS if task.has_split_pools}
    assert {task["headline"] for task in config["tasks"].values()} == {"hit@5"}
