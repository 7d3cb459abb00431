"""The one cell of an experiment that is looked at: an encoder, a task, the pool that it searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.config import Experiment, load
from pipeline.plan import Scored, make_plan
from pipeline.stages import embed, retrieve
from pipeline.support.errors import NotReady, UserError, nearest


@dataclass(frozen=True)
class Cell:
    """`pools` are the members of the searched pool, in the order in which a search numbers their rows."""

    experiment: Experiment
    scored: Scored
    search: retrieve.Job
    queries: embed.Job
    pools: tuple[embed.Job, ...]


def choose(name: str, overrides: Sequence[str], task: str, pool: str | None, encoder: str | None) -> Cell:
    """The cell of these names; the first pool and encoder of the experiment where none is named.

    UserError with the nearest names if there is none of that name; NotReady while its tables are not collected.
    """
    chosen = [f"tasks=[{task}]", *([] if pool is None else [f"pools=[{pool}]"])]
    experiment = _with_encoder(load(name, [*overrides, *chosen]), encoder)
    plan = make_plan(experiment)
    if not plan.scored:
        raise NotReady(f"the tables of {task} are not collected: python -m pipeline collect {name}")
    scored = plan.scored[0]
    search = next(job for job in plan.jobs["retrieve"] if job.artifact == scored.job.run)
    embedded = {job.artifact.label: job for job in plan.jobs["embed"]}
    members = sorted(search.members, key=lambda member: member.embeddings.name)
    pools = tuple(embedded[member.embeddings.label] for member in members)
    return Cell(experiment, scored, search, embedded[search.queries.label], pools)


def _with_encoder(experiment: Experiment, name: str | None) -> Experiment:
    by_name = {choice.name: choice for choice in experiment.encoders}
    if name is not None and name not in by_name:
        advice = (nearest(name, by_name), f"all: {', '.join(by_name)}", "another one: encoders=[NAME]")
        raise UserError(f"experiment {experiment.name} has no encoder '{name}'", None, "\n".join(filter(None, advice)))
    return replace(experiment, encoders=(by_name[name] if name else experiment.encoders[0],))
