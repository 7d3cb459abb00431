"""Queries scored per second, ours and pytrec_eval's, on the same random run.

    python -m tests.speed.bench_score [--queries 20000] [--depth 100] [--relevant 3] [--repetitions 5]

Ours is timed from Arrow tables to values per query (joining included); pytrec_eval from dictionaries that
are already built: the time this took is given apart. One JSON line; medians of alternating repetitions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytrec_eval

from pipeline.metrics.ranking import Metric, evaluate, judge
from pipeline.tables import QRELS, RUN

METRICS = {"success_5": "hit@5", "recall_10": "recall@10", "P_10": "precision@10", "recip_rank": "mrr",
           "map": "map", "ndcg_cut_10": "ndcg@10"}
MEASURES = {"success.5", "recall.10", "P.10", "recip_rank", "map", "ndcg_cut.10"}


def random_run(num_queries: int, depth: int, rng: np.random.Generator) -> pa.Table:
    """Strides through a pool of a million: no candidate twice under one query, no tied scores."""
    first_Q1 = rng.integers(1_000_000, size=(num_queries, 1))
    candidate_QK = (first_Q1 + 7919 * np.arange(depth)) % 1_000_000
    columns = {
        "query_id": pa.array(np.repeat(np.arange(num_queries), depth)).cast(pa.string()),
        "rank": pa.array(np.tile(np.arange(1, depth + 1, dtype=np.int32), num_queries)),
        "candidate_id": pa.array(candidate_QK.ravel()).cast(pa.string()),
        "score": pa.array(np.tile(np.linspace(1, 0, depth, dtype=np.float32), num_queries)),
    }
    return pa.table(columns).cast(RUN)


def random_qrels(run: pa.Table, num_queries: int, relevant: int, rng: np.random.Generator) -> pa.Table:
    """Graded judgements, about half of them of candidates that were retrieved."""
    query = np.repeat(np.arange(num_queries), relevant)
    depth = run.num_rows // num_queries
    hit = query * depth + rng.integers(depth, size=len(query))
    retrieved = run.column("candidate_id").take(pa.array(hit))
    is_lost = pa.array(rng.random(len(query)) < 0.5)
    lost = pa.array(rng.integers(1_000_000, 2_000_000, len(query))).cast(pa.string())
    candidate_id = pc.if_else(is_lost, lost, retrieved)
    columns = [pa.array(query).cast(pa.string()), candidate_id, pa.array(rng.integers(0, 3, len(query)))]
    return pa.table(columns, names=QRELS.names).cast(QRELS)


def nested(table: pa.Table, value: str) -> dict[str, dict[str, Any]]:
    """{query_id: {candidate_id: value}}; of a pair that is judged twice the higher counts, as in `judge`."""
    result: dict[str, dict[str, Any]] = {}
    columns = (table.column(name).to_pylist() for name in ("query_id", "candidate_id", value))
    for query_id, candidate_id, number in zip(*columns):
        entry = result.setdefault(query_id, {})
        entry[candidate_id] = max(number, entry.get(candidate_id, number))
    return result


def measure(num_queries: int, depth: int, relevant: int, repetitions: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    run = random_run(num_queries, depth, rng)
    qrels = random_qrels(run, num_queries, relevant, rng)
    query_ids = pa.array(range(num_queries)).cast(pa.string())
    begin = time.perf_counter()
    run_lookup, qrels_lookup = nested(run, "score"), nested(qrels, "relevance")
    lookup_seconds = time.perf_counter() - begin
    metrics = [Metric.parse(name) for name in METRICS.values()]
    ours_seconds, theirs_seconds = [], []
    for _ in range(repetitions):
        begin = time.perf_counter()
        ours = evaluate(judge(run, qrels, query_ids), metrics)
        middle = time.perf_counter()
        theirs = pytrec_eval.RelevanceEvaluator(qrels_lookup, MEASURES).evaluate(run_lookup)
        ours_seconds.append(middle - begin)
        theirs_seconds.append(time.perf_counter() - middle)
    difference = max(
        float(np.abs(ours[name] - [theirs[query_id][trec_name] for query_id in query_ids.to_pylist()]).max())
        for trec_name, name in METRICS.items())
    ours_median, theirs_median = statistics.median(ours_seconds), statistics.median(theirs_seconds)
    return {"benchmark": "score", "queries": num_queries, "depth": depth, "qrels": qrels.num_rows,
            "ours_queries_per_s": round(num_queries / ours_median),
            "pytrec_eval_queries_per_s": round(num_queries / theirs_median),
            "pytrec_eval_dictionaries_s": round(lookup_seconds, 3),
            "ratio": round(theirs_median / ours_median, 2), "max_difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description="Queries scored per second, ours and pytrec_eval's.")
    for name, default in [("queries", 20_000), ("depth", 100), ("relevant", 3), ("repetitions", 5)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    print(json.dumps(measure(options.queries, options.depth, options.relevant, options.repetitions)))


if __name__ == "__main__":
    main()
