"""`complements`: plan the derived tasks of every search asked for, run what is missing of them, write the files.

Each step is for all searches at once, so that an encoder is loaded once and a pool is read once. What is on disk is
not made again; several workers may run the same command with shares of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pipeline import artifacts
from pipeline.artifacts import Artifact, Identity, atomic_path
from pipeline.complements.asking import DIRECTIONS, asking
from pipeline.complements.partners import PLUMBLINE, UNIRAG, UNIRAG_TOP, Options
from pipeline.complements.prompts import Prompts, prompts_for
from pipeline.complements.reuse import Derived, Stored, embed_job
from pipeline.complements.writing import write_complements
from pipeline.config import Experiment
from pipeline.plan import MODULES, Plan, Scored, make_plan, manifest_of
from pipeline.report.candidate_pools import CandidatePools
from pipeline.report.results import Cells, Written, checked_depth, complements_path, record_artifacts, write_config
from pipeline.run import describe
from pipeline.stages import embed, retrieve
from pipeline.support.errors import UserError
from pipeline.support.progress import follow
from pipeline.workers import Outcome, Share, run_stage, runtime_of

SAME = "same"

Say = Callable[..., Any]


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    depth      candidates per query that get a partner; None: export.depth
    partners   where partners are sought: "local", "union" or a name under `unions`; "same": where the candidate is from
    rule       one of partners.RULES; UniRAG's searches where the candidate is from, whatever `partners` says
    reuse      one of reuse.REUSE
    prompts    tasks whose prompts are taken; empty: see prompts.py
    """

    cells: Cells
    depth: int | None = None
    partners: str = "union"
    rule: str = PLUMBLINE
    reuse: str = "measured"
    prompts: Sequence[str] = ()


class _Asked(NamedTuple):
    """A direction of a search with the pools it searches: their collected tables, and what `retrieve` needs of them."""

    derived: Derived
    pools: tuple[Artifact, ...]
    members: tuple[retrieve.Member, ...]
    params: retrieve.Params


def make_complements(experiment: Experiment, wanted: Wanted, say: Say, share: Share = Share()) -> list[Written]:
    """Write complements of the searches asked for; NotReady where one is not done, UserError for names not known."""
    _check_partners(experiment, wanted.partners)
    depth = checked_depth(experiment, wanted.depth)
    prompts = prompts_for(experiment, wanted.prompts, wanted.rule == UNIRAG)
    own = make_plan(experiment)
    cells, plan = wanted.cells.of(own), _with_partners(experiment, wanted, say)
    write_config(experiment)
    directions = [each for cell in cells for each in _directions(plan, cell, wanted, prompts, depth)]
    asked = [each for each in directions if each.derived.collect() and each.members]
    jobs, samples = _embedded(experiment, asked, wanted.reuse, say, share)
    runs = {each.derived.table.label: _search(each, jobs[each.derived.table.label]) for each in asked}
    say(describe(_run(experiment, "retrieve", list(runs.values()), share)))
    pools = {artifact.label for artifact in plan.artifacts()} - {artifact.label for artifact in own.artifacts()}
    for cell in cells:
        derived = {label for each in directions if each.derived.cell is cell for label in _used(each, samples, runs)}
        record_artifacts(experiment, complements_path(experiment, cell, depth, wanted.rule), pools | derived)
    return [_write(experiment, cell, asked, runs, depth, wanted.rule, say) for cell in cells]


def _with_partners(experiment: Experiment, wanted: Wanted, say: Say) -> Plan:
    """The plan with the pools in which partners are sought; they are embedded where no search needed them yet."""
    pools = list(dict.fromkeys([*experiment.settings.pools, *_partner_pool(wanted)]))
    tasks = list(wanted.cells.tasks) or experiment.settings.tasks
    if pools == experiment.settings.pools:
        return make_plan(experiment)
    wider = replace(experiment, settings=replace(experiment.settings, pools=pools, tasks=tasks))
    for stage in ("collect", "embed", "index"):
        say(describe(run_stage(wider, stage)))
    return make_plan(wider)


def _check_partners(experiment: Experiment, name: str) -> None:
    known = (SAME, "local", "union", *experiment.settings.unions)
    if name not in known:
        raise UserError(f"partners cannot be sought in '{name}'", "--partners", f"one of: {', '.join(known)}")


def _partner_pool(wanted: Wanted) -> list[str]:
    return [] if wanted.rule == UNIRAG or wanted.partners == SAME else [wanted.partners]


def _directions(plan: Plan, cell: Scored, wanted: Wanted, prompts: Prompts, depth: int) -> Iterator[_Asked]:
    pool = next(iter(_partner_pool(wanted)), cell.pool)
    searched = next(other for other in plan.scored
                    if (other.encoder, other.task.name, other.pool) == (cell.encoder, cell.task.name, pool))
    members, own = _run_job(plan, searched).members, _run_job(plan, cell)
    stored = Stored.of(cell, [member.embeddings for member in own.members])
    pool_jobs = {job.artifact.label: job for job in plan.jobs["embed"]}
    like, settings = pool_jobs[own.members[0].embeddings.label], plan.experiment.settings
    params = replace(own.artifact.params, depth=UNIRAG_TOP if wanted.rule == UNIRAG else settings.retrieve.depth)
    for direction in DIRECTIONS:
        table = asking(cell, direction, depth, prompts[direction], settings.collect.rows_per_shard)
        chosen = [(artifact, member) for artifact, member in zip(searched.job.pools, members)
                  if wanted.rule == UNIRAG or manifest_of(artifact.directory)["modalities"].get(direction.seeks)]
        yield _Asked(Derived(cell, direction, table, _as_query(like, table.name, settings.embed.instruction), stored),
                     tuple(artifact for artifact, _ in chosen), tuple(member for _, member in chosen), params)


