"""Retrieved candidates with their content, one JSON object per query: input for a reader or a generator.

Memory is bounded by a block of hits, whatever the size of the task and of its pools. For each block the
content of its candidates is gathered in one pass over the pools' shards, and lines are put together by
Arrow's string kernels: Python touches each query and each distinct candidate of a block once, never each hit.
What a line holds is said in retrieved.schema.json.

Shapes: H hits, Q queries and C distinct candidates of a block, N rows of the qrels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import shard_file
from pipeline.embeddings import read_table
from pipeline.loading import choose_prompts
from pipeline.metrics.order import positions, strings
from pipeline.plan import manifest_of
from pipeline.report.candidate_pools import CandidatePools
from pipeline.report.json_text import LARGE, concatenated, joined, number_text, quoted, quoted_ids
from pipeline.stages.score import Job

HITS_PER_BLOCK = 1_000_000
HITS_PER_WRITE = 50_000
CONTENT = ("text", "image", "modality")


class Block(NamedTuple):
    """Some queries of a task with their hits, both in the order of the task."""

    queries: pa.Table
    hits: pa.Table


class Stretch(NamedTuple):
    """Consecutive queries of a block, the numbers of their hits, and where among these each query's begin [Q + 1]."""

    queries: list[dict[str, Any]]
    hits: slice
    edges: np.ndarray


class Found(NamedTuple):
    """Distinct candidates of a block as rows of the pools, and which of them each hit is."""

    row_C: np.ndarray
    place_H: np.ndarray


def write_retrieved(job: Job, path: Path, depth: int, instruction: str, compression: str | None = None) -> int:
    """Write {"query": {...}, "candidates": [...]} per query, at most `depth` candidates, best first; returns how many.

    `instruction` is the rule that queries were encoded under. Each query names the prompt it had, or null;
    under the rule "all" it names the list of them. `relevance` is null where a pair was not judged. `compression`
    is "gzip", "zstd" or nothing.
    """
    pools, qrels, count = CandidatePools.of(job.pools), qrels_of(job), 0
    with pa.output_stream(path, compression=compression) as file:
        for block in blocks(job, depth):
            found = find(block.hits, pools)
            contents = [_content(row) for part in pools.parts(found.row_C, CONTENT) for row in part.to_pylist()]
            content_C, relevance = pa.array(contents, LARGE), relevance_of(block.hits, qrels)
            for stretch in stretches(block):
                content = content_C.take(pa.array(found.place_H[stretch.hits]))
                objects = _objects(block.hits[stretch.hits], content, relevance[stretch.hits])
                for row, candidates in zip(stretch.queries, joined(objects).lists(stretch.edges)):
                    file.write(_head(row, instruction).encode() + candidates + b"]}\n")
            count += len(block.queries)
    return count


def qrels_of(job: Job) -> pa.Table:
    return read_table(job.task.path("qrels.parquet"), job.task.fingerprint)


def blocks(job: Job, depth: int) -> Iterator[Block]:
    """Run shards with the query shards they answer, several together up to a number of hits."""
    queries: list[pa.Table] = []
    hits: list[pa.Table] = []
    shards = manifest_of(job.task.directory)["shards"]
    for number, shard in enumerate(shards):
        run = read_table(job.run.path(shard_file("run", number)), job.run.fingerprint)
        hits.append(run.filter(pc.less_equal(run["rank"], depth)))
        queries.append(read_table(job.task.path(shard["file"]), job.task.fingerprint))
        if sum(map(len, hits)) >= HITS_PER_BLOCK or number == len(shards) - 1:
            yield Block(pa.concat_tables(queries), pa.concat_tables(hits))
            queries, hits = [], []


def find(hits: pa.Table, pools: CandidatePools) -> Found:
    return Found(*np.unique(pools.rows_of(hits["candidate_id"]), return_inverse=True))


def stretches(block: Block) -> Iterator[Stretch]:
    """The queries of a block, a few at a time: what is written of them is built as a whole."""
    query_H = positions(block.hits["query_id"], strings(block.queries["query_id"]))
    assert (query_H >= 0).all() and (np.diff(query_H) >= 0).all(), "a run stands in the order of its queries"
    hit_Q = np.searchsorted(query_H, np.arange(len(block.queries) + 1))
    start = 0
    while start < len(block.queries):
        end = max(start + 1, int(np.searchsorted(hit_Q, hit_Q[start] + HITS_PER_WRITE, side="right")) - 1)
        first, last = int(hit_Q[start]), int(hit_Q[end])
        rows = block.queries.slice(start, end - start).to_pylist()
        yield Stretch(rows, slice(first, last), hit_Q[start:end + 1] - first)
        start = end


def relevance_of(hits: pa.Table, qrels: pa.Table) -> pa.Array:
    """int32 [H]: the highest relevance that the pair was judged to have; null if it was not judged."""
    queries, candidates = pc.unique(hits["query_id"]), pc.unique(hits["candidate_id"])
    pair_H, pair_N = (_pairs(table, queries, candidates) for table in (hits, qrels))
    relevance_N = qrels["relevance"].to_numpy()
    order = np.lexsort((relevance_N, pair_N))
    # Of equal pairs the last is judged highest.
    place_H = np.searchsorted(pair_N[order], pair_H, side="right") - 1
    row_H = order[np.maximum(place_H, 0)]
    is_judged_H = (place_H >= 0) & (pair_N[row_H] == pair_H)
    return pa.array(relevance_N[row_H], pa.int32(), mask=~is_judged_H)


def _pairs(table: pa.Table, queries: pa.Array, candidates: pa.Array) -> np.ndarray:
    """int64: one number per (query, candidate); -1 where one of them is not among the hits."""
    query, candidate = positions(table["query_id"], queries), positions(table["candidate_id"], candidates)
    pair = query.astype(np.int64) * len(candidates) + candidate
    return np.where((query < 0) | (candidate < 0), -1, pair)


def prompts_of(row: dict[str, Any], rule: str) -> list[str]:
    """The prompts that this query was encoded under."""
    chosen = choose_prompts(rule, row["query_id"], len(row["instructions"]))
    return [row["instructions"][prompt] for prompt in chosen if prompt is not None]


def _head(row: dict[str, Any], rule: str) -> str:
    prompts = prompts_of(row, rule)
    several = rule == "all" and prompts
    query = {"query_id": row["query_id"], "text": row["text"], "image": row["image"], "modality": row["modality"],
             "instruction": prompts if several else next(iter(prompts), None)}
    return f'{{"query": {quoted(query)}, "candidates": ['


def _content(row: dict[str, Any]) -> str:
    """JSON of a candidate's content without its braces."""
    return quoted(row)[1:-1]


def _objects(hits: pa.Table, content: pa.Array, relevance: pa.Array) -> pa.Array:
    """The JSON object of each hit."""
    return concatenated([
        '{"candidate_id": ', quoted_ids(hits["candidate_id"]), ', "rank": ', number_text(hits["rank"]), ', "score": ',
        number_text(hits["score"]), ', "relevance": ', pc.fill_null(number_text(relevance), "null"), ", ", content,
        "}"])
