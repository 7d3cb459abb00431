r"""Score tables for a paper: LaTeX with booktabs, the best in bold, letters where a difference is significant.

A superscript a beside a score means: better than encoder a by the randomisation test, Holm-corrected. Encoders are
columns, tasks are lines, pools stand beside each other. It needs \usepackage{booktabs} and compiles with pdflatex, as
long as names are of letters that pdflatex knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from pipeline.metrics.ranking import Metric
from pipeline.report.comparison import LEVEL, Comparison, Difference
from pipeline.report.rows import ScoreRow, average

_ESCAPES = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#",
            "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
            ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "\n": " "}
_DECIMALS = 4

Column = tuple[str, str]  # pool, encoder


@dataclass(frozen=True)
class _Line:
    """A task: its metric, a mean and the encoders that it beats for each column that has one."""

    task: str
    metric: str
    means: Mapping[Column, float]
    beaten: Mapping[Column, Sequence[str]]


def latex_scores(rows: Sequence[ScoreRow], comparison: Comparison | None, caption: str) -> str:
    """The headlines of an experiment; the letters are the comparison's, if there is one."""
    names = list(dict.fromkeys(row.encoder for row in rows))
    beaten = _beaten(comparison) if comparison else {}
    lines = []
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        means = {(row.pool, row.encoder): row.value.mean for row in own}
        lines.append(_Line(task, own[0].headline, means, beaten.get(task, {})))
    pools = list(dict.fromkeys(row.pool for row in rows))
    averages = {(pool, name): average([row for row in rows if (row.pool, row.encoder) == (pool, name)])
                for pool in pools for name in names}
    last = _Line(_average(len(lines)), "", averages, {})
    return _table(names, pools, [*lines, last], caption, comparison is not None)


def latex_comparison(comparison: Comparison) -> str:
    """All that is compared, with the letters."""
    beaten = _beaten(comparison)
    lines = []
    for task in dict.fromkeys(row.task for row in comparison.differences):
        own = [row for row in comparison.differences if row.task == task]
        lines.append(_Line(task, own[0].metric, _means(own), beaten.get(task, {})))
    ends = {row.task: _Line(row.task, "", _means([each for each in comparison.averages if each.task == row.task]), {})
            for row in comparison.averages}
    caption = f"{' and '.join(comparison.names)} on the same queries."
    return _table(comparison.names, comparison.pools(), [*lines, *ends.values()], caption, True)


def _means(rows: Sequence[Difference]) -> dict[Column, float]:
    return {(row.pool, name): mean for row in rows
            for name, mean in zip((row.first, row.second), row.means)}


def _beaten(comparison: Comparison) -> dict[str, dict[Column, list[str]]]:
    """Task -> column -> names of those that are significantly worse."""
    found: dict[str, dict[Column, list[str]]] = {}
    for row in comparison.differences:
        if row.verdict != "unclear":
            winner, loser = (row.first, row.second) if row.verdict == "better" else (row.second, row.first)
            found.setdefault(row.task, {}).setdefault((row.pool, winner), []).append(loser)
    return found


def _average(tasks: int) -> str:
    return f"average of {tasks} task{'s' * (tasks != 1)}"


def _table(names: Sequence[str], pools: Sequence[str], lines: Sequence[_Line], caption: str, are_tested: bool) -> str:
    letters = dict(zip(names, _letters(len(names))))
    columns = [(pool, name) for pool in pools for name in names]
    body = [_cells(line, columns, letters) for line in lines]
    averages = sum(not line.metric for line in lines)
    rows = [*body[:len(body) - averages], r"\midrule", *body[len(body) - averages:]]
    return "\n".join([
        "% \\usepackage{booktabs}", r"\begin{table}", r"\centering",
        rf"\caption{{{escaped(caption)} {_legend(lines, letters, are_tested)}}}",
        rf"\begin{{tabular}}{{ll{'l' * len(columns)}}}", r"\toprule", *_head(names, pools, letters, are_tested),
        r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _letters(count: int) -> list[str]:
    """a to z, then aa, ab, ..."""
    return [(ascii_lowercase[number // 26 - 1] if number >= 26 else "") + ascii_lowercase[number % 26]
            for number in range(count)]


def _head(names: Sequence[str], pools: Sequence[str], letters: Mapping[str, str], are_tested: bool) -> Iterator[str]:
    width = len(names)
    yield " & ".join(["", "", *(rf"\multicolumn{{{width}}}{{c}}{{{escaped(pool)}}}" for pool in pools)]) + r" \\"
    first = [3 + width * number for number in range(len(pools))]
    yield " ".join(rf"\cmidrule(lr){{{start}-{start + width - 1}}}" for start in first)
    marked = [escaped(name) + (rf"$^{{{letters[name]}}}$" if are_tested else "") for name in names]
    yield " & ".join(["task", "metric", *(marked * len(pools))]) + r" \\"


def _cells(line: _Line, columns: Sequence[Column], letters: Mapping[str, str]) -> str:
    best = {pool: max(round(mean, _DECIMALS) for (other, _), mean in line.means.items() if other == pool)
            for pool, _ in line.means}
    return " & ".join([escaped(line.task), escaped(line.metric),
                       *(_cell(line, column, best, letters) for column in columns)]) + r" \\"


def _cell(line: _Line, column: Column, best: Mapping[str, float], letters: Mapping[str, str]) -> str:
    if column not in line.means:
        return "--"
    mean = round(line.means[column], _DECIMALS)
    number = f"{mean:.{_DECIMALS}f}"
    beaten = "".join(sorted(letters[name] for name in line.beaten.get(column, ())))
    are_rivals = sum(pool == column[0] for pool, _ in line.means) > 1
    return ((rf"\textbf{{{number}}}" if are_rivals and mean == best[column[0]] else number)
            + (rf"$^{{{beaten}}}$" if beaten else ""))


def _legend(lines: Sequence[_Line], letters: Mapping[str, str], are_tested: bool) -> str:
    parts = []
    if any(line.metric and Metric.parse(line.metric).name == "hit" for line in lines):
        parts.append("hit@k is the share of the queries with a relevant candidate among the first k "
                     "(``Recall@k'' in M-BEIR).")
    if are_tested:
        parts.append(f"Letters: better than that encoder (paired randomisation test, Holm-corrected, $p < {LEVEL:g}$).")
    if len(letters) > 1:
        parts.append("Bold: the best of its pool.")
    return " ".join(parts)


def escaped(plain: str) -> str:
    r"""Text that LaTeX prints as it stands: `_` becomes `\_`."""
    return "".join(_ESCAPES.get(character, character) for character in plain)
