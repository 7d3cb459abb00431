"""complements/*.jsonl: a line per query and an entry per candidate, as they stand in retrieved_candidates/*.jsonl.

What a line holds is said in report/retrieved.schema.json. Memory is bounded by a block of hits beside the options of
the derived queries (forty bytes each).

Shapes: H hits of a block or stretch, Q queries of a block, C distinct partners of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.complements.partners import Options
from pipeline.metrics.order import positions, strings
from pipeline.report.json_text import LARGE, concatenated, joined, number_text, quoted, quoted_ids
from pipeline.report.retrieved import CONTENT, Block, blocks, stretches
from pipeline.stages.score import Job


def write_complements(job: Job, path: Path, depth: int, sought: Sequence[Options]) -> tuple[int, int]:
    """Write {"query_id", "candidates": [ids], "complements": [object or null]} per query.

    Returns how many candidates there are among the first `depth` of every query, and how many have a partner.
    """
    count, paired = 0, 0
    with path.open("wb") as file:
        for block in blocks(job, depth):
            entries = pa.nulls(len(block.hits), LARGE)
            for options in sought:
                found_H = _chosen(block, options)
                entries = pc.coalesce(_entries(options, found_H), entries)
                paired += int((found_H >= 0).sum())
            entries, count = pc.fill_null(entries, "null"), count + len(block.hits)
            ids = quoted_ids(block.hits["candidate_id"])
            for stretch in stretches(block):
                complements = joined(entries[stretch.hits]).lists(stretch.edges)
                candidates = joined(ids[stretch.hits]).lists(stretch.edges)
                for row, own, partners in zip(stretch.queries, candidates, complements):
                    head = f'{{"query_id": {quoted(row["query_id"])}, "candidates": ['.encode()
                    file.write(head + own + b'], "complements": [' + partners + b"]}\n")
    return count, paired


def _chosen(block: Block, options: Options) -> np.ndarray:
    query_H = positions(block.hits["query_id"], strings(block.queries["query_id"]))
    return options.chosen(block.hits["candidate_id"], query_H, block.queries[options.seeks])


def _entries(options: Options, found_H: np.ndarray) -> pa.Array:
    """JSON of the partner of each hit, null where there is none."""
    option_C, place_H = np.unique(found_H[found_H >= 0], return_inverse=True)
    row_C, content_of_C = np.unique(options.row_O[option_C], return_inverse=True)
    contents = [quoted(row)[1:-1] for part in options.pools.parts(row_C, CONTENT) for row in part.to_pylist()]
    content_C = pa.array(contents, LARGE).take(pa.array(content_of_C))
    ids = options.pools.ids.take(pa.array(options.row_O[option_C]))
    objects = concatenated([
        '{"candidate_id": ', quoted_ids(ids), ', "rank": ', number_text(pa.array(options.rank_O[option_C])),
        ', "score": ', number_text(pa.array(options.score_O[option_C])), ", ", content_C, "}"])
    index_H = np.full(len(found_H), -1)
    index_H[found_H >= 0] = place_H
    return objects.take(pa.array(index_H, mask=index_H < 0))
