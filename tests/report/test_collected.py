"""Rows of collected tables are those of the tables read whole, one after the other."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import Experiment
from pipeline.embeddings import read_table
from pipeline.plan import make_plan, manifest_of
from pipeline.report.candidate_pools import CandidatePools
from pipeline.report.collected import Collected, located
from pipeline.support.errors import UserError


def test_rows_are_found_by_number_and_by_id(quick_run: Experiment) -> None:
    pools = next(cell for cell in make_plan(quick_run).scored if cell.pool == "union").job.pools
    whole = [row for pool in pools for shard in manifest_of(pool.directory)["shards"]
             for row in read_table(pool.path(shard["file"]), pool.fingerprint).to_pylist()]
    collected = Collected(located(*pools), "candidate_id")
    assert len(collected) == len(whole) and len(collected.shards) > len(pools) > 2
    chosen = np.unique(np.random.default_rng(0).integers(0, len(whole), 60))
    assert [row for part in collected.parts(chosen) for row in part.to_pylist()] == [whole[row] for row in chosen]
    names = [whole[row]["candidate_id"] for row in chosen]
    assert collected.rows_by_id([*names, "nobody"]) == dict(zip(names, chosen.tolist()))
    assert [len(part.column_names) for part in collected.parts(chosen[:1], ["text", "image"])] == [2]
    assert list(collected.parts(np.array([], np.int64))) == [] and collected.rows_by_id([]) == {}


def test_pools_hold_their_ids_and_name_the_first_that_is_lost(quick_run: Experiment) -> None:
    pools = make_plan(quick_run).scored[0].job.pools
    found = CandidatePools.of(pools)
    assert found is CandidatePools.of(pools)
    assert np.array_equal(found.rows_of(found.ids), np.arange(len(found)))
    with pytest.raises(UserError, match="candidate lost of this run is in none"):
        found.rows_of(pa.array([found.ids[0].as_py(), "lost"]))
