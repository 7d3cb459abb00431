"""Retrieved candidates under UniIR's keys, for programs that expect its `*_retrieved.jsonl`, as UniRAG does.

What our tables do not hold is written as UniIR writes it for data sets without it: `query_src_content` and
`src_content` are null, `neg_cand_list` is empty; `pos_cand_list` comes from the qrels. There are no scores, because
UniIR has none. A layout for others, so it is put together row by row, slower than our own.

Keys: UniIR, src/common/mbeir_retriever.py, `get_raw_retrieved_candidates`; the names of files: `run_retrieval` there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.plan import Scored
from pipeline.report.candidate_pools import CandidatePools
from pipeline.report.json_text import quoted
from pipeline.report.retrieved import CONTENT, blocks, find, qrels_of, stretches
from pipeline.report.uniir import task_number
from pipeline.stages.score import Job
from pipeline.support.errors import UserError

_SINGLE = ("text", "image")


def uniir_name(scored: Scored, split: str, depth: int) -> str:
    """As UniIR names the file of this search."""
    pool = "single_pool" if scored.pool == "local" else f"{scored.pool}_pool"
    return f"mbeir_{scored.task.name}_{pool}_{split}_k{depth}_retrieved.jsonl"


def write_uniir(job: Job, path: Path, depth: int, task: str, complements: Path | None = None,
                compression: str | None = None) -> int:
    """Write {"query", "candidates"} per query; returns how many.

    With `complements`, a file of ours for the same search and depth, also "complement_candidates": as UniIR has
    them, one entry (or null) per candidate of a single modality, so shorter where mixed candidates were found.
    """
    pools, positives, count = CandidatePools.of(job.pools), _positives(job), 0
    partners = _complements(complements) if complements else None
    number = task_number(task)
    with pa.output_stream(path, compression=compression) as file:
        for block in blocks(job, depth):
            found = find(block.hits, pools)
            content = pools.table(found.row_C, CONTENT)
            for stretch in stretches(block):
                ids = block.hits["candidate_id"][stretch.hits].to_pylist()
                rows = content.take(pa.array(found.place_H[stretch.hits])).to_pylist()
                candidates = [_candidate(each, row) for each, row in zip(ids, rows)]
                for row, first, last in zip(stretch.queries, stretch.edges, stretch.edges[1:]):
                    own, query_id = candidates[first:last], row["query_id"]
                    query = _query(row, positives.get(query_id, []), number)
                    line: dict[str, Any] = {"query": query, "candidates": own}
                    if partners is not None:
                        line["complement_candidates"] = _partners(next(partners), query_id, own)
                    file.write(quoted(line).encode() + b"\n")
            count += len(block.queries)
    return count


def _query(row: dict[str, Any], positives: list[str], number: str) -> dict[str, Any]:
    return {"qid": row["query_id"], "query_txt": row["text"], "query_img_path": row["image"],
            "query_modality": row["modality"], "query_src_content": None, "pos_cand_list": positives,
            "neg_cand_list": [], "task_id": int(number) if number else None}


def _candidate(candidate_id: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"txt": row["text"], "img_path": row["image"], "modality": row["modality"], "did": candidate_id,
            "src_content": None}


def _positives(job: Job) -> dict[str, list[str]]:
    qrels = qrels_of(job)
    relevant = qrels.filter(pc.greater(qrels["relevance"], 0))
    found: dict[str, list[str]] = {}
    for query_id, candidate_id in zip(relevant["query_id"].to_pylist(), relevant["candidate_id"].to_pylist()):
        found.setdefault(query_id, []).append(candidate_id)
    return found


def _complements(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        yield from map(json.loads, file)


def _partners(line: dict[str, Any], query_id: str, candidates: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    if line["query_id"] != query_id or line["candidates"] != [candidate["did"] for candidate in candidates]:
        raise UserError("the complements belong to other results", f"query {query_id}", "make them again: complements")
    return [None if partner is None else _candidate(partner["candidate_id"], partner)
            for partner, candidate in zip(line["complements"], candidates) if candidate["modality"] in _SINGLE]
