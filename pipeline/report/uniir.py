"""The result in UniIR's table of nine columns, so that its readers and scripts find what they know.

One line per task, metric and union. UniIR's "Recall@k" is this project's hit@k and is printed under UniIR's
name; what is called recall here becomes "SetRecall@k", so that the two cannot be mistaken. Unlike UniIR's own
files they have their lines also when only a union was searched, and end with the average over tasks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pipeline.config import Experiment
from pipeline.metrics.ranking import Metric
from pipeline.report.rows import ScoreRow, average

COLUMNS = ("TaskID", "Task", "Dataset", "Split", "Metric", "CandPool", "Value", "UnionPool", "UnionValue")
README = """These files have the nine columns of UniIR's result tables; values are fractions.

Recall@k     hit@k: share of the queries with a relevant candidate among the first k.
             UniIR and M-BEIR print this number under the name Recall@k.
SetRecall@k  recall@k: share of the relevant candidates that was found among the first k.
others       under the names this project uses everywhere.

CandPool and Value are of the task's own pool, UnionPool and UnionValue of a union of pools; a pair is
empty where that search was not part of the experiment. The last line of a file is the unweighted average
of the tasks' headline metrics, which its Metric column names.
"""


def result_table(rows: Sequence[ScoreRow], experiment: Experiment) -> str:
    """The table of one encoder's rows, header included."""
    assert len({row.encoder for row in rows}) == 1, "one table per encoder"
    lines = [COLUMNS, *_task_lines(rows, experiment), *_averages(rows, experiment)]
    return "".join("\t".join(line) + "\n" for line in lines)


def metric_name(name: str) -> str:
    """`hit@5` as UniIR prints it."""
    metric = Metric.parse(name)
    foreign = {"hit": "Recall", "recall": "SetRecall"}.get(metric.name, metric.name)
    return str(Metric(foreign, metric.k))


def task_number(task: str) -> str:
    """`7` of `cirr_task7`; empty if the name has no such end."""
    found = re.search(r"_task(\d+)$", task)
    return found[1] if found else ""


def _task_lines(rows: Sequence[ScoreRow], experiment: Experiment) -> Iterator[tuple[str, ...]]:
    pools = {task.name: task.pool for task in experiment.tasks}
    for task in dict.fromkeys(row.task for row in rows):
        own = {row.pool: row for row in rows if row.task == task}
        first = next(iter(own.values()))
        for name in first.metrics:
            for union in _unions(list(own)):
                yield (task_number(task), first.kind, task, experiment.benchmark.split, metric_name(name),
                       *_cell(own.get("local"), name, pools[task]), *_cell(own.get(union), name, union))


def _unions(pools: Sequence[str]) -> list[str]:
    """Every union that was searched gets lines of its own; "" where only local pools were."""
    return [pool for pool in pools if pool != "local"] or [""]


def _cell(row: ScoreRow | None, metric: str, pool: str) -> tuple[str, str]:
    return (pool, f"{row.metrics[metric].mean:.4f}") if row else ("", "")


def _averages(rows: Sequence[ScoreRow], experiment: Experiment) -> Iterator[tuple[str, ...]]:
    headlines = ",".join(dict.fromkeys(metric_name(row.headline) for row in rows))
    count = len({row.task for row in rows})
    for union in _unions(list(dict.fromkeys(row.pool for row in rows))):
        local, joint = ([row for row in rows if row.pool == pool] for pool in ("local", union))
        yield ("", "", f"average of {count} tasks", experiment.benchmark.split, headlines,
               *(("local", f"{average(local):.4f}") if local else ("", "")),
               *((union, f"{average(joint):.4f}") if joint else ("", "")))
