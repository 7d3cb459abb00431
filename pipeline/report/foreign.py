"""Score any TREC run file against any qrels file, whoever made them.

The run is ordered by its scores, never by its rank column, as trec_eval does. The mean is over all queries of
the qrels, as with trec_eval's option -c: a query without hits counts 0. Hits of queries that the qrels do not
name cannot be judged; they are left out, and the log says of how many.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.metrics.order import Ties
from pipeline.metrics.ranking import Metric, evaluate, judge, order_run
from pipeline.report.trec import read_trec_qrels, read_trec_run
from pipeline.support.errors import UserError

log = logging.getLogger("pipeline")

DEFAULT_METRICS = ("map", "mrr", "ndcg@10", "precision@10", "recall@10", "hit@10")


def score_run(run_file: str | Path, qrels_file: str | Path, metrics: Sequence[str] | None = None,
              ties: Ties = "candidate_id ascending", per_query: bool = False) -> str:
    """Lines `metric <tab> query_id or "all" <tab> value` with four decimals, the means last.

    UserError: a file that is malformed or empty, a metric that is not known, a candidate twice under a query,
    a run and qrels that have no query in common.
    """
    chosen = [Metric.parse(name) for name in metrics or DEFAULT_METRICS]
    qrels, run = read_trec_qrels(qrels_file), read_trec_run(run_file)
    for table, path in ((qrels, qrels_file), (run, run_file)):
        if not len(table):
            raise UserError("this file has no lines", str(path))
    query_ids = pc.unique(qrels["query_id"])
    run = _judged_only(run, query_ids, run_file)
    values = evaluate(judge(order_run(run, ties), qrels, query_ids), list(dict.fromkeys(chosen)))
    return "\n".join([*(_per_query(values, query_ids) if per_query else ()), *_means(values)])


def _judged_only(run: pa.Table, query_ids: pa.Array, run_file: str | Path) -> pa.Table:
    kept = run.filter(pc.is_in(run["query_id"], value_set=query_ids))
    if not len(kept):
        raise UserError("no query of this run is in the qrels", str(run_file),
                        "both files must be of one task")
    lost = pc.count_distinct(run["query_id"]).as_py() - pc.count_distinct(kept["query_id"]).as_py()
    if lost:
        log.warning("%s: %d queries without qrels are left out", run_file, lost)
    return kept


def _per_query(values: Mapping[str, np.ndarray], query_ids: pa.Array) -> Iterator[str]:
    for position, query_id in enumerate(query_ids.to_pylist()):
        yield from (f"{name}\t{query_id}\t{values_Q[position]:.4f}" for name, values_Q in values.items())


def _means(values: Mapping[str, np.ndarray]) -> Iterator[str]:
    for name, values_Q in values.items():
        yield f"{name}\tall\t{np.mean(values_Q):.4f}"
