"""Options of a training: `Params` may change the weights, `Runtime` only how and where the work is done.

Another chunk size, number of processes or device moves the last bits of sums, as it does for embeddings; a
training that is resumed with the same ones repeats itself bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Optional

from pipeline import artifacts

REPEATS = ("union_train", "once")
POOLS = ("union", "local")
INSTRUCTIONS = ("random", "none")


@dataclass(frozen=True)
class Params(artifacts.Params):
    """The values and their meanings stand in configs/base.yaml."""

    epochs: float
    batch_size: int
    learning_rate: float
    fusion_learning_rate: float
    weight_decay: float
    betas: List[float]
    epsilon: float
    warmup: float
    clip_norm: Optional[float]
    symmetric: bool
    max_scale: Optional[float]
    hard_negatives: int
    instruction: str
    repeats: str
    rows: Dict[str, int]
    same_task: int
    start: Optional[str]
    precision: str
    seed: int


@dataclass(frozen=True)
class Runtime(artifacts.Runtime):
    chunk_size: int
    cached_gradients: bool
    gradient_checkpointing: bool
    loaders: int
    device: str
    max_flawed: int
    log_every: int
    save_every: int
    keep: int
    validate_every: int
    validation_tasks: List[str]
    validation_pool: str
