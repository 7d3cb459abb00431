"""Tables: every number is a number of a manifest, and what must be known stands beside it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pipeline.config import Experiment
from pipeline.plan import Plan, make_plan
from pipeline.report.rows import Value, average
from pipeline.report.tables import ScoreRow, markdown_table, score_rows, terminal_table
from pipeline.support.errors import NotReady


@pytest.fixture(scope="module")
def plan(quick_run: Experiment) -> Plan:
    return make_plan(quick_run)


@pytest.fixture(scope="module")
def rows(plan: Plan) -> list[ScoreRow]:
    return score_rows(plan)


def table_lines(text: str) -> list[list[str]]:
    """Cells of the lines of a terminal table, its head first."""
    lines = text.strip("\n").split("\n\n")[0].splitlines()
    return [re.split(r" {2,}", line.strip()) for line in lines]


def markdown_cells(text: str, heading: str) -> list[list[str]]:
    lines = text.split(f"{heading}\n\n", 1)[1].split("\n\n")[0].splitlines()
    assert len({line.count("|") for line in lines}) == 1, "every line has as many cells"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_rows_repeat_the_manifests(plan: Plan, rows: list[ScoreRow]) -> None:
    assert len(rows) == len(plan.scored) == 24
    for row, scored in zip(rows, plan.scored):
        scores = scored.job.artifact.manifest()["scores"]
        assert row.value._asdict() == scores["metrics"][row.headline]
        assert {name: value._asdict() for name, value in row.metrics.items()} == scores["metrics"]
        assert (row.task, row.pool, row.queries) == (scored.task.name, scored.pool, scores["queries"])


def test_metrics_keep_their_configured_order(rows: list[ScoreRow]) -> None:
    assert list(rows[0].metrics)[:4] == ["hit@1", "hit@5", "hit@10", "recall@1"]


def test_kinds_are_those_of_the_tasks(rows: list[ScoreRow]) -> None:
    kinds = {row.task: row.kind for row in rows}
    assert kinds["scenes_task0"] == "text -> image"
    assert kinds["headlines_task2"] == "text -> image,text"
    assert kinds["edits_task7"] == "image,text -> image"
    assert len(set(kinds.values())) == 8


def test_a_union_holds_the_candidates_of_all_pools(rows: list[ScoreRow]) -> None:
    local = sum(row.candidates for row in rows if row.pool == "local")
    assert {row.candidates for row in rows if row.pool == "union"} == {local}


def test_not_scored_is_not_a_table(quick_run: Experiment) -> None:
    with pytest.raises(NotReady):
        score_rows(Plan(quick_run, waiting={"score": ["something"]}))


def test_a_line_per_task_and_an_average(quick_run: Experiment, rows: list[ScoreRow]) -> None:
    head, *lines = table_lines(terminal_table(rows, quick_run, []))
    assert head[:6] == ["task", "kind", "queries", "metric", "local", "union"]
    assert [line[0] for line in lines[:-1]] == [task.name for task in quick_run.tasks]
    first = rows[0].value
    assert lines[0][4] == f"{first.mean:.4f} [{first.low:.4f}, {first.high:.4f}]"
    local = [row.value.mean for row in rows if row.pool == "local"]
    assert lines[-1][:2] == ["average of 12 tasks", f"{sum(local) / 12:.4f}"]


def test_average_counts_every_task_the_same(rows: list[ScoreRow]) -> None:
    two = [replace(rows[0], queries=1, metrics={rows[0].headline: Value(1.0, 1, 1)}),
           replace(rows[0], queries=999, metrics={rows[0].headline: Value(0.0, 0, 0)})]
    assert average(two) == 0.5


def test_plain_text_is_plain_ascii(quick_run: Experiment, rows: list[ScoreRow]) -> None:
    text = terminal_table(rows, quick_run, ["something :smile: [red]odd[/red]"])
    assert text.isascii() and "\x1b" not in text
    assert "something :smile: [red]odd[/red]" in text


def test_notes_say_what_the_numbers_are(quick_run: Experiment, rows: list[ScoreRow]) -> None:
    untrained = [replace(row, made=replace(row.made, weights=None, seed=7)) for row in rows]
    for draw in (terminal_table, markdown_table):
        text = draw(untrained, quick_run, ["beware"])
        assert "M-BEIR prints hit@k as 'Recall@k'" in text
        assert f"encoder {rows[0].encoder} has random weights (seed 7)" in text
        assert "95% bootstrap interval" in text and "rule 'hashed'" in text and "beware" in text


def test_trained_and_exact_is_not_called_otherwise(quick_run: Experiment, rows: list[ScoreRow]) -> None:
    trained = [replace(row, made=replace(row.made, weights="a.safetensors", seed=None)) for row in rows]
    text = terminal_table(trained, quick_run, [])
    assert "random weights" not in text and "approximate" not in text and "ceiling" not in text


def test_an_approximate_index_says_its_worst_recall(quick_run: Experiment, rows: list[ScoreRow]) -> None:
    found = [replace(row, is_exact=False, recall_against_exact={"recall@10": value})
             for row, value in zip(rows[:2], (0.75, 0.98))]
    assert "recall@10 0.7500" in terminal_table(found, quick_run, [])
    assert "(approximate)" in markdown_table(found, quick_run, [])


def test_ceilings_stand_beside_scores(quick_run: Experiment, rows: list[ScoreRow]) -> None:
    capped = [replace(row, ceilings=dict.fromkeys(row.metrics, 0.5 if row.pool == "local" else 1.0))
              for row in rows[:4]]
    head, first, *_ = table_lines(terminal_table(capped, quick_run, []))
    assert head[4:7] == ["local", "ceiling", "union"] and first[5] == "0.5000"


def test_several_encoders_get_an_average_each(quick_run: Experiment, rows: list[ScoreRow]) -> None:
    both = [*rows, *(replace(row, encoder="other") for row in rows)]
    head, *lines = table_lines(terminal_table(both, quick_run, []))
    assert head[0] == "encoder"
    assert [line[0] for line in lines if "average of 12 tasks" in line] == [rows[0].encoder, "other"]


@pytest.mark.parametrize("width", [70, 90, 300])
def test_a_terminal_is_never_overrun(quick_run: Experiment, rows: list[ScoreRow],
                                     monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    text = terminal_table(rows, quick_run, ["a warning of some length " * 9])
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width
    assert ("left out" in text) == ("[" not in table_lines(text)[1][-2]) == (width < 300)


def test_markdown_has_every_metric(quick_run: Experiment, rows: list[ScoreRow]) -> None:
    text = markdown_table(rows, quick_run, [])
    scores = markdown_cells(text, f"# {quick_run.name}")
    assert len(scores) == 2 + 12 + 1 and scores[-1][0] == "**average of 12 tasks**"
    listed = {(line[1], line[2]): line[3:5] for line in markdown_cells(text, "## All metrics")[2:]}
    assert len(listed) == 12 * len(rows[0].metrics)
    for row in rows:
        for name, value in row.metrics.items():
            assert listed[row.task, name][row.pool == "union"].startswith(f"{value.mean:.4f} ")


def test_markdown_says_what_was_run(quick_run: Experiment, rows: list[ScoreRow]) -> None:
    text = markdown_table(rows, quick_run, [])
    facts = [quick_run.benchmark.root, "sha256:", "torch 2.", "index: Flat (exact)", rows[0].artifact, "fp32"]
    assert [fact for fact in facts if fact not in text] == []
    assert "## Warnings" not in text


def test_a_bar_in_a_name_does_not_end_a_cell(quick_run: Experiment, rows: list[ScoreRow]) -> None:
    odd = [replace(row, task="a|b") for row in rows[:2]]
    assert "| a\\|b |" in markdown_table(odd, quick_run, [])


def test_remarks_say_shared_marks_once(quick_run: Experiment, rows: list[ScoreRow]) -> None:
    marked = [replace(rows[0], marks=("untrained",)), replace(rows[1], marks=("untrained", "2 flawed items"))]
    assert "untrained; union: 2 flawed items |" in markdown_table(marked, quick_run, [])


def test_a_single_pool_is_enough(quick_run: Experiment, rows: list[ScoreRow]) -> None:
    union_only = [row for row in rows if row.pool == "union"]
    head, *lines = table_lines(terminal_table(union_only, quick_run, []))
    assert "local" not in head and len(lines) == 13


def test_every_metric_has_its_ceiling(quick_run: Experiment, rows: list[ScoreRow]) -> None:
    """Most queries here have one relevant candidate, so precision@10 cannot pass 0.1."""
    row = next(row for row in rows if row.task == "scenes_task0" and row.pool == "local")
    assert row.ceilings["precision@10"] == pytest.approx(0.1) and row.ceilings["recall@10"] == row.ceiling == 1
    line = next(line for line in markdown_table(rows, quick_run, []).splitlines()
                if "scenes_task0 | precision@10" in line)
    assert line.count(" of 0.1000") == 2
