"""compare: what it says is in the values per query, chance is not called better, and other data are refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from markdown_it import MarkdownIt

from pipeline.cli import main
from pipeline.config import Experiment, load
from pipeline.embeddings import read_table
from pipeline.plan import Plan, make_plan
from pipeline.report import comparison_text
from pipeline.report.changes import Change, Values, changes_of
from pipeline.report.comparison import Comparison, Difference, comparison, comparison_of_two
from pipeline.report.latex import latex_scores
from pipeline.report.rows import score_rows
from pipeline.report.sides import pairs_of_two, sides_of
from pipeline.run import run_experiment
from pipeline.stages.score import PER_QUERY
from pipeline.support.errors import NotReady, UserError
from tests.small_mbeir import SmallMbeir

ENCODERS = ("quickstart_clip", "tiny_clip_random")
TASKS = ("scenes_task0", "digits_task4", "quiz_task8")


@pytest.fixture(scope="module")
def arguments(quick_copy: Path, small_arguments: list[str]) -> list[str]:
    """Two encoders on three tasks, in the folder of the finished quick start."""
    return [f"work_dir={quick_copy}", *small_arguments, f"tasks=[{','.join(TASKS)}]",
            f"encoders=[{','.join(ENCODERS)}]", "name=two", "retrieve.depth=100"]


@pytest.fixture(scope="module")
def plan(arguments: list[str]) -> Plan:
    experiment = load("quickstart", arguments)
    run_experiment(experiment, [], say=lambda *_: None)
    return make_plan(experiment)


@pytest.fixture(scope="module")
def found(plan: Plan) -> Comparison:
    return comparison(plan)


def values_of(plan: Plan, encoder: str, task: str, pool: str, metric: str) -> np.ndarray:
    scored = next(each for each in plan.scored if (each.encoder, each.task.name, each.pool) == (encoder, task, pool))
    return read_table(scored.job.artifact.path(PER_QUERY), None)[metric].to_numpy().astype(np.float64)


def test_differences_are_those_of_the_scores(plan: Plan, found: Comparison) -> None:
    means = {(scored.encoder, scored.task.name, scored.pool):
             scored.job.artifact.manifest()["scores"]["metrics"]["hit@5"]["mean"] for scored in plan.scored}
    assert [(row.task, row.pool) for row in found.differences] == [
        (task, pool) for pool in ("local", "union") for task in TASKS]
    for row in found.differences:
        assert row.means == pytest.approx([means[name, row.task, row.pool] for name in ENCODERS], abs=1e-12)
        away_Q = np.subtract(*(values_of(plan, name, row.task, row.pool, "hit@5") for name in ENCODERS))
        assert (row.wins, row.ties, row.losses) == tuple(int((away_Q * sign > 0).sum()) if sign else
                                                         int((away_Q == 0).sum()) for sign in (1, 0, -1))
        assert row.p == pytest.approx(scipy.stats.binomtest(row.wins, row.wins + row.losses).pvalue)
        assert row.low <= row.difference <= row.high and row.queries == len(away_Q)


def test_p_values_are_corrected_over_the_tasks_of_a_pool(found: Comparison) -> None:
    for pool in found.pools():
        rows = sorted(found.of(ENCODERS, pool), key=lambda row: row.p)
        expected = np.minimum(1, np.maximum.accumulate([row.p * left for row, left in zip(rows, (3, 2, 1))]))
        assert [row.p_holm for row in rows] == pytest.approx(expected)
        assert all(row.verdict == ("unclear" if row.p_holm >= 0.05 else "better") for row in rows)


def test_averages_count_every_task_the_same(found: Comparison) -> None:
    assert [(row.task, row.pool) for row in found.averages] == [
        ("average of 3 tasks", "local"), ("average of 3 tasks", "union")]
    for row in found.averages:
        own = found.of(ENCODERS, row.pool)
        assert row.difference == pytest.approx(np.mean([each.difference for each in own]))
        assert row.low < row.difference < row.high and row.p < 0.01
        assert row.wins == sum(each.wins for each in own)


def test_the_other_order_turns_every_sign(plan: Plan, found: Comparison) -> None:
    turned = comparison(plan, ENCODERS[::-1])
    for row, other in zip(found.differences, turned.differences):
        assert (row.p, row.p_holm, row.wins, row.losses) == (other.p, other.p_holm, other.losses, other.wins)
        assert row.difference == pytest.approx(-other.difference)
        assert (row.gains, row.drops) == tuple(
            tuple(replace(each, values=each.values[::-1], ranks=each.ranks[::-1] if each.ranks else None)
                  for each in side) for side in (other.drops, other.gains))


def test_changed_queries_are_those_of_the_run(plan: Plan, found: Comparison) -> None:
    row = next(each for each in found.of(ENCODERS, "local") if each.task == "scenes_task0")
    reciprocal = [values_of(plan, name, row.task, "local", "mrr") for name in ENCODERS]
    ids = read_table(plan.scored[0].job.artifact.path(PER_QUERY), None)["query_id"].to_pylist()
    assert len(row.gains) == 5
    for change in row.gains:
        place = ids.index(change.query_id)
        assert change.values == (1.0, 0.0) and change.ranks is not None and change.text
        for rank, value_Q in zip(change.ranks, reciprocal):
            assert (0.0 if rank is None else 1 / rank) == pytest.approx(value_Q[place], abs=1e-6)
    rises = [1 / (change.ranks or (0,))[0] for change in row.gains if change.ranks and change.ranks[0]]  # type: ignore
    assert rises == sorted(rises, reverse=True)


def test_changes_are_ordered_by_the_metric_then_by_the_rank_then_by_place(plan: Plan) -> None:
    scored = plan.scored[0]
    count = len(read_table(scored.job.artifact.path(PER_QUERY), None))
    values_2Q, reciprocal_2Q = np.zeros((2, count)), np.zeros((2, count))
    values_2Q[0, [1, 2, 4]], reciprocal_2Q[0, [1, 2, 4]], reciprocal_2Q[1, 4] = 1, [1 / 3, 1, 1], 1 / 9
    values_2Q[1, 6], reciprocal_2Q[:, 6] = 1, [1 / 50, 1 / 2]
    gains, drops = changes_of(scored, Values("hit@5", values_2Q, reciprocal_2Q), 9)
    assert [change.ranks for change in gains] == [(1, None), (1, 9), (3, None)]
    assert [change.ranks for change in drops] == [(50, 2)]
    assert [change.values for change in drops] == [(0.0, 1.0)]
    untold, _ = changes_of(scored, Values("hit@5", values_2Q, None), 2)
    assert [change.ranks for change in untold] == [None, None] and untold[0].query_id == gains[2].query_id


def test_equal_runs_differ_in_nothing(plan: Plan, arguments: list[str]) -> None:
    """Another name of an experiment, the same artifacts."""
    twin = make_plan(load("quickstart", [*arguments, "name=twin"]))
    found = comparison_of_two(plan, twin, pairs_of_two(plan, twin))
    assert found.names == tuple(f"{encoder} ({name})" for encoder in ENCODERS for name in ("two", "twin"))
    for row in (*found.differences, *found.averages):
        assert (row.difference, row.low, row.high, row.p, row.p_holm, row.verdict) == (0, 0, 0, 1, 1, "unclear")
        assert row.ties == row.queries and not row.gains and not row.drops
    assert found.remarks == ()


def test_any_metric_that_was_measured(plan: Plan) -> None:
    rows = comparison(plan, metric="MRR").differences
    assert {row.metric for row in rows} == {"mrr"}
    row = rows[0]
    assert row.means[0] == pytest.approx(values_of(plan, ENCODERS[0], row.task, row.pool, "mrr").mean())
    with pytest.raises(UserError, match="ndcg@7 was measured") as caught:
        comparison(plan, metric="ndcg@7")
    assert "scenes_task0 on local: ndcg@7 was not measured" in str(caught.value.do)


def test_who_can_be_compared(plan: Plan, quick_run: Experiment) -> None:
    with pytest.raises(UserError, match="nothing to compare"):
        comparison(make_plan(quick_run))
    with pytest.raises(UserError, match="no encoder 'quickstart'") as caught:
        comparison(plan, ["quickstart", ENCODERS[1]])
    assert "nearest: quickstart_clip" in str(caught.value.do)
    with pytest.raises(UserError, match="twice"):
        comparison(plan, [ENCODERS[0], ENCODERS[0]])
    with pytest.raises(UserError, match="two encoders, not 3"):
        pairs_of_two(plan, plan, ["a", "b", "c"])


def test_names_tell_the_sides_apart(plan: Plan, quick_run: Experiment) -> None:
    alone = make_plan(quick_run)
    same, = pairs_of_two(plan, alone)
    assert [side.name for side in same] == ["two", "quickstart"]
    crossed, = pairs_of_two(plan, alone, [ENCODERS[1], ENCODERS[0]])
    assert [side.name for side in crossed] == [ENCODERS[1], ENCODERS[0]]
    assert [side.name for side in sides_of(plan)] == list(ENCODERS)


def test_what_only_one_side_has_is_told(plan: Plan, quick_run: Experiment) -> None:
    whole = make_plan(quick_run)
    found = comparison_of_two(plan, whole, pairs_of_two(plan, whole))
    assert {row.task for row in found.differences} == set(TASKS)
    assert len(found.left_out) == 2 * 9
    assert "facts_task1 on union: only quickstart was measured on it" in found.left_out


def test_what_is_not_scored_is_not_ready(arguments: list[str]) -> None:
    with pytest.raises(NotReady, match="not scored yet on task scenes_task0"):
        comparison(make_plan(load("quickstart", [*arguments, "score.seed=77"])))


def small(root: Path, name: str, small_mbeir: SmallMbeir, *more: str) -> Plan:
    small_mbeir.write()
    experiment = load(str(small_mbeir.experiment), [f"name={name}", f"work_dir={root}", "pools=[local]", *more])
    run_experiment(experiment, [], say=lambda *_: None)
    return make_plan(experiment)


@pytest.mark.parametrize("kind, word", [("qrels", "qrels"), ("queries", "queries"), ("candidates", "candidates")])
def test_other_data_are_refused_and_named(tmp_path: Path, kind: str, word: str) -> None:
    first = small(tmp_path / "work", "first", SmallMbeir(tmp_path / "one"))
    other = SmallMbeir(tmp_path / "two")
    if kind == "qrels":
        other.qrels[0] = "7:1 0 7:2 1 0"
    elif kind == "queries":
        other.queries[0]["query_txt"] = "A crimson toy."
    else:
        other.candidates[0]["txt"], other.candidates[0]["modality"] = "red", "image,text"
    second = small(tmp_path / "work", "second", other)
    with pytest.raises(UserError, match=f"differ in the {word} of task toys_task0, pool local") as caught:
        comparison_of_two(first, second, pairs_of_two(first, second))
    assert caught.value.where == "first and second"


def test_the_same_data_in_another_folder_are_the_same_and_other_options_are_told(tmp_path: Path) -> None:
    first = small(tmp_path / "work", "first", SmallMbeir(tmp_path / "one"))
    second = small(tmp_path / "work", "second", SmallMbeir(tmp_path / "two"), "embed.storage=float32")
    found = comparison_of_two(first, second, pairs_of_two(first, second))
    assert [row.task for row in found.differences] == ["toys_task0"]
    assert found.remarks == ("the experiments differ in embed.storage: float16, float32",)


def test_whole_runs_of_other_depths_are_refused_and_cut_ones_are_not(tmp_path: Path) -> None:
    first = small(tmp_path / "work", "first", SmallMbeir(tmp_path / "one"))
    second = small(tmp_path / "work", "second", SmallMbeir(tmp_path / "one"), "retrieve.depth=2")
    pairs = pairs_of_two(first, second)
    with pytest.raises(UserError, match="whole runs, of 4 and of 2") as caught:
        comparison_of_two(first, second, pairs, "mrr")
    assert "mrr@2" in str(caught.value.do)
    assert comparison_of_two(first, second, pairs, "hit@1").differences


def test_one_query_can_only_be_chance(tmp_path: Path) -> None:
    one = SmallMbeir(tmp_path / "one")
    one.queries, one.qrels = one.queries[:1], one.qrels[:1]
    first = small(tmp_path / "work", "first", one)
    second = small(tmp_path / "work", "second", one, "encoders=[pipeline.encoders.random_vectors]")
    row, = comparison_of_two(first, second, pairs_of_two(first, second)).differences
    assert (row.queries, row.p, row.p_holm, row.verdict) == (1, 1.0, 1.0, "unclear")
    assert row.low == row.high == pytest.approx(row.difference)


def made_up(p_holm: float = 0.01, difference: float = 0.1, **more: object) -> Difference:
    change = Change("q|1", "Two <b>words</b> | *and*\nmore " + "x" * 90, None, "text", (1.0, 0.0), (2, None))
    values = dict(first="a_b", second="c*d", task="task_1", pool="local", metric="hit@5", queries=9,
                  means=(0.5 + difference, 0.5), low=difference - 0.1, high=difference + 0.1, p=p_holm / 2,
                  p_holm=p_holm, wins=5, ties=3, losses=1, gains=(change,))
    return Difference(**{**values, **more})  # type: ignore[arg-type]


def made_up_comparison() -> Comparison:
    rows = (made_up(), made_up(0.04, -0.1, task="task_2"), made_up(0.05, 0.2, task="task_3"))
    return Comparison(("a_b", "c*d"), rows, (made_up(task="average of 3 tasks"),), 0.95, 1000, ("this | that",))


def test_the_sentence_counts_what_is_better_worse_and_unclear() -> None:
    sentence, = comparison_text.sentences(made_up_comparison())
    assert sentence == ("a_b is better than c*d on 1 of 3 tasks (pool: local, Holm-corrected p < 0.05), worse on 1; "
                        "on 1 the difference could be chance. On average it is +0.1000 [+0.0000, +0.2000], p 0.0050.")


def test_a_difference_that_is_noise_is_called_so() -> None:
    found = made_up_comparison()
    tiny = replace(found, differences=(made_up(difference=0.0005), *found.differences))
    assert not [note for note in comparison_text.notes(found) if "below 0.001" in note]
    assert [note for note in comparison_text.notes(tiny) if "below 0.001" in note]


def test_the_text_has_a_line_for_every_task() -> None:
    text = comparison_text.text(made_up_comparison())
    line = next(line for line in text.splitlines() if line.startswith("task_1"))
    assert re.split(r" {2,}", line) == ["task_1", "hit@5", "9", "0.6000", "0.5000", "+0.1000 [+0.0000, +0.2000]",
                                        "0.0050", "0.0100", "5/3/1", "better"]
    assert "q|1: A rank 2, B not found: Two <b>words</b> | *and* more" in text and "left out: this | that" in text
    assert "ahead" not in comparison_text.text(made_up_comparison(), changes=0)


def test_the_exported_table_has_the_letters_of_the_comparison(plan: Plan, found: Comparison) -> None:
    latex = latex_scores(score_rows(plan), found, "A caption.")
    for row in found.differences:
        marked = f"\\textbf{{{row.means[0]:.4f}}}" + "$^{b}$" * (row.verdict == "better")
        line = next(line for line in latex.splitlines() if line.startswith(row.task.replace("_", "\\_") + " "))
        assert marked in line or row.means[0] < row.means[1]
    assert latex.count("$^{b}$") == 2 + sum(row.verdict == "better" for row in found.differences)


def cells_of(html: str) -> list[list[str]]:
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)]


def test_markdown_renders_as_it_was_meant() -> None:
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(
        comparison_text.markdown(made_up_comparison()))
    lines = cells_of(html)
    assert [len(line) for line in lines] == [10] * 5 and [line[0] for line in lines[1:]] == [
        "task_1", "task_2", "task_3", "average of 3 tasks"]
    assert "<b>" not in html and "<em>" not in html and "A = a_b, B = c*d" in html
    assert "&lt;b&gt;words&lt;/b&gt; | *and* more" in html and "p &lt; 0.05" in html


def test_the_command_prints_each_format(arguments: list[str], plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "quickstart", "--queries", "1", "--encoders", *ENCODERS, *arguments]) == 0
    out = capsys.readouterr().out
    assert out.startswith("quickstart_clip is better than tiny_clip_random on ") and "pool: union" in out
    assert main(["compare", "quickstart", *arguments, "--format", "latex"]) == 0
    assert r"\begin{tabular}" in capsys.readouterr().out
    assert main(["compare", "quickstart", *arguments, "--format", "markdown", "--metric", "map"]) == 0
    assert capsys.readouterr().out.startswith("# quickstart_clip against tiny_clip_random\n")
    assert main(["compare", "quickstart", *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["differences"]) == 6 and told["differences"][0]["gains"][0]["query_id"]
    assert told["sentences"] and {row["verdict"] for row in told["differences"]} <= {"better", "unclear"}


def test_the_command_compares_with_the_same_experiment_under_other_options(
        arguments: list[str], plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["compare", "quickstart", *arguments, f"encoders=[{ENCODERS[0]}]"]
    assert main([*one, "--against", "embed.instruction=hashed"]) == 0
    assert "two is better than two embed.instruction=hashed on 0 of 3 tasks" in capsys.readouterr().out
    assert main([*one, "--against", "embed.instruction=none"]) == 3
    assert main(["compare", "quickstart", "quickstart", *arguments, "--against", "name=again"]) == 0
    assert main(["compare", "quickstart", "a", "b"]) == 2
    assert main([*one, "--queries", "-1"]) == 2


def test_every_pair_of_three(plan: Plan, arguments: list[str]) -> None:
    """A third encoder: all pairs, and a correction over all of them."""
    three = [argument for argument in arguments if not argument.startswith("encoders=")]
    experiment = load("quickstart", [*three, f"encoders=[{','.join(ENCODERS)},random_vectors]", "name=three"])
    run_experiment(experiment, [], say=lambda *_: None)
    found = comparison(make_plan(experiment))
    assert found.pairs() == [ENCODERS, (ENCODERS[0], "random_vectors"), (ENCODERS[1], "random_vectors")]
    smallest = min((row for row in found.differences if row.pool == "local"), key=lambda row: row.p)
    assert smallest.p_holm == pytest.approx(9 * smallest.p)
    assert len(comparison_text.sentences(found)) == 6
