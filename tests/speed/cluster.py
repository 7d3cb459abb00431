"""What Slurm brings and costs: an array on a real cluster of this machine, beside one element, and beside no cluster.

The tables are collected beforehand; each turn embeds anew. Elements load Python, torch and weights each for itself, and
share the cores of this machine: two can gain only what one leaves idle, and the scheduler's seconds come on top.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from pipeline.slurm import elements_of
from pipeline.submission import SCRIPT
from pipeline.support.errors import UserError
from tests.slurm.virtual_cluster import VirtualCluster, why_not
from tests.speed.comparison import ROOT, Row, at_least_one, by_turns


@dataclass(frozen=True)
class Options:
    scale: float = 1.0  # of mini M-BEIR
    encoder: str = "quickstart_clip"
    repetitions: int = 3

    def __post_init__(self) -> None:
        at_least_one(self, "repetitions")


def rows(options: Options) -> Iterator[Row]:
    if reason := why_not():
        raise UserError(f"no Slurm cluster can be started here: {reason}")
    with tempfile.TemporaryDirectory() as folder, VirtualCluster(Path(folder) / "cluster") as slurm:
        lab = _Lab(Path(folder), options, slurm)
        lab.here("collect")
        for work, ours, name, theirs in (
                ("embed, 2 elements of an array", partial(lab.element, 2), "1 element", partial(lab.element, 1)),
                ("embed, 1 element of an array", partial(lab.element, 1), "the stage without Slurm", lab.embed_here),
                ("the whole run through Slurm", lab.run_there, "the whole run without Slurm", lab.run_here)):
            turns = by_turns({"ours": ours, "baseline": theirs}, options.repetitions)
            yield Row.of("cluster", work, 1, "runs/s", turns["ours"], turns["baseline"], name, lab.bytes_agree())


class _Lab:
    """The quick start in a directory of its own, run here and on the cluster."""

    def __init__(self, folder: Path, options: Options, slurm: VirtualCluster):
        self.slurm, self.work, self.file = slurm, folder / "work", folder / "lab.yaml"
        self.arguments = ["quickstart", f"encoders=[{options.encoder}]", f"benchmark.root={folder / 'data'}",
                          f"work_dir={self.work}", f"benchmark.options.scale={options.scale}"]
        self.file.write_text(yaml.safe_dump({"cpus": 2, "memory": "2G", "time": "01:00:00", "stages": {
            "embed": {"cpus": 1, "workers": 2}}}))
        self.found: list[dict[str, bytes]] = []

    def here(self, *command: str) -> str:
        line = [sys.executable, "-m", "pipeline", command[0], *self.arguments, *command[1:]]
        return subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    def element(self, count: int) -> None:
        self._anew("embed", "index", "retrieve", "score")
        line = ["sbatch", "--parsable", f"--array=0-{count - 1}", f"--cpus-per-task={2 // count}", "--mem=2G",
                f"--output={self.work}/embed.%a.log", str(SCRIPT), "--python", sys.executable, "embed"]
        job = subprocess.run([*line, *self.arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        self._until_ended(job.strip())

    def embed_here(self) -> None:
        self._anew("embed", "index", "retrieve", "score")
        self.here("embed")
        self._look()

    def run_there(self) -> None:
        self._anew("embed", "index", "retrieve", "score")
        self._until_ended(re.findall(r"job (\d+)", self.here("run", f"cluster={self.file}", "--on", "slurm"))[-1])

    def _until_ended(self, job: str) -> None:
        """sbatch --wait would look only every half minute."""
        def has_ended() -> bool:
            return {element.state for element in elements_of([job])} == {"COMPLETED"}

        self.slurm.wait(has_ended, 1200)
        self._look()

    def run_here(self) -> None:
        self._anew("embed", "index", "retrieve", "score")
        self.here("run")
        self._look()

    def _anew(self, *stages: str) -> None:
        for stage in stages:
            shutil.rmtree(self.work / "artifacts" / stage, ignore_errors=True)

    def _look(self) -> None:
        shards = sorted((self.work / "artifacts" / "embed").rglob("*.parquet"))
        self.found.append({path.name + path.parent.name: path.read_bytes() for path in shards})

    def bytes_agree(self) -> bool:
        """Whether all turns since the last call wrote the same embeddings."""
        found, self.found = self.found, []
        return bool(found[0]) and all(each == found[0] for each in found)
