"""Retrieved candidates as parquet: one row per query, its candidates a list of structs, best first.

The same content as the JSON Lines of retrieved.py; only the prompts of a query are always a list (`instructions`),
because a column has one type. A row group is a few thousand queries, so that readers stream as this writer does.

Shapes: H hits of a stretch.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.report.candidate_pools import CandidatePools
from pipeline.report.retrieved import CONTENT, Stretch, blocks, find, prompts_of, qrels_of, relevance_of, stretches
from pipeline.stages.score import Job

_TEXT = pa.string()
CANDIDATE = pa.struct([
    ("candidate_id", _TEXT), ("rank", pa.int32()), ("score", pa.float32()), ("relevance", pa.int32()),
    ("text", _TEXT), ("image", _TEXT), ("modality", _TEXT)])
SCHEMA = pa.schema([
    ("query_id", _TEXT), ("text", _TEXT), ("image", _TEXT), ("modality", _TEXT), ("instructions", pa.list_(_TEXT)),
    ("candidates", pa.list_(CANDIDATE))])


def write_parquet(job: Job, path: Path, depth: int, instruction: str, compression: str | None = None) -> int:
    """The arguments and the result of `write_retrieved`; `compression` is parquet's own, of pages."""
    pools, qrels, count = CandidatePools.of(job.pools), qrels_of(job), 0
    with pq.ParquetWriter(path, SCHEMA, compression=compression or "snappy") as writer:
        for block in blocks(job, depth):
            found = find(block.hits, pools)
            content, relevance = pools.table(found.row_C, CONTENT), relevance_of(block.hits, qrels)
            for stretch in stretches(block):
                own = content.take(pa.array(found.place_H[stretch.hits]))
                candidates = _candidates(block.hits[stretch.hits], own, relevance[stretch.hits])
                writer.write_table(_rows(stretch, candidates, instruction))
            count += len(block.queries)
    return count


def _candidates(hits: pa.Table, content: pa.Table, relevance: pa.Array) -> pa.Array:
    columns = [hits["candidate_id"], hits["rank"], hits["score"], relevance, *content.columns]
    flat = [column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column for column in columns]
    return pa.StructArray.from_arrays([column.cast(field.type) for column, field in zip(flat, CANDIDATE)],
                                      fields=list(CANDIDATE))


def _rows(stretch: Stretch, candidates: pa.Array, instruction: str) -> pa.Table:
    lists = pa.ListArray.from_arrays(pa.array(stretch.edges, pa.int32()), candidates)
    queries = [pa.array([row[name] for row in stretch.queries], _TEXT) for name in SCHEMA.names[:4]]
    prompts = pa.array([prompts_of(row, instruction) for row in stretch.queries], SCHEMA.field("instructions").type)
    return pa.Table.from_arrays([*queries, prompts, lists], schema=SCHEMA)
