"""On a CUDA device: the same hits to the last bit, and the same vectors up to rounding. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.cli import main
from pipeline.config import Experiment, load
from pipeline.embeddings import EmbeddingStore
from pipeline.indexes import exact_search, id_order
from pipeline.plan import make_plan
from pipeline.workers import run_stage
from tests.indexes.oracle import blocks_of, statistics_of, true_hits
from tests.test_train import Training

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def device() -> None:
    import torch
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")


pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("coarse", ["auto", "float32", "float16"])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_search_finds_what_brute_force_finds(coarse: str, spread: float) -> None:
    """A spread of 1e-3 puts all vectors into a narrow cone, where a bound that is too tight would lose hits."""
    pool_ND = (1 + spread * RANDOM.standard_normal((5000, 64))).astype(np.float16)
    queries_QD = (1 + spread * RANDOM.standard_normal((40, 64))).astype(np.float16)
    ids = [f"x:{row}" for row in range(len(pool_ND))]
    hits = exact_search(queries_QD, blocks_of(pool_ND, ids, 900), id_order(pa.array(ids)), 20, statistics_of(pool_ND),
                        device="cuda", coarse=coarse)
    rows_QK, scores_QK = true_hits(queries_QD, pool_ND, ids, 20)
    assert np.array_equal(hits.rows_QK, rows_QK) and np.array_equal(hits.scores_QK, scores_QK)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 0.05), ("fp16", 0.01)])
def test_vectors_equal_those_of_the_cpu(quick_run: Experiment, small_arguments: list[str], tmp_path: Path,
                                        precision: str, tolerance: float) -> None:
    """Largest difference of a component, relative to the norm of its vector."""
    arguments = [f"work_dir={tmp_path}", *small_arguments, f"embed.precision={precision}", "embed.device=cuda"]
    experiment = load("quickstart", arguments)
    for stage in ("collect", "embed"):
        run_stage(experiment, stage)
    on_cpu = {job.artifact.name: job.artifact for job in make_plan(quick_run).jobs["embed"]}
    for job in make_plan(experiment).jobs["embed"]:
        pairs = zip(EmbeddingStore.of(job.artifact).blocks(), EmbeddingStore.of(on_cpu[job.artifact.name]).blocks())
        for ours, theirs in pairs:
            expected_ND = theirs.vectors_ND.astype(np.float32)
            norms_N1 = np.linalg.norm(expected_ND, axis=1, keepdims=True)
            assert ours.ids == theirs.ids
            assert (np.abs(ours.vectors_ND.astype(np.float32) - expected_ND) / norms_N1).max() < tolerance


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 0.2), ("fp16", 0.1)])
@pytest.mark.parametrize("cached", ["true", "false"])
def test_training_learns_what_it_learns_on_the_cpu(tmp_path: Path, mini_data: Path, precision: str, tolerance: float,
                                                   cached: str) -> None:
    """Losses of the first steps; the difference grows as small ones do in any training."""
    losses = []
    for device in ("cpu", "cuda"):
        training = Training(tmp_path / device, mini_data)
        more = [f"training.device={device}", f"training.precision={precision if device == 'cuda' else 'fp32'}",
                f"training.cached_gradients={cached}", "training.gradient_checkpointing=true", "training.epochs=0.1"]
        assert main(training.command(*more)) == 0
        losses.append(training.losses())
    assert losses[1] == pytest.approx(losses[0], abs=tolerance)
