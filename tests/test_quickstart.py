"""The shipped encoder on the whole quick start: it has learned something, and exactly what the golden file says."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import file_sha256
from pipeline.cli import main
from pipeline.config import Experiment, load
from pipeline.pieces import CONFIGS
from pipeline.plan import Scored, make_plan
from pipeline.significance import bootstrap_interval
from pipeline.stages.score import tables_of

pytestmark = pytest.mark.timeout(900)  # all of mini M-BEIR is encoded, twice on the side of the queries


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def quickstart(work: Path) -> Experiment:
    assert main(["run", "quickstart", f"work_dir={work}"]) == 0
    return load("quickstart", [f"work_dir={work}"])


def on_union(experiment: Experiment) -> dict[str, Scored]:
    return {scored.task.name: scored for scored in make_plan(experiment).scored if scored.pool == "union"}


def hits(scored: Scored) -> Any:
    return pq.read_table(scored.job.artifact.path("per_query.parquet"))["hit@5"].to_numpy()


def chance(scored: Scored) -> float:
    """hit@5 of a random order of the union, exactly: hypergeometric, averaged over the queries."""
    pools = pa.concat_tables([tables_of(pool, ["candidate_id"]) for pool in scored.job.pools])
    inside = set(pools["candidate_id"].to_pylist())
    positives: dict[str, int] = dict.fromkeys(tables_of(scored.job.task, ["query_id"])["query_id"].to_pylist(), 0)
    qrels = pq.read_table(scored.job.task.path("qrels.parquet")).to_pylist()
    for row in qrels:
        positives[row["query_id"]] += row["relevance"] > 0 and row["candidate_id"] in inside
    return float(np.mean([1 - comb(len(inside) - count, 5) / comb(len(inside), 5) for count in positives.values()]))


def test_every_task_is_far_above_chance_and_the_average_above_a_half(quickstart: Experiment) -> None:
    found = {name: (float(hits(scored).mean()), chance(scored)) for name, scored in on_union(quickstart).items()}
    assert len(found) == 12 and all(value >= 10 * by_chance for value, by_chance in found.values()), found
    assert np.mean([value for value, _ in found.values()]) >= 0.5


def test_instructions_help_by_more_than_the_interval(quickstart: Experiment, work: Path) -> None:
    """Averages over tasks, the same queries with and without: the whole interval of the difference is above 0."""
    told = hits_by_task(quickstart)
    arguments = [f"work_dir={work}", "embed.instruction=none", "name=without", "pools=[union]"]
    assert main(["run", "quickstart", *arguments]) == 0
    silent = hits_by_task(load("quickstart", arguments))
    differences_QT = np.stack([told[task] - silent[task] for task in told], axis=1)  # 170 queries in each task
    low_1, _ = bootstrap_interval(differences_QT.mean(axis=1, keepdims=True), 0.95, 1000, 0)
    assert differences_QT.mean() > 0.1 and low_1[0] > 0.1


def hits_by_task(experiment: Experiment) -> dict[str, Any]:
    return {name: hits(scored) for name, scored in on_union(experiment).items()}


def test_the_golden_scores_are_found(quickstart: Experiment, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["verify", "quickstart", f"work_dir={work}"])
    assert code == 0, capsys.readouterr().out
    assert "24 of 24 agree" in capsys.readouterr().out


def test_other_scores_are_told(quickstart: Experiment, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same encoder without instructions: other numbers, and a verdict that says so."""
    arguments = [f"work_dir={work}", "embed.instruction=none"]
    assert main(["run", "quickstart", *arguments]) == 0
    capsys.readouterr()
    assert main(["verify", "quickstart", *arguments]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_the_golden_file_names_the_shipped_weights_and_their_log_is_whole() -> None:
    folder = CONFIGS / "encoders" / "tiny_clip_sf"
    assert file_sha256(folder / "weights.safetensors") in (CONFIGS / "golden" / "quickstart.yaml").read_text()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, len(losses) + 1))
    assert np.mean(losses[-20:]) < 0.3 * np.mean(losses[:20])
    assert (folder / "weights.safetensors").stat().st_size < 8 * 2**20
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
