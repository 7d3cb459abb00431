"""verify: agreement is measured on numbers that stand in files, and nothing that differs is left out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import pieces
from pipeline.config import Experiment, load
from pipeline.plan import Plan, make_plan
from pipeline.report.rows import score_rows
from pipeline.report.verify import Cell, Golden, Verdict, compare, golden_path, read_golden, verify, write_golden
from pipeline.support.errors import NotReady, UserError

CONFIGS = pieces.CONFIGS  # before a test sets its own
KEY, OTHER = ("clip", "toys_task0", "local"), ("clip", "toys_task0", "union")
COUNTS = "{} of {} agree within {}; {} equal to 6 decimals"


@pytest.fixture(scope="module")
def plan(quick_run: Experiment) -> Plan:
    return make_plan(quick_run)


@pytest.fixture(autouse=True)
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Golden files of a test stand in its own folder."""
    monkeypatch.setattr(pieces, "CONFIGS", tmp_path)
    return tmp_path


def changed(plan: Plan, change: Callable[[dict[str, Any]], None]) -> Verdict:
    """The verdict after somebody edited the golden file."""
    path = golden_path(plan.experiment)
    write_golden(plan, path, 0.002)
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values))
    return verify(plan)


def differing(verdict: Verdict) -> list[list[str]]:
    """Lines of cells that are not OK."""
    cells = verdict.lines[1:verdict.lines.index("")]
    return [re.split(r" {2,}", line) for line in cells if not line.endswith("OK") and "average of" not in line]


def test_what_was_written_agrees_to_the_last_decimal(plan: Plan) -> None:
    write_golden(plan, golden_path(plan.experiment), 0.0)
    verdict = verify(plan)
    assert verdict.is_equal and differing(verdict) == []
    assert verdict.lines[-1] == COUNTS.format(24, 24, "0.000000", "all are")
    assert len(verdict.lines) == 1 + 24 + 2 + 2


def test_the_file_holds_the_means_of_the_artifacts_in_six_decimals(plan: Plan) -> None:
    path = golden_path(plan.experiment)
    write_golden(plan, path, 0.002)
    text = path.read_text()
    loaded = yaml.safe_load(text)
    assert list(loaded) == ["tolerance", "split", "metrics", "scores"] and loaded["tolerance"] == 0.002
    for scored in plan.scored:
        scores = scored.job.artifact.manifest()["scores"]
        mean = scores["metrics"][scores["headline"]]["mean"]
        assert loaded["scores"][scored.encoder][scored.task.name][scored.pool] == pytest.approx(mean, abs=5.1e-7)
        assert loaded["metrics"][scored.task.name] == scores["headline"] == scored.task.headline
        assert f"{scored.pool}: {mean:.6f}" in text


def test_the_file_says_how_it_was_made_and_names_no_place(plan: Plan) -> None:
    path = golden_path(plan.experiment)
    write_golden(plan, path)
    text = path.read_text()
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    assert "quickstart" in comments[0] and "mini_mbeir, split test (scale=0.05" in text and text.isascii()
    for fact in ("sha256:", "torch 2.", "index Flat", "fp32", "hashed"):
        assert any(fact in line for line in comments), fact
    assert str(plan.experiment.work_dir) not in text and "/" not in "".join(comments).replace("sha256:", "")


def test_writing_twice_gives_equal_bytes(plan: Plan, tmp_path: Path) -> None:
    for name in ("first.yaml", "second.yaml"):
        write_golden(plan, tmp_path / name)
    assert (tmp_path / "first.yaml").read_bytes() == (tmp_path / "second.yaml").read_bytes()


def test_a_moved_score_is_found_by_its_cell(plan: Plan) -> None:
    def move(values: dict[str, Any]) -> None:
        values["scores"][plan.scored[0].encoder]["digits_task3"]["union"] += 0.25

    verdict = changed(plan, move)
    (line,) = differing(verdict)
    assert line[:2] == ["digits_task3", "union"] and line[4:] == ["-0.250000", "FAIL"] and not verdict.is_equal
    assert verdict.lines[-2:] == (COUNTS.format(23, 24, "0.002000", "not all are"), "1 FAIL")


