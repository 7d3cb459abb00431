"""What a training reads of M-BEIR beside queries, candidates and qrels: the upsampled order, and where lists stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pipeline.benchmarks import Benchmark
from pipeline.support.errors import UserError
from pipeline.support.rows import json_rows


def train_repeats(benchmark: Benchmark) -> Mapping[str, int]:
    """How often each query stands in an epoch: as often as in M-BEIR's own upsampled file of all train queries."""
    path = _union_path(benchmark)
    if not path.is_file():
        raise UserError("M-BEIR's upsampled train file is not there", str(path),
                        "set training.repeats=once; training.rows={webqa: 100000} repeats a data set")
    return Counter(row.identifier("qid") for row in json_rows(path))


def train_sources(benchmark: Benchmark) -> list[Path]:
    """Files that decide repeats and hard negatives."""
    folders = [Path(benchmark.root, "query", "train")]
    if benchmark.options.get("negatives"):
        folders.append(Path(str(benchmark.options["negatives"])))
    union = _union_path(benchmark)
    return [*([union] if union.is_file() else []),
            *(path for folder in folders for path in sorted(folder.glob("mbeir_*_train.jsonl")))]


def _union_path(benchmark: Benchmark) -> Path:
    return Path(benchmark.root, "query", "union_train", "mbeir_union_up_train.jsonl")
