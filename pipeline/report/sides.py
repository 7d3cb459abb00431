"""What is compared with what: encoders of one experiment, or of two that ask the same questions of the same data.

Promise: two sides share queries, qrels and candidates by the digests of their content, whatever they are called; what
only one of them has is told, never silently left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.metrics.ranking import Metric
from pipeline.plan import Plan, Scored
from pipeline.support.errors import NotReady, UserError, nearest

Cells = dict[tuple[str, str], Scored]  # by task and pool
_TOLD = ("encoders", "embed", "index", "retrieve")


@dataclass(frozen=True)
class Side:
    """An encoder of an experiment, under a name that tells it from the other side."""

    name: str
    plan: Plan
    encoder: str


def sides_of(plan: Plan, encoders: Sequence[str] = ()) -> list[Side]:
    """Those encoders of the experiment, all without names; UserError if one is not there or stands there twice."""
    known = [choice.name for choice in plan.experiment.encoders]
    for place, name in enumerate(encoders):
        if name not in known:
            raise UserError(f"experiment '{plan.experiment.name}' has no encoder '{name}'", do="\n".join(
                filter(None, [nearest(name, known), f"its encoders: {', '.join(known)}"])))
        if name in encoders[:place]:
            raise UserError(f"encoder '{name}' is named twice: it would be compared with itself")
    return [Side(name, plan, name) for name in encoders or known]


def pairs_of_two(first: Plan, second: Plan, encoders: Sequence[str] = (),
                 names: tuple[str, str] | None = None) -> list[tuple[Side, Side]]:
    """The encoders that both experiments have, or the only ones; with two names, the first's against the second's.

    `names` of the experiments, if their own do not tell them apart.
    """
    if encoders:
        if len(encoders) != 2:
            raise UserError(f"two experiments are compared by two encoders, not {len(encoders)}",
                            do="--encoders A B: A of the first experiment, B of the second")
        chosen = [(sides_of(first, encoders[:1])[0], sides_of(second, encoders[1:])[0])]
    else:
        own, other = sides_of(first), sides_of(second)
        chosen = [(one, two) for one in own for two in other if one.encoder == two.encoder]
        if not chosen and len(own) == len(other) == 1:
            chosen = [(own[0], other[0])]
    if not chosen:
        raise UserError("the two experiments have no encoder in common", do="name one of each: --encoders A B")
    called = names or (first.experiment.name, second.experiment.name)
    return [_told_apart(pair, called, len(chosen) > 1) for pair in chosen]


def _told_apart(pair: tuple[Side, Side], called: tuple[str, str], are_many: bool) -> tuple[Side, Side]:
    """By the encoder where that differs, else by the experiment; by both where there are several pairs."""
    if pair[0].encoder != pair[1].encoder and not are_many:
        return pair
    first, second = (Side(f"{side.encoder} ({name})" if are_many else name, side.plan, side.encoder)
                     for side, name in zip(pair, called))
    return first, second


def cells_of(side: Side) -> Cells:
    """Everything that the side is scored on; NotReady if something is not."""
    if side.plan.waiting["score"]:
        raise NotReady(f"experiment '{side.plan.experiment.name}' is not scored yet")
    own = [scored for scored in side.plan.scored if scored.encoder == side.encoder]
    for scored in own:
        if not scored.job.artifact.is_complete():
            raise NotReady(f"{side.name} is not scored yet on task {scored.task.name}, pool {scored.pool}")
    return {(scored.task.name, scored.pool): scored for scored in own}


def shared_cells(first: Side, second: Side, metric: str | None) -> tuple[list[tuple[Scored, Scored]], list[str]]:
    """What both were measured on by the same metric; and, in words, what is left out."""
    own, other = cells_of(first), cells_of(second)
    shared, left_out = [], []
    for key in dict.fromkeys([*own, *other]):
        name = f"{key[0]} on {key[1]}"
        if key not in own or key not in other:
            left_out.append(f"{name}: only {(first if key in own else second).name} was measured on it")
        elif missing := _missing_metric((own[key], other[key]), metric):
            left_out.append(f"{name}: {missing} was not measured")
        else:
            shared.append((own[key], other[key]))
    return sorted(shared, key=lambda cells: _place(own, cells[0])), left_out


def _place(own: Cells, cell: Scored) -> tuple[int, int]:
    """Pool by pool, tasks in their order."""
    pools, tasks = list(dict.fromkeys(pool for _, pool in own)), list(dict.fromkeys(task for task, _ in own))
    return pools.index(cell.pool), tasks.index(cell.task.name)


def _missing_metric(cells: tuple[Scored, Scored], metric: str | None) -> str:
    name = metric or str(Metric.parse(cells[0].task.headline))
    return "" if all(name in cell.job.artifact.params.metrics for cell in cells) else name


def other_options(first: Plan, second: Plan) -> list[str]:
    """`key: value of the first, value of the second` for every option that may change a score and is not the same."""
    own, other = (dict(_options(plan.experiment.resolved)) for plan in (first, second))
    return [f"{key}: {own.get(key, 'none')}, {other.get(key, 'none')}" for key in dict.fromkeys([*own, *other])
            if own.get(key) != other.get(key) and key.split(".")[0] in _TOLD]


def _options(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _options(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def refuse_other_data(first: Plan, second: Plan, metric: str | None) -> None:
    """UserError if a task that both have differs in queries, qrels, candidates or, where that matters, depth."""
    own = {(scored.task.name, scored.pool): scored for scored in first.scored}
    for scored in second.scored:
        here = own.get((scored.task.name, scored.pool))
        if here is not None and (differing := _differing(here, scored)):
            raise UserError(f"the experiments differ in the {differing} of task {scored.task.name}, pool {scored.pool}",
                            f"{first.experiment.name} and {second.experiment.name}",
                            "only runs on the same data can be compared")
        name = Metric.parse(metric or scored.task.headline)
        if here is not None and name.k is None:
            _refuse_other_depth(first, second, name)


def _refuse_other_depth(first: Plan, second: Plan, metric: Metric) -> None:
    depths = [plan.experiment.settings.retrieve.depth for plan in (first, second)]
    if depths[0] != depths[1]:
        raise UserError(f"{metric} looks at whole runs, of {depths[0]} and of {depths[1]} candidates per query",
                        "retrieve.depth", f"give it a cutoff, such as {metric}@{min(depths)}, or equal depths")


def _differing(first: Scored, second: Scored) -> str:
    """What is not the same, by content; empty if all is. Pools may have other names."""
    inputs = [dict(scored.job.artifact.identity.inputs) for scored in (first, second)]
    parts = {"queries": "queries", "qrels": "qrels"}
    found = [word for key, word in parts.items() if inputs[0][key] != inputs[1][key]]
    pools = [sorted(digest for key, digest in each.items() if key.startswith("pool ")) for each in inputs]
    return " and ".join([*found, *(["candidates"] if pools[0] != pools[1] else [])])
