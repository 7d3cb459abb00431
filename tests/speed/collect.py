"""Reading an M-BEIR pool into tables, beside reading it as UniIR does: rows per second and peak memory.

UniIR parses the whole pool into a dictionary of dictionaries, in every process that needs it. Ours writes checked
tables in shards, with digests and an audit. Both are processes of their own, start-up included. `equal` compares ids,
texts and modalities in their order.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Optional

import pyarrow.parquet as pq

from tests.speed.comparison import Process, Row, alone, at_least_one, disk_flaw, peak_of, processes_by_turns, seconds_of

_UNIIR = """
import json, sys
pool = {}
with open(sys.argv[1]) as file:
    for line in file:
        entry = json.loads(line.strip())
        pool[entry["did"]] = entry
"""


@dataclass(frozen=True)
class Options:
    rows: int = 1_000_000
    repetitions: int = 5
    directory: Optional[str] = None  # where the pool and its tables are written: about 1 kB per row

    def __post_init__(self) -> None:
        at_least_one(self, "rows", "repetitions")


def rows(options: Options) -> Iterator[Row]:
    work, title = f"{options.rows:,} candidates, JSONL to tables", "json.loads of every line into a dictionary (UniIR)"
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        root = Path(folder)
        if flaw := disk_flaw(root, options.rows * 1e-6):
            yield Row.skipped("collect", work, "rows/s", title, flaw)
            return
        benchmark, pool = write_benchmark(root / "data", options.rows)
        numbers = count()

        def ours() -> Process:
            return alone("-m", "pipeline", "collect", "quickstart", f"benchmark={benchmark}", "pools=[local]",
                         f"work_dir={root}/{next(numbers)}", "collect.check_images=false")

        turns = processes_by_turns({"ours": ours, "uniir": lambda: alone("-c", _UNIIR, pool)}, options.repetitions)
        equal = digest(collected(root / "0")) == digest(parsed(pool))
        yield Row.of("collect", work, options.rows, "rows/s", seconds_of(turns["ours"]), seconds_of(turns["uniir"]),
                     title, equal, peak_gb=peak_of(turns["ours"]), baseline_peak_gb=peak_of(turns["uniir"]))


def write_benchmark(root: Path, num_rows: int) -> tuple[Path, Path]:
    """One task whose pool has so many rows, captioned images that are not looked for; its YAML and its pool."""
    for folder in ("query/test", "cand_pool/local", "qrels/test", "instructions"):
        (root / folder).mkdir(parents=True)
    words = "A rather ordinary sentence of an encyclopedia about something that once happened. " * 3
    pool = root / "cand_pool/local/mbeir_news_task2_cand_pool.jsonl"
    with pool.open("w") as file:
        for number in range(1, num_rows + 1):
            file.write(json.dumps({"did": f"3:{number}", "txt": f"{words}{number}.",
                                   "img_path": f"mbeir_images/{number % 977}/{number}.jpg",
                                   "modality": "image,text", "src_content": None}) + "\n")
    (root / "query/test/mbeir_news_task2_test.jsonl").write_text(json.dumps(
        {"qid": "3:1", "query_txt": "Something.", "query_img_path": None, "query_modality": "text",
         "pos_cand_list": ["3:1"], "neg_cand_list": [], "task_id": 2}) + "\n")
    (root / "qrels/test/mbeir_news_task2_test_qrels.txt").write_text("3:1 0 3:1 1 2\n")
    (root / "instructions/query_instructions.tsv").write_text("q\tc\tn\ti\tp\ntext\timage,text\tNews\t3\tFind it.\n")
    benchmark = root / "bench.yaml"
    benchmark.write_text(f"adapter: mbeir\nroot: {root}\nsplit: test\ntasks: {{news_task2: {{headline: hit@5}}}}\n")
    return benchmark, pool


def digest(triples: Iterable[tuple[str, str, str]]) -> str:
    """Of (id, text, modality) of every candidate."""
    found = sha256()
    for triple in triples:
        found.update("\0".join(triple).encode())
    return found.hexdigest()


def collected(work: Path) -> Iterator[tuple[str, str, str]]:
    """From the tables, shard by shard."""
    for path in sorted(work.glob("artifacts/collect/*pool*/candidates-*.parquet")):
        table = pq.read_table(path, columns=["candidate_id", "text", "modality"])
        yield from zip(*(table[name].to_pylist() for name in ("candidate_id", "text", "modality")))


def parsed(pool: Path) -> Iterator[tuple[str, str, str]]:
    with pool.open() as file:
        for line in file:
            entry = json.loads(line)
            yield entry["did"], entry["txt"], entry["modality"]
