"""Mini M-BEIR: a small benchmark of drawn scenes and handwritten digits in M-BEIR's own on-disk layout.

It covers all eight task kinds of M-BEIR and is read by the same adapter as the real one; this module only
writes it where it is missing. The same seed and scale give the same bytes on every machine. A directory
under its final name is whole: everything is written to a hidden sibling and renamed. Single files are not
synced to the disk (there are tens of thousands, and they can be made again), so after a power cut delete
the directory.

Train, val and test share no scene, fact, street, entry or number, whatever the seed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.benchmarks import Benchmark, mbeir
from pipeline.benchmarks.mini_mbeir_world.spaces import SPLITS
from pipeline.benchmarks.mini_mbeir_world.terms import World
from pipeline.benchmarks.mini_mbeir_world.writing import TaskCounts, write_tree
from pipeline.support.errors import UserError

VERSION = 1
MARKER = "mini_mbeir.json"
format_string = mbeir.format_string

# Small worlds (numbers, statements, entries, streets) end before this scale, that of scenes soon after it.
MAX_SCALE = 100.0

task_sources = mbeir.task_sources
pool_sources = mbeir.pool_sources
queries = mbeir.queries
candidates = mbeir.candidates
qrels = mbeir.qrels
candidate_modality = mbeir.candidate_modality
candidate_lists = mbeir.candidate_lists
rewrite_negatives = mbeir.rewrite_negatives
train_repeats = mbeir.train_repeats
train_sources = mbeir.train_sources


@dataclass(frozen=True)
class Summary:
    """What a generated directory holds; `tasks` counts the test split."""

    directory: Path
    scale: float
    seed: int
    images: int
    train_queries: int
    tasks: tuple[TaskCounts, ...]


def prepare(benchmark: Benchmark) -> None:
    """Generate the benchmark into its root if it is missing (options: scale, seed)."""
    scale, seed = benchmark.options.get("scale", 1.0), benchmark.options.get("seed", 0)
    generate(Path(benchmark.root), scale, seed)
    mbeir.prepare(benchmark)


def generate(directory: Path, scale: float = 1.0, seed: int = 0) -> Summary:
    """Write mini M-BEIR, or leave it alone if it is there already. UserError if something else is there."""
    _check_options(scale, seed)
    if directory.is_symlink() or directory.exists():
        if not directory.is_dir() or any(directory.iterdir()):
            return _existing(directory, float(scale), seed)
    partial = directory.parent / f".{directory.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    _make_folder(partial)
    try:
        counts, images, train_queries = write_tree(partial, float(scale), World(seed, _hands()))
        summary = Summary(directory, float(scale), seed, images, train_queries, counts)
        _write_marker(partial / MARKER, summary)
        return _publish(partial, summary)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, summary: Summary) -> Summary:
    try:
        partial.rename(summary.directory)
    except OSError:
        if not summary.directory.exists():
            raise
        # Another process was quicker: its directory holds the same bytes or is something else.
        return _existing(summary.directory, summary.scale, summary.seed)
    return summary


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"mini M-BEIR cannot be written: {error.strerror}", str(path.parent),
                        "choose another benchmark.root") from None


def _check_options(scale: Any, seed: Any) -> None:
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not is_number or not 0 < scale <= MAX_SCALE:
        raise UserError(f"scale is {scale!r}", "benchmark.options.scale",
                        f"a number above 0, at most {MAX_SCALE:g}")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed!r}", "benchmark.options.seed",
                        "a whole number from 0 to 4294967295")


def _write_marker(path: Path, summary: Summary) -> None:
    record = {"version": VERSION, **asdict(summary)}
    del record["directory"]
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="ascii", newline="\n")


def _existing(directory: Path, scale: float, seed: int) -> Summary:
    """The summary of a directory that was written with the same options; UserError for any other one."""
    marker = directory / MARKER
    try:
        record = json.loads(marker.read_text(encoding="ascii"))
        tasks = tuple(TaskCounts(**counts) for counts in record["tasks"])
        found = (record["version"], record["scale"], record["seed"])
        summary = Summary(directory, scale, seed, record["images"], record["train_queries"], tasks)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{directory} exists and is not mini M-BEIR", str(marker),
                        "choose another benchmark.root, or remove it yourself") from None
    if found != (VERSION, scale, seed):
        raise UserError(
            f"{directory} holds mini M-BEIR of version {found[0]}, scale {found[1]}, seed {found[2]}; "
            f"asked for version {VERSION}, scale {scale}, seed {seed}",
            str(marker), "remove the directory to make it anew, or choose another benchmark.root")
    return summary


def _hands() -> dict[str, tuple[list[Any], list[Any]]]:
    """scikit-learn's 1797 scanned digits [8, 8], ink 0-16, by split and by group of writers.

    The scans are ordered by writer (13 people), so cutting the sequence separates all people but those at a
    cut.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    scans_NGG, labels_N = digits.images.astype(np.int64), digits.target
    cuts = (0, 450, 900, 1080, 1260, 1530, 1797)
    parts = [[scans_NGG[start:end][labels_N[start:end] == digit] for digit in range(10)]
             for start, end in zip(cuts, cuts[1:])]
    return {split: (parts[2 * place], parts[2 * place + 1]) for place, split in enumerate(SPLITS)}
