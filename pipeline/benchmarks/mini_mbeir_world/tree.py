"""The files of a mini M-BEIR in the making: where rows go, which ids they get, and each picture once."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from pipeline.benchmarks.mini_mbeir_world.tasks import MiniTask
from pipeline.benchmarks.mini_mbeir_world.terms import Shown, World

# A tiny encoder learns nothing new from more than this, and load tests search test pools.
MAX_TRAIN_SCALE = 4.0


class Tree:
    """Ids count from 1 by dataset: candidates in one series, queries anew in each split, as in M-BEIR."""

    def __init__(self, root: Path, scale: float, world: World) -> None:
        self.root, self.scale, self.world = root, scale, world
        self._pictures: set[str] = set()
        self._folders: set[Path] = set()
        self._last_id: dict[tuple[int, str], int] = {}

    @property
    def images(self) -> int:
        return len(self._pictures)

    def amount(self, sizes: dict[str, int], split: str, fewest: int) -> int:
        """How many rows a split gets at this scale."""
        scale = min(self.scale, MAX_TRAIN_SCALE) if split == "train" else self.scale
        return max(fewest, round(sizes[split] * scale))

    def next_id(self, task: MiniTask, series: str) -> str:
        number = self._last_id.get((task.dataset_id, series), 0) + 1
        self._last_id[task.dataset_id, series] = number
        return f"{task.dataset_id}:{number}"

    def path(self, *parts: str) -> Path:
        path = self.root.joinpath(*parts)
        if path.parent not in self._folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._folders.add(path.parent)
        return path

    def append(self, stack: ExitStack, *parts: str) -> TextIO:
        return stack.enter_context(self.path(*parts).open("a", encoding="ascii", newline="\n"))

    def keep_picture(self, shown: Shown) -> str | None:
        """The path of what is shown, drawn unless another row shows the same picture."""
        if shown.picture is None:
            return None
        if shown.picture.path not in self._pictures:
            self._pictures.add(shown.picture.path)
            self.path(shown.picture.path).write_bytes(shown.picture.png())
        return shown.picture.path


def modality(shown: Shown) -> str:
    return ",".join(["image"] * (shown.picture is not None) + ["text"] * (shown.text is not None))


def pool_file(task: MiniTask, split: str) -> tuple[str, str, str]:
    """Val and test share their pool, except where a task has one for each; train has one for all tasks."""
    if split == "train":
        return "cand_pool", "global", "mbeir_union_train_cand_pool.jsonl"
    suffix = f"_{split}" if task.has_split_pools else ""
    return "cand_pool", "local", f"mbeir_{task.name}{suffix}_cand_pool.jsonl"


def query_files(task: MiniTask, split: str) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    """Queries and qrels; those of train hold all tasks of a dataset."""
    stem = f"mbeir_{task.dataset if split == 'train' else task.name}_{split}"
    return ("query", split, f"{stem}.jsonl"), ("qrels", split, f"{stem}_qrels.txt")
