"""`results`: retrieved candidates at any depth, as JSON Lines, as parquet or under UniIR's keys, compressed if asked.

What `export` writes at the end of `run` is one case of it. Files appear whole or not at all; nothing is computed
again, so writing once more is the way to another depth.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.artifacts import atomic_path, write_json
from pipeline.config import Experiment
from pipeline.plan import Plan, Scored, make_plan
from pipeline.report.retrieved import write_retrieved
from pipeline.report.retrieved_parquet import write_parquet
from pipeline.report.retrieved_uniir import uniir_name, write_uniir
from pipeline.support.errors import NotReady, UserError, nearest

FORMATS = ("jsonl", "parquet", "uniir")
COMPRESSIONS = {"gzip": ".gz", "zstd": ".zst"}
FOLDER, UNIIR = "retrieved_candidates", "uniir"
COMPLEMENTS = {"plumbline": "complements", "unirag": "complements_unirag"}  # folders, by the rule that selects


@dataclass(frozen=True)
class Cells:
    """Which searches of an experiment are meant: empty is all of them."""

    encoders: Sequence[str] = ()
    tasks: Sequence[str] = ()
    pools: Sequence[str] = ()

    def of(self, plan: Plan) -> list[Scored]:
        """NotReady if one of them is not retrieved yet; UserError if a name is not in the experiment."""
        for name, chosen, known in (("encoder", self.encoders, {cell.name for cell in plan.experiment.encoders}),
                                    ("task", self.tasks, {task.name for task in plan.experiment.tasks}),
                                    ("pool", self.pools, set(plan.experiment.settings.pools))):
            for each in chosen:
                if each not in known:
                    raise UserError(f"the experiment has no {name} '{each}'", plan.experiment.name, "\n".join(
                        filter(None, [nearest(each, known), f"all: {', '.join(sorted(known))}"])))
        if any(plan.waiting.values()):
            raise NotReady(f"experiment {plan.experiment.name} has not been run")
        cells = [cell for cell in plan.scored if self._has(cell)]
        if missing := [stem(cell) for cell in cells if not cell.job.run.is_complete()]:
            raise NotReady(f"{len(missing)} searches are not done, such as {missing[0]}: run the experiment first")
        return cells

    def _has(self, cell: Scored) -> bool:
        pairs = (self.encoders, cell.encoder), (self.tasks, cell.task.name), (self.pools, cell.pool)
        return all(not chosen or own in chosen for chosen, own in pairs)


class Written(NamedTuple):
    path: Path
    queries: int


def stem(cell: Scored) -> str:
    return f"{cell.encoder}.{cell.task.name}.{cell.pool}"


def checked_depth(experiment: Experiment, depth: int | None) -> int:
    """The depth asked for, or that of the exports; UserError if runs do not go so deep."""
    chosen, most = depth or experiment.settings.export.depth, experiment.settings.retrieve.depth
    if depth is not None and not 1 <= depth <= most:
        raise UserError(f"depth {depth} is not from 1 to {most}, the candidates that runs keep", experiment.name,
                        f"set retrieve.depth={max(depth, 1)} and run again")
    return min(chosen, most)


def write_results(experiment: Experiment, cells: Cells, depth: int | None, layout: str,
                  compression: str | None) -> Iterator[Written]:
    """Write a file per search below retrieval_results/ and say how many queries it holds.

    `depth` None is export.depth; `layout` is one of FORMATS, `compression` one of COMPRESSIONS or None. A file of
    another depth has it in its name: it stands beside that of `export`.
    """
    depth, plan = checked_depth(experiment, depth), make_plan(experiment)
    write_config(experiment)
    for cell in cells.of(plan):
        path = result_path(experiment, cell, layout, compression, depth)
        with atomic_path(path) as temporary:
            rows = _write(experiment, cell, temporary, depth, layout, compression)
        yield Written(path, rows)


def write_config(experiment: Experiment) -> None:
    """Beside the results, once: it tells a reader where their images are."""
    path = experiment.directory / "config.yaml"
    if not path.exists():
        experiment.write(path)


def result_path(experiment: Experiment, cell: Scored, layout: str, compression: str | None, depth: int) -> Path:
    results, suffix = experiment.directory / "retrieval_results", COMPRESSIONS[compression] if compression else ""
    if layout == "uniir":
        return results / UNIIR / cell.encoder / (uniir_name(cell, experiment.benchmark.split, depth) + suffix)
    ending = ".parquet" if layout == "parquet" else f".jsonl{suffix}"
    return results / FOLDER / (_name(experiment, cell, depth) + ending)


def complements_path(experiment: Experiment, cell: Scored, depth: int, rule: str = "plumbline") -> Path:
    return experiment.directory / "retrieval_results" / COMPLEMENTS[rule] / f"{_name(experiment, cell, depth)}.jsonl"


def record_artifacts(experiment: Experiment, complements: Path, labels: Iterable[str]) -> None:
    """Write down what a file of complements needs beside the experiment's plan: `gc` keeps it while the file is there.
    """
    name = f"{complements.parent.name}.{complements.stem}.json"
    record = {"file": str(complements.relative_to(experiment.directory)), "artifacts": sorted(labels)}
    write_json(experiment.directory / "complements" / name, record)


def artifacts_of_complements(experiment: Experiment) -> set[str]:
    """The labels of what the complements that are there need beside the experiment's plan."""
    records = (json.loads(path.read_text()) for path in (experiment.directory / "complements").glob("*.json"))
    return {label for record in records if (experiment.directory / record["file"]).exists()
            for label in record["artifacts"]}


def _name(experiment: Experiment, cell: Scored, depth: int) -> str:
    return stem(cell) + ("" if depth == checked_depth(experiment, None) else f".k{depth}")


def _write(experiment: Experiment, cell: Scored, path: Path, depth: int, layout: str, compression: str | None) -> int:
    rule = experiment.settings.embed.instruction
    if layout == "uniir":
        known = [complements_path(experiment, cell, depth, selection) for selection in ("unirag", "plumbline")]
        complements = next((each for each in known if each.exists()), None)
        return write_uniir(cell.job, path, depth, cell.task.name, complements, compression)
    write = write_parquet if layout == "parquet" else write_retrieved
    return write(cell.job, path, depth, rule, compression)