def _run_job(plan: Plan, cell: Scored) -> retrieve.Job:
    return next(job for job in plan.jobs["retrieve"] if job.artifact.label == cell.job.run.label)


def _as_query(job: embed.Job, name: str, rule: str) -> embed.Job:
    """The encoder of a pool's job for queries, under the experiment's rule for instructions; its table is to come."""
    identity = replace(job.artifact.identity, params=replace(job.artifact.params, instruction=rule))
    return replace(job, artifact=replace(job.artifact, name=name, identity=identity))


def _embedded(experiment: Experiment, asked: Sequence[_Asked], reuse: str, say: Say,
              share: Share) -> tuple[dict[str, embed.Job], dict[str, embed.Job]]:
    """The finished embed job of each derived table and, where one was needed, of its sample, by the table's label."""
    hopeful = [each.derived for each in asked if reuse != "never" and each.derived.may_reuse]
    needed = [derived for derived in hopeful if reuse == "measured" or derived.prompts]
    samples = {derived.table.label: derived.sample() for derived in needed}
    _run(experiment, "embed", list(samples.values()), share)
    jobs: dict[str, embed.Job] = {}
    for derived in hopeful:
        sample = samples.get(derived.table.label)
        if reuse == "always" or (sample is not None and derived.agrees(sample)):
            jobs[derived.table.label] = derived.reused(sample)
    anew = {each.derived.table.label: embed_job(each.derived.job, each.derived.table, each.derived.job.artifact.name)
            for each in asked if each.derived.table.label not in jobs}
    rows = sum(manifest_of(job.table.directory)["rows"] for job in jobs.values())
    say(f"{'reuse':<9}  {rows:>9,} vectors were there, in {len(jobs)} of {len(asked)} derived tasks")
    jobs.update(anew)
    say(describe(_run(experiment, "embed", list(jobs.values()), share)))
    return jobs, samples


def _search(each: _Asked, queries: embed.Job) -> retrieve.Job:
    inputs = {"queries": queries.artifact.fingerprint, **dict(map(retrieve.Member.as_input, each.members))}
    identity = Identity("retrieve", retrieve.VERSION, each.params, inputs)
    artifact = Artifact(queries.artifact.root, each.derived.table.name, identity)
    return retrieve.Job(artifact, queries.artifact, len(queries.shards), each.members)


def _run(experiment: Experiment, stage: str, jobs: Sequence[Any], share: Share) -> Outcome:
    """What `run_stage` does, for jobs that are in no experiment's plan."""
    module, runtime, plan, outcome = MODULES[stage], runtime_of(experiment, stage), Plan(experiment), Outcome(stage)
    started = time.monotonic()
    for job in jobs:
        artifacts.sweep_temporaries(job.artifact.directory)
    work = [(job, unit) for job in jobs for unit in plan.missing_units(job, stage)]
    own, others = work[share.number::share.of], [pair for number, pair in enumerate(work)
                                                 if number % share.of != share.number]
    for landed in follow(stage, module.make(own + others[::-1], runtime), len(work)):
        outcome.made, outcome.rows = outcome.made + 1, outcome.rows + landed.rows
    for job in jobs:
        if not job.artifact.is_complete():
            job.artifact.seal(module.facts(job, runtime))
    outcome.found = sum(len(module.units(job)) for job in jobs) - outcome.made
    outcome.seconds = time.monotonic() - started
    return outcome


def _used(each: _Asked, samples: Mapping[str, embed.Job], runs: Mapping[str, retrieve.Job]) -> Iterator[str]:
    """The labels of the derived artifacts of a direction."""
    label = each.derived.table.label
    yield label
    if label in samples:
        yield from (samples[label].table.label, samples[label].artifact.label)
    if label in runs:
        yield from (runs[label].queries.label, runs[label].artifact.label)


def _write(experiment: Experiment, cell: Scored, asked: Sequence[_Asked], runs: Mapping[str, retrieve.Job], depth: int,
           rule: str, say: Say) -> Written:
    own = [each for each in asked if each.derived.cell is cell]
    options = [Options.of(runs[each.derived.table.label].artifact, CandidatePools.of(each.pools),
                          each.derived.direction.seeks, rule) for each in own]
    path = complements_path(experiment, cell, depth, rule)
    with atomic_path(path) as temporary:
        count, paired = write_complements(cell.job, temporary, depth, options)
    say(f"{paired:,} of {count:,} candidates have a partner   {path}")
    return Written(path, manifest_of(cell.job.task.directory)["rows"])
