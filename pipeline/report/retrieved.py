"""Retrieved candidates with their content, one JSON object per query: input for a reader or a generator.

Memory is bounded by a block of hits, whatever the size of the task and of its pools. For each block the
content of its candidates is gathered in one pass over the pools' shards, and lines are put together by
Arrow's string kernels: Python touches each query and each distinct candidate of a block once, never each hit.

Shapes: H hits, Q queries and C distinct candidates of a block, N rows of the qrels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import Artifact, shard_file
from pipeline.embeddings import read_table
from pipeline.loading import choose_prompts
from pipeline.metrics.order import positions, strings
from pipeline.plan import manifest_of
from pipeline.stages.score import Job
from pipeline.support.errors import UserError

HITS_PER_BLOCK = 1_000_000
HITS_PER_WRITE = 50_000
_CONTENT = ("text", "image", "modality")
_SEPARATOR = b", "
_LARGE = pa.large_string()  # a plain string array ends at 2 GiB


class _Block(NamedTuple):
    """Some queries of a task with their hits, both in the order of the task."""

    queries: pa.Table
    hits: pa.Table


class _Content(NamedTuple):
    """JSON of the distinct candidates of a block, without braces, and which of them each hit is."""

    json_C: pa.Array
    place_H: np.ndarray


class _Objects(NamedTuple):
    """JSON objects one after the other, a separator behind each; `start_H` has the end as its last entry."""

    text: bytes
    start_H: np.ndarray


def write_retrieved(job: Job, path: Path, depth: int, instruction: str) -> None:
    """Write {"query": {...}, "candidates": [...]} per query, at most `depth` candidates, best first.

    `instruction` is the rule that queries were encoded under. Each query names the prompt it had, or null;
    under the rule "all" it names the list of them. `relevance` is null where a pair was not judged.
    """
    pools = _Pools(job.pools)
    qrels = read_table(job.task.path("qrels.parquet"), job.task.fingerprint)
    with path.open("wb") as file:
        for block in _blocks(job, depth):
            _write(file, block, pools.content(block.hits), _relevance(block.hits, qrels), instruction)


def _blocks(job: Job, depth: int) -> Iterator[_Block]:
    """Run shards with the query shards they answer, several together up to a number of hits."""
    queries: list[pa.Table] = []
    hits: list[pa.Table] = []
    shards = manifest_of(job.task.directory)["shards"]
    for number, shard in enumerate(shards):
        run = read_table(job.run.path(shard_file("run", number)), job.run.fingerprint)
        hits.append(run.filter(pc.less_equal(run["rank"], depth)))
        queries.append(read_table(job.task.path(shard["file"]), job.task.fingerprint))
        if sum(map(len, hits)) >= HITS_PER_BLOCK or number == len(shards) - 1:
            yield _Block(pa.concat_tables(queries), pa.concat_tables(hits))
            queries, hits = [], []


class _Pools:
    """The candidates of a pool, or of a union's members, by row number over all shards."""

    def __init__(self, pools: Sequence[Artifact]):
        self.shards = [(pool, shard["file"]) for pool in pools
                       for shard in manifest_of(pool.directory)["shards"]]
        columns = [read_table(pool.path(file), pool.fingerprint, ["candidate_id"])["candidate_id"]
                   for pool, file in self.shards]
        self.first_rows = np.cumsum([0, *map(len, columns)])
        self.ids = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())

    def content(self, hits: pa.Table) -> _Content:
        row_H = positions(hits["candidate_id"], self.ids)
        if (row_H < 0).any():
            lost = hits["candidate_id"][int((row_H < 0).argmax())]
            raise UserError(f"candidate {lost} of this run is in none of its pools",
                            do="the pools were collected anew: run `retrieve` again")
        row_C, place_H = np.unique(row_H, return_inverse=True)
        return _Content(pa.chunked_array(self.parts(row_C), _LARGE).combine_chunks(), place_H)

    def parts(self, row_C: np.ndarray) -> Iterator[pa.Array]:
        for (pool, file), first, last in zip(self.shards, self.first_rows, self.first_rows[1:]):
            start, end = np.searchsorted(row_C, [first, last])
            if start < end:
                table = read_table(pool.path(file), pool.fingerprint, _CONTENT)
                rows = table.take(pa.array(row_C[start:end] - first)).to_pylist()
                yield pa.array([_quoted(row)[1:-1] for row in rows], _LARGE)


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _relevance(hits: pa.Table, qrels: pa.Table) -> pa.Array:
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


def _write(file: BinaryIO, block: _Block, content: _Content, relevance: pa.Array, instruction: str) -> None:
    """A few queries at a time: their text is built as a whole."""
    query_H = positions(block.hits["query_id"], strings(block.queries["query_id"]))
    assert (query_H >= 0).all() and (np.diff(query_H) >= 0).all(), "a run stands in the order of its queries"
    hit_Q = np.searchsorted(query_H, np.arange(len(block.queries) + 1))
    start = 0
    while start < len(block.queries):
        end = max(start + 1, int(np.searchsorted(hit_Q, hit_Q[start] + HITS_PER_WRITE, side="right")) - 1)
        first, last = int(hit_Q[start]), int(hit_Q[end])
        contents = content.json_C.take(pa.array(content.place_H[first:last]))
        objects = _objects(block.hits.slice(first, last - first), contents, relevance[first:last])
        byte_Q = objects.start_H[hit_Q[start:end + 1] - first].tolist()
        for row, begin, stop in zip(block.queries.slice(start, end - start).to_pylist(), byte_Q, byte_Q[1:]):
            candidates = objects.text[begin:stop].removesuffix(_SEPARATOR)
            file.write(_head(row, instruction).encode() + candidates + b"]}\n")
        start = end


def _head(row: dict[str, Any], rule: str) -> str:
    prompts = choose_prompts(rule, row["query_id"], len(row["instructions"]))
    chosen = [None if prompt is None else row["instructions"][prompt] for prompt in prompts]
    several = rule == "all" and prompts != [None]
    query = {"query_id": row["query_id"], "text": row["text"], "image": row["image"],
             "modality": row["modality"], "instruction": chosen if several else chosen[0]}
    return f'{{"query": {_quoted(query)}, "candidates": ['


def _objects(hits: pa.Table, contents: pa.Array, relevance: pa.Array) -> _Objects:
    """The JSON object of each hit."""
    ids = strings(hits["candidate_id"]).dictionary_encode()
    quoted = pa.array(map(_quoted, ids.dictionary.to_pylist()), _LARGE).take(ids.indices)
    parts = ['{"candidate_id": ', quoted, ', "rank": ', _text(hits["rank"]), ', "score": ',
             _text(hits["score"]), ', "relevance": ', pc.fill_null(_text(relevance), "null"), ", ", contents,
             "}" + _SEPARATOR.decode()]
    columns = [pa.scalar(part, _LARGE) if isinstance(part, str) else part for part in parts]
    joined = pc.binary_join_element_wise(*columns, pa.scalar("", _LARGE))
    assert joined.offset == 0, "a newly computed array starts at its buffers' start"
    _, offsets, text = joined.buffers()
    start_H = np.frombuffer(offsets, np.int64)[:len(joined) + 1] if len(joined) else np.zeros(1, np.int64)
    return _Objects(text.to_pybytes() if text else b"", start_H)


def _text(numbers: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Numbers as JSON has them; a float32 in the fewest digits that give it again."""
    plain = numbers.combine_chunks() if isinstance(numbers, pa.ChunkedArray) else numbers
    return plain.cast(_LARGE)
