"""A benchmark in M-BEIR's layout that is small enough to be written, and spoiled, by hand in every test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

TASK, POOL = "toys_task0", "toys_task0"
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 30), "blue": (20, 30, 220), "grey": (128, 128, 128)}


class SmallMbeir:
    """Four coloured pictures and four queries that ask for them by name."""

    def __init__(self, root: Path):
        self.root = root / "data"
        root.mkdir(parents=True, exist_ok=True)
        self.queries = [
            {"qid": f"7:{number}", "query_txt": f"A {colour} toy.", "query_img_path": None, "query_modality": "text",
             "query_src_content": None, "pos_cand_list": [f"7:{number}"], "neg_cand_list": [], "task_id": 0}
            for number, colour in enumerate(COLOURS, 1)]
        self.candidates: list[dict[str, Any]] = [
            {"did": f"7:{number}", "txt": None, "img_path": f"mbeir_images/{colour}.png", "modality": "image",
             "src_content": None}
            for number, colour in enumerate(COLOURS, 1)]
        self.qrels = [f"7:{number} 0 7:{number} 1 0" for number in range(1, 5)]
        self.instructions = ["query_modality\tcand_modality\tdataset\tdataset_id\tprompt_1\tprompt_2",
                             "text\timage\tToys\t7\tFind the picture.\tWhich picture is meant?"]
        for colour, value in COLOURS.items():
            self.image(colour).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), value).save(self.image(colour))
        self.benchmark = root / "small.yaml"
        self.experiment = root / "experiment.yaml"
        self.benchmark.write_text(f"adapter: mbeir\nroot: {self.root}\nsplit: test\n"
                                  f"tasks:\n  {TASK}: {{headline: hit@1, cutoffs: [1, 2]}}\n")
        self.experiment.write_text(
            f"benchmark: {self.benchmark}\nencoders: [tests.toy_encoder]\nwork_dir: {root / 'work'}\n"
            "embed: {loaders: 0}\nscore: {resamples: 20}\nretrieve: {depth: 4}\n")

    def image(self, colour: str) -> Path:
        return self.root / "mbeir_images" / f"{colour}.png"

    def path(self, kind: str) -> Path:
        return self.root / {
            "queries": f"query/test/mbeir_{TASK}_test.jsonl",
            "candidates": f"cand_pool/local/mbeir_{POOL}_cand_pool.jsonl",
            "qrels": f"qrels/test/mbeir_{TASK}_test_qrels.txt",
            "instructions": "instructions/query_instructions.tsv"}[kind]

    def write(self) -> SmallMbeir:
        for kind in ("queries", "candidates", "qrels", "instructions"):
            rows = [row if isinstance(row, str) else json.dumps(row) for row in getattr(self, kind)]
            self.path(kind).parent.mkdir(parents=True, exist_ok=True)
            self.path(kind).write_text("".join(f"{row}\n" for row in rows))
        return self
