"""What must run and why: speed settings re-run nothing, meaning re-runs exactly what depends on it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.config import Experiment, load
from pipeline.plan import Plan, make_plan
from pipeline.reasons import why
from pipeline.stages import STAGES
from pipeline.workers import Share, run_stage
from tests.small_mbeir import SmallMbeir

Replan = Callable[..., Plan]


@pytest.fixture
def replan(quick_run: Experiment, small_arguments: list[str]) -> Replan:
    """The plan of the finished quick run under more overrides."""
    return lambda *more: make_plan(load("quickstart", [f"work_dir={quick_run.work_dir}", *small_arguments, *more]))


def to_do(plan: Plan) -> dict[str, int]:
    return {stage: sum(not job.artifact.is_complete() for job in plan.jobs[stage]) for stage in STAGES}


def names_to_do(plan: Plan, stage: str) -> set[str]:
    return {job.artifact.name for job in plan.jobs[stage] if not job.artifact.is_complete()}


@pytest.mark.parametrize("override", [
    "embed.batch_size=3", "embed.batch_size=auto", "embed.share=none", "embed.compile=true", "embed.loaders=2",
    "embed.device=cuda", "local.workers=5", "retrieve.queries_per_pass=1", "retrieve.memory_gb=0.5",
    "index.seed=3", "index.train_rows=5", "retrieve.recall_queries=7", "retrieve.faiss_parameters=nprobe=9",
    "retrieve.coarse=float32", "retrieve.kernel=torch", "collect.check_images=false", "export.depth=7", "log.wandb=x"])
def test_what_changes_only_speed_runs_nothing(replan: Replan, override: str) -> None:
    assert not any(to_do(replan(override)).values())


@pytest.mark.parametrize("override, reason", [
    ("embed.precision=bf16", "precision: fp32 -> bf16 (command line)"),
    ("embed.decoding=draft", "decoding: exact -> draft (command line)")])
def test_other_vectors_run_all_that_comes_from_them_and_say_why(replan: Replan, override: str, reason: str) -> None:
    plan = replan(override)
    assert to_do(plan) == {"collect": 0, "embed": 24, "index": 12, "retrieve": 24, "score": 24}
    reasons = why(plan)
    of_embed = {reason for label, reason in reasons.items() if label.startswith("embed/")}
    assert of_embed == {reason}
    assert all("input changed" in reason for label, reason in reasons.items() if not label.startswith("embed/"))


def test_instruction_rule_runs_queries_and_leaves_pools_alone(replan: Replan) -> None:
    plan = replan("embed.instruction=none")
    assert to_do(plan) == {"collect": 0, "embed": 12, "index": 0, "retrieve": 24, "score": 24}
    assert not any(".pool." in name for name in names_to_do(plan, "embed"))


def test_depth_runs_retrieve_and_score_metrics_run_audits_and_score(replan: Replan) -> None:
    assert to_do(replan("retrieve.depth=50")) == {"collect": 24, "embed": 0, "index": 0, "retrieve": 24, "score": 24}
    assert to_do(replan("score.resamples=51")) == {"collect": 0, "embed": 0, "index": 0, "retrieve": 0, "score": 24}


def test_a_faiss_file_for_others_runs_index_alone(replan: Replan) -> None:
    assert to_do(replan("index.write_faiss=true")) == {"collect": 0, "embed": 0, "index": 12, "retrieve": 0, "score": 0}


def test_other_weights_are_a_reason(replan: Replan) -> None:
    plan = replan("encoders.quickstart_clip.weights=null", "encoders.quickstart_clip.seed=1")
    assert to_do(plan)["embed"] == 24
    assert any("encoder.seed: unset -> 1" in reason for reason in why(plan).values())


def test_a_second_encoder_shares_the_tables(replan: Replan) -> None:
    plan = replan("encoders=[quickstart_clip, tests.toy_encoder]")
    assert to_do(plan) == {"collect": 0, "embed": 24, "index": 12, "retrieve": 24, "score": 24}


def test_the_order_in_which_pools_are_listed_does_not_matter(replan: Replan) -> None:
    unions = [f"unions={{two: [{names}]}}" for names in ("digits_task3, digits_task4", "digits_task4, digits_task3")]
    labels = [{scored.job.artifact.label for scored in replan(union, "pools=[two]").scored} for union in unions]
    assert labels[0] == labels[1] and labels[0]


def test_a_touched_file_is_collected_again_and_nothing_else_runs(tmp_path: Path) -> None:
    small = SmallMbeir(tmp_path).write()
    for stage in STAGES:
        run_stage(load(str(small.experiment)), stage)
    os.utime(small.path("candidates"))
    made = [run_stage(load(str(small.experiment)), stage).made for stage in STAGES]
    assert made == [1, 0, 0, 0, 0]


def test_changed_content_runs_what_depends_on_it(tmp_path: Path) -> None:
    small = SmallMbeir(tmp_path).write()
    for stage in STAGES:
        run_stage(load(str(small.experiment)), stage)
    small.qrels[0] = "7:1 0 7:2 1 0"
    small.write()
    os.utime(small.path("qrels"))
    made = [run_stage(load(str(small.experiment)), stage).made for stage in STAGES]
    assert made[1:4] == [0, 0, 0] and made[4] == 2


def test_plan_and_status_as_json(
        quick_run: Experiment, small_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quickstart", f"work_dir={quick_run.work_dir}", *small_arguments, "--json"]
    assert main(["status", *arguments]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["stage"] for stage in stages] == list(STAGES) and all(stage["state"] == "done" for stage in stages)
    assert main(["plan", *arguments, "embed.precision=bf16"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["score", *arguments]) == 0
    assert len(json.loads(capsys.readouterr().out)["scores"]) == 24


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/2", "1/0"])
def test_broken_shares(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "quickstart", f"--worker={text}"]) == 2
    assert "is not a share of the work" in capsys.readouterr().err
    with pytest.raises(Exception, match="not a share"):
        Share.parse(text)
