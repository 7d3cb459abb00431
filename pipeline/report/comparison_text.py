"""A comparison in words, as a table for a terminal, as Markdown, and as plain values for a program.

The sentence comes first: on how many tasks one is better, and on how many the difference could be chance. In tables
the two are A and B, because names of encoders are long and a difference has one sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.metrics.ranking import Metric
from pipeline.report.changes import Change
from pipeline.report.comparison import LEVEL, RANDOMISATIONS, Comparison, Difference

NOISE = 0.001  # such differences were seen between two machines that measured the same weights
_TITLES = ("task", "metric", "queries", "A", "B", "A - B", "p", "p (Holm)", "wins/ties/losses", "A is")
_NUMBERS = range(2, 9)
_SHOWN_CHARACTERS = 76


def sentences(comparison: Comparison) -> list[str]:
    """One for each pair and pool."""
    return [_sentence(comparison, pair, pool) for pair in comparison.pairs() for pool in comparison.pools()
            if comparison.of(pair, pool)]


def _sentence(comparison: Comparison, pair: tuple[str, str], pool: str) -> str:
    rows = comparison.of(pair, pool)
    better, worse, unclear = (sum(row.verdict == verdict for row in rows) for verdict in ("better", "worse", "unclear"))
    average = next(row for row in comparison.averages if (row.first, row.second, row.pool) == (*pair, pool))
    tasks = f"{len(rows)} task{'s' * (len(rows) != 1)}"
    chance = f"; on {unclear} the difference could be chance" if unclear else ""
    return (f"{pair[0]} is better than {pair[1]} on {better} of {tasks} (pool: {pool}, Holm-corrected p < {LEVEL:g}), "
            f"worse on {worse}{chance}. On average it is {average.difference:+.4f} "
            f"[{average.low:+.4f}, {average.high:+.4f}], p {shown_p(average.p)}.")


def notes(comparison: Comparison) -> list[str]:
    """How the numbers were made, and what must be known beside them."""
    return list(_notes(comparison))


def _notes(comparison: Comparison) -> Iterator[str]:
    metrics = {row.metric for row in comparison.differences}
    if any(Metric.parse(name).name == "hit" for name in metrics):
        yield "hit@k: share of the queries with a relevant candidate among the first k; M-BEIR prints it as 'Recall@k'"
    yield (f"A - B: difference of the means over queries, and its {comparison.confidence * 100:g}% paired bootstrap "
           f"interval ({comparison.resamples:,} resamples)")
    yield ("p: paired randomisation test, two-sided; exact where all differences are equal in size, as those of hit@k, "
           f"or few, else by {RANDOMISATIONS:,} random patterns of signs")
    yield ("p (Holm): corrected for all the tests on that pool; better and worse: it is below "
           f"{LEVEL:g}. The average is one test, and is not corrected")
    yield "wins: queries where A has the greater value; the average counts every task the same, and adds up queries"
    if any(row.verdict != "unclear" and abs(row.difference) < NOISE for row in comparison.differences):
        yield (f"a difference below {NOISE:g} means little however small its p: other devices, precisions and versions "
               "of libraries move scores as much")
    yield from comparison.remarks
    yield from (f"left out: {text}" for text in comparison.left_out)


def text(comparison: Comparison, changes: int = 10) -> str:
    """For a terminal: sentences, tables, the queries that changed most, notes."""
    parts = ["\n".join(sentences(comparison))]
    for pair in comparison.pairs():
        parts.append(f"A = {pair[0]}, B = {pair[1]}")
        parts += [f"pool: {pool}\n{_aligned([_TITLES, *lines])}" for pool, lines in _tables(comparison, pair)]
        parts += [f"{title}\n" + "\n".join(f"  {line}" for line in lines)
                  for title, lines in _changed(comparison, pair, changes)]
    parts.append("\n".join(f"  {note}" for note in notes(comparison)))
    return "\n\n".join(parts)


def markdown(comparison: Comparison, changes: int = 10) -> str:
    """The same as a page."""
    parts = [f"# {' against '.join(comparison.names)}", "\n".join(f"- {each}" for each in sentences(comparison))]
    for pair in comparison.pairs():
        parts.append(f"## A = {escaped(pair[0])}, B = {escaped(pair[1])}")
        for pool, lines in _tables(comparison, pair):
            rule = ["---:" if column in _NUMBERS else "---" for column in range(len(_TITLES))]
            parts += [f"### Pool: {escaped(pool)}", "\n".join(map(_row, [_TITLES, rule, *lines]))]
        for title, told in _changed(comparison, pair, changes):
            parts += [f"### {escaped(title)}", "\n".join(f"- {escaped(line)}" for line in told)]
    return "\n\n".join([*parts, "\n".join(f"- {escaped(note)}" for note in notes(comparison))]) + "\n"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, with the sentences and notes."""
    values = asdict(comparison)
    for key in ("differences", "averages"):
        rows: Sequence[Difference] = getattr(comparison, key)
        values[key] = [{**asdict(row), "difference": row.difference, "verdict": row.verdict} for row in rows]
    return {"sentences": sentences(comparison), **values, "notes": notes(comparison)}


def _tables(comparison: Comparison, pair: tuple[str, str]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Pool by pool the cells of its lines, the average last."""
    for pool in comparison.pools():
        averages = [row for row in comparison.averages if (row.first, row.second, row.pool) == (*pair, pool)]
        if averages:
            yield pool, [_cells(row) for row in [*comparison.of(pair, pool), *averages]]


def _cells(row: Difference) -> tuple[str, ...]:
    first, second = row.means
    return (row.task, row.metric, f"{row.queries:,}", f"{first:.4f}", f"{second:.4f}",
            f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]", shown_p(row.p), shown_p(row.p_holm),
            f"{row.wins:,}/{row.ties:,}/{row.losses:,}", row.verdict)


def shown_p(value: float) -> str:
    """Four digits; below that, that it is below."""
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def _changed(comparison: Comparison, pair: tuple[str, str], count: int) -> Iterator[tuple[str, list[str]]]:
    """The queries that changed most, those of all tasks and pools together, in either direction."""
    for title, kind, sign in ((f"where {pair[0]} is ahead by most", "gains", -1),
                              (f"where {pair[1]} is ahead by most", "drops", 1)):
        found = [(row, change) for row in comparison.differences if (row.first, row.second) == pair
                 for change in getattr(row, kind)]
        found.sort(key=lambda each: (sign * each[1].difference, sign * _rise(each[1])))
        if found and count:
            yield title, [_change(row, change) for row, change in found[:count]]


def _rise(change: Change) -> float:
    """Difference of the reciprocal ranks."""
    first, second = (1 / rank if rank else 0.0 for rank in change.ranks or (None, None))
    return first - second


def _change(row: Difference, change: Change) -> str:
    shown = change.text if change.text else change.image or ""
    shown = " ".join(shown.split())
    shown = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS - 3]}..."
    if change.ranks is None:
        first, second = (f"{value:.4f}" for value in change.values)
    else:
        first, second = (f"rank {rank}" if rank else "not found" for rank in change.ranks)
    return f"{row.task} on {row.pool}, {change.query_id}: A {first}, B {second}: {shown}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) if column in _NUMBERS else cell.ljust(width)
                               for column, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"


def escaped(plain: str) -> str:
    """Text in a line or cell of Markdown, with everything that Markdown or HTML would take for itself escaped."""
    return "".join(f"\\{character}" if character in "\\`*_[]<>|#~&" else character for character in plain)
