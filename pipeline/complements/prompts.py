"""Which prompts a candidate is given when it asks: those of a task of the benchmark that has its direction.

UniIR's own choice is MSCOCO, whose prompts ask for everyday pictures and captions; it is ours where the benchmark has
it. Elsewhere the first task of each direction gives them, or those that the user names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.benchmarks import Task, load_adapter
from pipeline.complements.asking import DIRECTIONS, Direction
from pipeline.config import Experiment
from pipeline.support.errors import UserError, nearest

Prompts = dict[Direction, tuple[str, ...]]
_PREFERRED = "mscoco_"


def prompts_for(experiment: Experiment, named: Sequence[str], only_mscoco: bool) -> Prompts:
    """Prompts by direction, empty where the experiment encodes without instructions or no task has the direction.

    UserError: a named task is not in the benchmark or has neither direction; `only_mscoco` and there is none of it.
    """
    if experiment.settings.embed.instruction == "none":
        return {direction: () for direction in DIRECTIONS}
    tasks = _chosen(experiment, named)
    if only_mscoco and not named:
        tasks = [task for task in tasks if task.name.startswith(_PREFERRED)]
    found: Prompts = {}
    for task, direction, prompts in _asked(experiment, tasks):
        if direction in DIRECTIONS:
            found.setdefault(direction, prompts)
        elif named:
            raise UserError(f"task {task.name} leads from {direction.asks} to {direction.seeks or 'anything'}", None,
                            "name tasks from text to image and from image to text")
    if only_mscoco and len(found) < len(DIRECTIONS):
        raise UserError("UniRAG's prompts are those of MSCOCO, which this benchmark has not in both directions",
                        experiment.benchmark.name, "name the tasks whose prompts stand for them: --prompts TASK TASK")
    return {direction: found.get(direction, ()) for direction in DIRECTIONS}


def _chosen(experiment: Experiment, named: Sequence[str]) -> list[Task]:
    tasks = {task.name: task for task in experiment.benchmark.tasks}
    for name in named:
        if name not in tasks:
            raise UserError(f"benchmark {experiment.benchmark.name} has no task '{name}'", "--prompts",
                            nearest(name, tasks))
    return [tasks[name] for name in named] or sorted(
        tasks.values(), key=lambda task: not task.name.startswith(_PREFERRED))


def _asked(experiment: Experiment, tasks: Sequence[Task]) -> Iterator[tuple[Task, Direction, tuple[str, ...]]]:
    """Every task with what its first query says."""
    adapter = load_adapter(experiment.benchmark.adapter)
    for task in tasks:
        first = next(adapter.queries(experiment.benchmark, task), None)
        if first is not None:
            sought = adapter.candidate_modality(experiment.benchmark, task) or ""
            yield task, Direction(first.modality, sought), tuple(first.instructions)
