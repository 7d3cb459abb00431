"""Which answers an experiment asks for: one cell of its table, or a file of ready messages, and what they cost.

Promise: the artifact is named by the model, by how messages are made and by the content of what they are made from, so
other candidates or another prompt never mix with answers that are there. The trade: a file of messages is hashed whole.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, Identity, file_sha256
from pipeline.config import Experiment
from pipeline.generation import answers
from pipeline.generation.answers import Job
from pipeline.generation.model import Model
from pipeline.generation.questions import Asking, from_file, from_results
from pipeline.plan import Plan, Scored, manifest_of
from pipeline.support.errors import NotReady, UserError
from pipeline.support.rows import text_lines

log = logging.getLogger("pipeline")


def chosen_cell(plan: Plan, encoder: str | None, task: str | None, pool: str | None) -> Scored:
    """The one cell of the experiment's table with these names; UserError if there is none, or several."""
    wanted = {"encoder": encoder, "task": task, "pool": pool}
    cells = [cell for cell in plan.scored
             if all(name in (None, found) for name, found in zip(wanted.values(), _names(cell)))]
    if len(cells) == 1:
        return cells[0]
    if not plan.scored:
        raise NotReady("the experiment is not collected yet: python -m pipeline run EXPERIMENT")
    listed = "\n".join("--encoder {} --task {} --pool {}".format(*_names(cell)) for cell in (cells or plan.scored)[:8])
    raise UserError("several results fit; choose one" if cells else "no result has these names", None, listed)


def _names(cell: Scored) -> tuple[str, str, str]:
    return cell.encoder, cell.task.name, cell.pool


def from_cell(experiment: Experiment, cell: Scored, model: Model, asking: Asking) -> Job:
    """Ask about each query of a cell, from its exported candidates; NotReady while they are not exported."""
    stem, folder = ".".join(_names(cell)), experiment.directory / "retrieval_results"
    path, complements = (folder / name / f"{stem}.jsonl" for name in ("retrieved_candidates", "complements"))
    if not path.is_file():
        raise NotReady(f"{path} is not there: python -m pipeline export EXPERIMENT (with jsonl among export.formats)")
    if asking.style != "question" and asking.top and not complements.is_file():
        log.warning("there are no complements of these results: only candidates with image and text are shown "
                    "(python -m pipeline complements)")
    depth = experiment.settings.export.depth
    if asking.top < 0 or asking.top > depth:
        raise UserError(f"{asking.top} candidates cannot be shown", "--top",
                        f"0 to {depth}, as many as were exported (export.depth)")
    tables = (cell.job.task, *cell.job.pools)
    sizes = " ".join(manifest_of(table.directory)["image_sizes"] for table in tables)
    inputs = {"results": file_sha256(path), "images": sha256(sizes.encode()).hexdigest(),
              **({"complements": file_sha256(complements)} if complements.is_file() else {})}
    artifact = _artifact(experiment, stem, model, asking.as_json(), inputs)
    questions = partial(from_results, path, experiment.images, asking)
    return Job(artifact, questions, manifest_of(cell.job.task.directory)["rows"])


def from_messages(experiment: Experiment, path: Path, model: Model) -> Job:
    """Send each line's messages as they stand."""
    if not path.is_file():
        raise UserError(f"there is no file {path}", "--messages")
    artifact = _artifact(experiment, path.stem, model, {}, {"messages": file_sha256(path)})
    return Job(artifact, partial(from_file, path), sum(1 for _ in text_lines(path)))


def _artifact(experiment: Experiment, name: str, model: Model, messages: Mapping[str, Any],
              inputs: Mapping[str, str]) -> Artifact[answers.Params]:
    identity = Identity(answers.STAGE, answers.VERSION, model.params(messages), inputs)
    return Artifact(experiment.directory, f"{name}.{model.slug}", identity)


def cost_of(manifest: Mapping[str, Any], price_input: float | None, price_output: float | None) -> float | None:
    """In the currency of the prices, which are per million tokens; None without a price."""
    if price_input is None and price_output is None:
        return None
    total = manifest["prompt_tokens"] * (price_input or 0) + manifest["completion_tokens"] * (price_output or 0)
    return float(total) / 1e6
