"""A finished run as one table, for tests that compare runs."""

from __future__ import annotations

import pyarrow as pa

from pipeline.artifacts import Artifact
from pipeline.stages.score import run_tables
from pipeline.tables import RUN


def run_table(artifact: Artifact) -> pa.Table:
    """All shards of a run, its ids as plain strings."""
    return pa.concat_tables(table.cast(RUN) for table in run_tables(artifact))
