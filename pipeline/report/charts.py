"""Small charts as inline SVG, coloured by the page's style sheet: so they follow light, dark and print.

Written by hand because each is a handful of lines and paths: dozens of them weigh less than one of a plotting library,
which could not change its colours with the page. Every chart names its content for those who cannot see it, and its
numbers stand in a table beside it.

Shapes: K ranks, T kinds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from pipeline.report.rows import Value
from pipeline.report.survey import KINDS

STRIP_WIDTH, STRIP_HEIGHT = 96, 10
_STACK_WIDTH = 120
_WIDTH, _HEIGHT = 300, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 8, 8, 26
_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_MOST_POINTS = 48  # of a line; more are not seen at this size


class Line(NamedTuple):
    """hit@1, hit@2, ...; `style` is a class of the style sheet."""

    name: str
    style: str
    value_K: np.ndarray


def strip(value: Value, ceiling: float, style: str) -> Markup:
    """A score between 0 and 1 as a dot, its interval as a bar, a ceiling below 1 as a tick."""
    low, high, mean = (STRIP_WIDTH * min(max(part, 0), 1) for part in (value.low, value.high, value.mean))
    middle = STRIP_HEIGHT / 2
    parts = [_line("track", 0, middle, STRIP_WIDTH, middle), _line(f"range {style}", low, middle, high, middle)]
    if ceiling < 1:
        parts.append(_line("ceiling", STRIP_WIDTH * ceiling, 0, STRIP_WIDTH * ceiling, STRIP_HEIGHT))
    parts.append(Markup('<circle class="dot {}" cx="{}" cy="{}" r="3"/>').format(style, _number(mean), middle))
    return _svg("strip", STRIP_WIDTH, STRIP_HEIGHT, "", parts)


def curves(title: str, lines: Sequence[Line], marked: int) -> Markup:
    """hit@k over k, which is on a logarithmic scale; a thin line stands at the cutoff `marked`."""
    depth = max((len(line.value_K) for line in lines), default=1)
    parts = [*_frame(depth), _line("marked", _x(marked, depth), _TOP, _x(marked, depth), _HEIGHT - _BOTTOM)]
    for line in lines:
        ranks = _ranks(len(line.value_K))
        points = " ".join(f"{_number(_x(rank, depth))},{_number(_y(line.value_K[rank - 1]))}" for rank in ranks)
        parts.append(Markup('<polyline class="curve {}" points="{}"><title>{}</title></polyline>').format(
            line.style, points, f"{line.name}: {_told(line.value_K)}"))
    told = "; ".join(f"{line.name} {_told(line.value_K)}" for line in lines)
    return _svg("chart", _WIDTH, _HEIGHT, f"{title}: hit@k for k from 1 to {depth}. {told}", parts)


def areas(title: str, share_KT: np.ndarray) -> Markup:
    """What stands at each rank, as shares of the queries, stacked in the order of survey.KINDS; ranks as above."""
    depth = len(share_KT)
    ranks = _ranks(depth)
    top_KT = np.cumsum(share_KT, axis=1)
    below_K, parts = np.zeros(depth), []
    for kind, name in enumerate(KINDS):
        upper = [f"{_number(_x(rank, depth))},{_number(_y(top_KT[rank - 1, kind]))}" for rank in ranks]
        lower = [f"{_number(_x(rank, depth))},{_number(_y(below_K[rank - 1]))}" for rank in reversed(ranks)]
        parts.append(Markup('<polygon class="kind{}" points="{}"><title>{}</title></polygon>').format(
            kind, " ".join([*upper, *lower]), f"{name}: {share_KT[0, kind]:.1%} at rank 1"))
        below_K = top_KT[:, kind]
    label = f"{title}: at rank 1 " + ", ".join(f"{share:.1%} {name}" for name, share in zip(KINDS, share_KT[0]))
    return _svg("chart", _WIDTH, _HEIGHT, label, [*parts, *_frame(depth, "above")])


def stack(shares: Sequence[float], label: str) -> Markup:
    """Shares of one whole side by side, in the order of survey.KINDS."""
    parts, left = [], 0.0
    for kind, share in enumerate(shares):
        parts.append(_bar(f"kind{kind}", left * _STACK_WIDTH, share * _STACK_WIDTH, 12))
        left += share
    return _svg("stack", _STACK_WIDTH, 12, label, parts)


def bar(value: float, style: str) -> Markup:
    """A number between 0 and 1 as a bar on a track."""
    return _svg("bar", STRIP_WIDTH, 8, "", [_bar("track", 0, STRIP_WIDTH, 8), _bar(style, 0, STRIP_WIDTH * value, 8)])


def _svg(style: str, width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    """Without a label it is an ornament beside the number that it shows."""
    told = Markup('role="img" aria-label="{}"').format(label) if label else Markup('aria-hidden="true"')
    return Markup('<svg class="{}" viewBox="0 0 {} {}" width="{}" height="{}" {}>{}</svg>').format(
        style, width, height, width, height, told, Markup("").join(parts))


def _frame(depth: int, style: str = "") -> list[Markup]:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line(f"grid {style}", _LEFT, _y(share), _WIDTH - _RIGHT, _y(share)))
        parts.append(_text("end", _LEFT - 5, _y(share) + 3.5, f"{share:g}"))
    for rank in (rank for rank in _TICKS if rank <= depth):
        parts.append(_text("middle", _x(rank, depth), _HEIGHT - 9, f"{rank:,}"))
    return parts


def _x(rank: float, depth: int) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT - 4) * math.log(rank) / math.log(max(depth, 2))


def _y(share: float) -> float:
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - float(share))


def _ranks(depth: int) -> list[int]:
    """Every rank where they are few; else about evenly on a logarithmic scale, with both ends."""
    return sorted({round(rank) for rank in np.geomspace(1, depth, _MOST_POINTS)}) if depth else []


def _told(value_K: np.ndarray) -> str:
    return ", ".join(f"@{rank} {value_K[rank - 1]:.3f}" for rank in (1, 5, 10, 50, 100) if rank <= len(value_K))


def _line(style: str, left: float, top: float, right: float, bottom: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
        style.strip(), *map(_number, (left, top, right, bottom)))


def _bar(style: str, left: float, width: float, height: float) -> Markup:
    return Markup('<rect class="{}" x="{}" y="0" width="{}" height="{}"/>').format(
        style, *map(_number, (left, width, height)))


def _text(anchor: str, left: float, top: float, text: str) -> Markup:
    return Markup('<text text-anchor="{}" x="{}" y="{}">{}</text>').format(anchor, _number(left), _number(top), text)


def _number(value: float) -> str:
    return f"{float(value):.1f}".removesuffix(".0")
