"""What can a search of this pool answer? Counted before anything is encoded, from ids and qrels alone.

Public benchmarks hold surprises: relevant candidates that are not in the pool, queries that no search can answer.
For a fixed run they cap every metric; the cap (`ceiling`) belongs beside the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.metrics.ranking import Metric, best_possible, evaluate
from pipeline.support.errors import UserError

_NAMED = 20


def audit(query_ids: pa.ChunkedArray, qrels: pa.Table, candidate_ids: pa.ChunkedArray,
          metrics: Sequence[str], depth: int) -> dict[str, Any]:
    """Counts and ceilings for one task and one pool (or union of pools).

    `ceiling[metric]` is the mean over queries of the best value that any run of this depth over this pool could reach.
    """
    known = pc.is_in(qrels["query_id"], value_set=query_ids)
    unknown = qrels.filter(pc.invert(known))
    qrels = qrels.filter(known)
    reachable = pc.is_in(qrels["candidate_id"], value_set=candidate_ids).to_numpy(zero_copy_only=False)
    relevant = pc.greater(qrels["relevance"], 0).to_numpy(zero_copy_only=False)
    answerable = qrels["query_id"].filter(pa.array(reachable & relevant))
    lost = query_ids.filter(pc.invert(pc.is_in(query_ids, value_set=answerable)))
    best_run = best_possible(qrels, reachable, query_ids, min(depth, len(candidate_ids)))
    best = evaluate(best_run, [Metric.parse(name) for name in metrics])
    return {
        "queries": len(query_ids), "candidates": len(candidate_ids), "qrels": len(qrels),
        "relevant": int(relevant.sum()), "relevant_outside_pool": int((relevant & ~reachable).sum()),
        "qrels_of_unknown_queries": len(unknown),
        "unanswerable_queries": {"count": len(lost), "first": lost.slice(0, _NAMED).to_pylist()},
        "ceiling": {name: float(np.mean(values)) for name, values in best.items()},
    }


def refuse_duplicates(candidate_ids: pa.ChunkedArray) -> None:
    """UserError if an id stands in two members of a union (within one pool there is none: collect has seen to it)."""
    if pc.count_distinct(candidate_ids).as_py() == len(candidate_ids):
        return
    counts = pc.value_counts(candidate_ids)
    twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    raise UserError(f"{len(twice)} candidate ids stand in more than one pool of this union", f"first: {twice[0]}",
                    "a union needs ids that are unique over its pools")
