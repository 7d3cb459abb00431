"""LaTeX tables: bold and letters stand where they must, nothing of a name is taken for LaTeX, and it compiles."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import Experiment
from pipeline.plan import make_plan
from pipeline.report.comparison import Comparison, Difference
from pipeline.report.latex import escaped, latex_comparison, latex_scores
from pipeline.report.rows import ScoreRow, score_rows

PAGE = r"""\documentclass{article}
\usepackage{booktabs}
\begin{document}
%s
\end{document}
"""
ODD = "a_b #1 50% & {x} \\y ~ ^ $z$ <|> \"q\" [1] `n' * -- @"


def difference(first: str, second: str, task: str, means: tuple[float, float], p_holm: float,
               pool: str = "local") -> Difference:
    return Difference(first, second, task, pool, "hit@5", 9, means, -0.1, 0.1, p_holm, p_holm, 1, 1, 1)


def three(names: Sequence[str] = ("one", "two", "three")) -> Comparison:
    """Two tasks; on the first the second encoder beats both others, on the second nobody beats anybody."""
    means = {"t_1": (0.5, 0.7, 0.6), "t_2": (0.25, 0.125, 0.25)}
    rows = tuple(difference(names[one], names[two], task, (value[one], value[two]),
                            0.01 if task == "t_1" and 1 in (one, two) else 0.5)
                 for one, two in ((0, 1), (0, 2), (1, 2)) for task, value in means.items())
    averages = tuple(replace(row, task="average of 2 tasks") for row in rows if row.task == "t_2")
    return Comparison(tuple(names), rows, averages, 0.95, 1000, ())


def lines_of(latex: str) -> dict[str, list[str]]:
    """First cell -> the others, of every line of the table."""
    cells = [line.removesuffix(r" \\").split(" & ") for line in latex.splitlines() if line.endswith(r" \\")]
    return {first: others for first, *others in cells}


def test_best_is_bold_and_letters_name_who_is_beaten() -> None:
    lines = lines_of(latex_comparison(three()))
    assert lines["task"] == ["metric", "one$^{a}$", "two$^{b}$", "three$^{c}$"]
    assert lines[r"t\_1"] == ["hit@5", "0.5000", r"\textbf{0.7000}$^{ac}$", "0.6000"]
    assert lines[r"t\_2"] == ["hit@5", r"\textbf{0.2500}", "0.1250", r"\textbf{0.2500}"]
    assert lines["average of 2 tasks"][1:] == lines[r"t\_2"][1:]


def test_what_looks_equal_is_equally_bold() -> None:
    close = Comparison(("a", "b"), (difference("a", "b", "t", (0.50004, 0.50001), 0.9),), (), 0.95, 10, ())
    assert lines_of(latex_comparison(close))["t"][1:] == [r"\textbf{0.5000}"] * 2


def test_a_cell_that_was_not_measured_is_a_dash() -> None:
    found = three()
    lost = replace(found, differences=tuple(row for row in found.differences
                                            if (row.task, row.second) != ("t_1", "three")))
    assert lines_of(latex_comparison(lost))[r"t\_1"][-1] == "--"


def test_scores_of_one_encoder_have_neither_letters_nor_bold(quick_run: Experiment) -> None:
    rows = score_rows(make_plan(quick_run))
    latex = latex_scores(rows, None, "A caption.")
    assert "textbf" not in latex and "$^" not in latex and "Letters" not in latex
    lines = lines_of(latex)
    for row in rows:
        assert f"{row.value.mean:.4f}" in lines[escaped(row.task)]
    assert len(lines["average of 12 tasks"]) == 3 and latex.count(r"\midrule") == 2


def test_scores_of_two_encoders_stand_beside_each_other(quick_run: Experiment) -> None:
    rows: list[ScoreRow] = score_rows(make_plan(quick_run))
    both = [*rows, *(replace(row, encoder="other", metrics={
        name: value._replace(mean=value.mean / 2) for name, value in row.metrics.items()}) for row in rows)]
    lines = lines_of(latex_scores(both, None, "A caption."))
    assert lines["task"] == ["metric", r"quickstart\_clip", "other", r"quickstart\_clip", "other"]
    first = rows[0]
    assert lines[escaped(first.task)][1:3] == [rf"\textbf{{{first.value.mean:.4f}}}", f"{first.value.mean / 2:.4f}"]


def test_nothing_of_a_name_is_left_to_latex() -> None:
    assert escaped("a_b&c%") == r"a\_b\&c\%" and escaped("\\") == r"\textbackslash{}"
    bare = re.sub(r"\\(text[a-z]+\{\}|[&%$#_{}])", "", escaped(ODD))
    assert not set(bare) & set("\\{}&%$#_~^\"\n<>|")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is missing: apt install texlive-latex-base")
def test_it_compiles_and_prints_names_as_they_are(tmp_path: Path, quick_run: Experiment) -> None:
    tables = [latex_comparison(three(("one", ODD, "three"))), latex_comparison(three()),
              latex_scores(score_rows(make_plan(quick_run)), None, ODD)]
    (tmp_path / "page.tex").write_text(PAGE % "\n".join(tables))
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "page.pdf").stat().st_size > 1000
    assert "Missing character" not in (tmp_path / "page.log").read_text(errors="replace")
