"""LAVIS's extractors end to end on mini M-BEIR: embedded in .venv-lavis, all else here. bash run_tests.sh --lavis"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import Experiment, load
from pipeline.embeddings import read_table
from pipeline.plan import make_plan
from pipeline.run import run_experiment
from pipeline.support.errors import UserError
from tests.lavis import tiny

LAVIS = os.environ.get("PLUMBLINE_LAVIS")
pytestmark = pytest.mark.skipif(LAVIS is None, reason="needs .venv-lavis: bash run_tests.sh --lavis runs this")


def experiment(folder: Path, kind: str, arguments: list[str], **changes: Any) -> Experiment:
    """The quick start with a tiny random extractor of LAVIS's, which has an interpreter of its own."""
    values = {"encoder": "lavis", "python": LAVIS, "kind": f"{kind}_feature_extractor", "seed": 7,
              "architecture": tiny.write_architecture(folder, kind), "tokenizer": str(folder), **changes}
    piece = folder / f"tiny_{kind}.yaml"
    piece.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    return load("quickstart", [f"work_dir={folder}/work", f"encoders=[{piece}]", *arguments])


def silent(*_: Any) -> None:
    pass


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["blip", "blip2"])
def test_all_stages_and_all_kinds_of_tasks(kind: str, tmp_path: Path, small_arguments: list[str]) -> None:
    given = experiment(tmp_path, kind, small_arguments)
    first = run_experiment(given, [], silent)
    jobs = make_plan(given).jobs["embed"]
    assert jobs and all(job.artifact.is_complete() for job in jobs)
    assert len({job.table.fingerprint for job in jobs}) == len(jobs)
    for job in jobs:
        table = read_table(job.artifact.path("embeddings-00000.parquet"), job.artifact.fingerprint)
        vectors_ND = np.stack(table["vector"].to_pylist()).astype(np.float32)
        norms_N = np.linalg.norm(vectors_ND, axis=1)
        assert vectors_ND.shape[1] == 24 and norms_N.min() > 0.1 and norms_N.max() < 2.01  # 1, or a sum of two
        assert len(np.unique(vectors_ND, axis=0)) > 1
    assert first["scores"] == run_experiment(given, [], silent)["scores"] != []


def test_a_broken_environment_is_told_in_a_sentence(tmp_path: Path, small_arguments: list[str]) -> None:
    """This environment's own Python, which has no LAVIS."""
    with pytest.raises(UserError, match="salesforce-lavis cannot be imported by this Python"):
        run_experiment(experiment(tmp_path, "blip", small_arguments, python=sys.executable), [], silent)
    with pytest.raises(UserError, match="bash environment.sh lavis"):
        run_experiment(experiment(tmp_path, "blip", small_arguments, python="nowhere/python"), [], silent)
