"""How fast collect reads an M-BEIR pool, and in how much memory, beside reading it as UniIR does, in one run.

    python -m tests.speed.bench_collect --rows 1000000

UniIR parses the whole pool into a list of dictionaries, in every process that needs it. Both run as processes of
their own, alternating; the peak is that of the process, as the operating system tells it. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
_UNIIR = """
import json, sys
pool = {}
with open(sys.argv[1]) as file:
    for line in file:
        entry = json.loads(line.strip())
        pool[entry["did"]] = entry
"""


def write_benchmark(root: Path, rows: int) -> Path:
    """One task whose pool has so many rows, three texts in four and one captioned image that is not looked for."""
    for folder in ("query/test", "cand_pool/local", "qrels/test", "instructions"):
        (root / folder).mkdir(parents=True)
    words = "a rather ordinary sentence of an encyclopedia about something that happened somewhere " * 3
    with open(root / "cand_pool/local/mbeir_news_task2_cand_pool.jsonl", "w") as file:
        for number in range(1, rows + 1):
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
    return benchmark


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in GB of one process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(process.stderr.read().decode() if process.stderr else "failed")
    return time.perf_counter() - started, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        benchmark = write_benchmark(Path(folder) / "data", options.rows)
        pool = f"{folder}/data/cand_pool/local/mbeir_news_task2_cand_pool.jsonl"
        ours, theirs = [], []
        for number in range(options.repetitions):
            ours.append(measure([sys.executable, "-m", "pipeline", "collect", "quickstart", f"benchmark={benchmark}",
                                 "pools=[local]", f"work_dir={folder}/{number}", "collect.check_images=false"]))
            theirs.append(measure([sys.executable, "-c", _UNIIR, pool]))
    seconds, baseline = (median(run[0] for run in runs) for runs in (ours, theirs))
    print(json.dumps({
        "name": "collect", "work": f"{options.rows} candidates",
        "ours": round(options.rows / seconds), "baseline": round(options.rows / baseline),
        "baseline_name": "json.loads of every line into a dictionary (UniIR)", "unit": "rows/s",
        "ratio": round(baseline / seconds, 2),
        "peak_gb": round(max(run[1] for run in ours), 2), "baseline_peak_gb": round(max(run[1] for run in theirs), 2),
        "seconds": [round(run[0], 1) for run in ours]}))


if __name__ == "__main__":
    main()