def test_what_was_not_run_and_what_nothing_is_expected_of_is_named_and_fails_nothing(plan: Plan) -> None:
    def rename(values: dict[str, Any]) -> None:
        own = values["scores"][plan.scored[0].encoder]
        own["digits_task9"] = own.pop("digits_task3")
        values["metrics"]["digits_task9"] = "hit@5"

    verdict = changed(plan, rename)
    assert sorted((line[0], line[1], line[-1]) for line in differing(verdict)) == [
        ("digits_task3", "local", "nothing is expected"), ("digits_task3", "union", "nothing is expected"),
        ("digits_task9", "local", "not run"), ("digits_task9", "union", "not run")]
    assert verdict.is_equal and verdict.lines[-3].startswith("22 of 22 agree")
    assert verdict.lines[-2:] == ("2 not run: this experiment, with these options, does not have them",
                                  "of 2 nothing is expected")


def test_some_tasks_are_verified_by_themselves(plan: Plan, quick_run: Experiment, small_arguments: list[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    write_golden(plan, golden_path(plan.experiment))
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "CONFIGS", CONFIGS)
        few = make_plan(load("quickstart", [f"work_dir={quick_run.work_dir}", *small_arguments, "tasks=[quiz_task6]",
                                            "pools=[local]"]))
    verdict = verify(few)
    assert verdict.is_equal and verdict.lines[-2].startswith("1 of 1 agree")
    assert verdict.lines[-1].startswith("23 not run")


def test_where_nothing_can_be_compared_nothing_agrees(plan: Plan) -> None:
    def rename(values: dict[str, Any]) -> None:
        values["scores"] = {"another": values["scores"][plan.scored[0].encoder]}

    verdict = changed(plan, rename)
    assert not verdict.is_equal and verdict.lines[-3].startswith("0 of 0 agree")
    assert "not all are equal" in verdict.lines[-3]


def test_the_metric_of_the_golden_file_is_compared_whatever_the_headline_is(plan: Plan) -> None:
    hits = plan.scored[0].job.artifact.manifest()["scores"]["metrics"]

    def measure_otherwise(values: dict[str, Any]) -> None:
        task = plan.scored[0].task.name
        values["metrics"][task] = "hit@10"
        values["scores"][plan.scored[0].encoder][task]["local"] = hits["hit@10"]["mean"]

    verdict = changed(plan, measure_otherwise)
    assert plan.scored[0].pool == "local"
    assert not [line for line in differing(verdict) if line[:2] == [plan.scored[0].task.name, "local"]]


def test_a_metric_that_was_not_measured_is_named(plan: Plan) -> None:
    def measure_otherwise(values: dict[str, Any]) -> None:
        values["metrics"]["digits_task3"] = "hit@7"

    verdict = changed(plan, measure_otherwise)
    assert [line[-1] for line in differing(verdict)] == ["not measured: hit@7"] * 2
    assert verdict.lines[-1] == "2 by a metric that was not measured" and verdict.is_equal


def test_another_split_is_refused(plan: Plan) -> None:
    def mean_other(values: dict[str, Any]) -> None:
        values["split"] = "val"

    with pytest.raises(UserError, match="split val, this experiment is on split test"):
        changed(plan, mean_other)


def test_the_source_of_published_numbers_is_told(plan: Plan) -> None:
    def publish(values: dict[str, Any]) -> None:
        values["source"] = "Somebody, 2024"
        del values["split"]

    assert changed(plan, publish).lines[-1] == "expected: Somebody, 2024"


@pytest.mark.parametrize("name, encoder, averages", [
    ("mbeir_clip_sf", "clip_sf_large", (0.5018, 0.4751)), ("mbeir_blip_ff", "blip_ff_large", (0.4645, 0.4433))])
def test_published_numbers_are_whole_and_belong_to_an_experiment(
        name: str, encoder: str, averages: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen tasks, both pools, the experiment's own names and headlines, and the averages that are quoted of them."""
    monkeypatch.setattr(pieces, "CONFIGS", CONFIGS)
    experiment = load(name)
    golden = read_golden(golden_path(experiment))
    assert {key: cell.metric for key, cell in golden.cells.items()} == {
        (encoder, task.name, pool): task.headline for task in experiment.tasks for pool in ("local", "union")}
    assert [choice.name for choice in experiment.encoders] == [encoder] and golden.tolerance == 0.002
    assert golden.split == experiment.benchmark.split and "Pyserini" in golden.source
    for pool, average in zip(("local", "union"), averages):
        means = [cell.mean for key, cell in golden.cells.items() if key[2] == pool]
        assert len(means) == 16 and sum(means) / 16 == pytest.approx(average, abs=6e-5)


@pytest.mark.parametrize("found, state", [
    (0.612, "OK"), (0.612001, "near"), (0.616, "near"), (0.604, "near"), (0.616001, "FAIL"), (0.603999, "FAIL")])
def test_near_is_within_three_times_the_tolerance_and_no_agreement(found: float, state: str) -> None:
    verdict = compare(Golden(0.002, {KEY: Cell("hit@1", 0.61)}), {KEY: {"hit@1": found}})
    assert verdict.lines[1].endswith(f"  {state}") and verdict.is_equal == (state == "OK")


@pytest.mark.parametrize("found, tolerance, is_equal, are_same", [
    (0.612, 0.002, True, False),     # in binary the difference is a little more than 0.002
    (0.608, 0.002, True, False),
    (0.612001, 0.002, False, False),
    (0.607999, 0.002, False, False),
    (0.61, 0.0, True, True), (0.610001, 0.0, False, False)])
def test_the_tolerance_is_exact(found: float, tolerance: float, is_equal: bool, are_same: bool) -> None:
    verdict = compare(Golden(tolerance, {KEY: Cell("hit@1", 0.61)}), {KEY: {"hit@1": found}})
    assert verdict.is_equal == is_equal
    count = int(is_equal)
    assert verdict.lines[3] == COUNTS.format(count, 1, f"{tolerance:.6f}", "all are" if are_same else "not all are")


def test_encoders_are_named_where_there_are_several() -> None:
    one = {KEY: Cell("hit@1", 0.5), OTHER: Cell("hit@1", 0.25)}
    two = {**one, ("blip", *KEY[1:]): Cell("hit@1", 1.0)}
    alone, both = (compare(Golden(0.0, cells), {key: {cell.metric: cell.mean} for key, cell in cells.items()})
                   for cells in (one, two))
    assert alone.lines[:3] == ("task        pool   expected     found  difference",
                               "toys_task0  local  0.500000  0.500000   +0.000000  OK",
                               "toys_task0  union  0.250000  0.250000   +0.000000  OK")
    assert [line.split()[0] for line in both.lines[:4]] == ["encoder", "clip", "clip", "blip"]


def test_nothing_expected_and_nothing_found_is_no_agreement() -> None:
    assert not compare(Golden(0.0, {}), {}).is_equal


def test_without_a_golden_file_the_existing_ones_are_named(plan: Plan, configs: Path) -> None:
    with pytest.raises(UserError, match="quickstart") as caught:
        verify(plan)
    assert caught.value.do == "there are: none yet"
    write_golden(plan, configs / "golden/first.yaml")
    write_golden(plan, configs / "golden/second.yaml")
    with pytest.raises(UserError, match="first, second"):
        verify(plan)


def test_what_is_not_scored_yet_is_not_compared(plan: Plan, quick_run: Experiment) -> None:
    write_golden(plan, golden_path(quick_run))
    unfinished = make_plan(replace(quick_run, settings=replace(
        quick_run.settings, score=replace(quick_run.settings.score, seed=77))))
    for action in (verify, lambda it: write_golden(it, golden_path(quick_run))):
        with pytest.raises(NotReady):
            action(unfinished)


@pytest.mark.parametrize("text", [
    "", "just words", "tolerance: 0.1\n", "[1, 2]", "tolerance: a lot\nmetrics: {}\nscores: {}",
    "tolerance: 0.1\nmetrics: {}\nscores: {clip: {toys_task0: {local: 0.5}}}",
    "tolerance: 0.1\nmetrics: {toys_task0: hit@1}\nscores: {clip: {toys_task0: 0.5}}",
    "tolerance: 0.1\nmetrics: {toys_task0: hit@1}\nscores: {clip: {toys_task0: {local: high}}}",
    "tolerance: .nan\nmetrics: {toys_task0: hit@1}\nscores: {clip: {toys_task0: {local: 0.5}}}",
    "tolerance: 0.1\nmetrics: [", "tolerance: \xff"])
def test_a_damaged_file_is_a_users_error_with_its_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "golden.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="not a file of expected scores") as caught:
        read_golden(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_a_tolerance_is_a_fraction(plan: Plan, tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(UserError, match="tolerance"):
        write_golden(plan, tmp_path / "golden.yaml", tolerance)
    assert not (tmp_path / "golden.yaml").exists()


def test_names_that_yaml_would_take_for_something_else_come_back(
        plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [replace(row, encoder="no", task="7") for row in score_rows(plan)[:2]]
    monkeypatch.setattr("pipeline.report.verify.score_rows", lambda _: rows)
    write_golden(plan, tmp_path / "golden.yaml")
    assert set(read_golden(tmp_path / "golden.yaml").cells) == {("no", "7", "local"), ("no", "7", "union")}
