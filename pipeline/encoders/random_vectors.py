"""A baseline that knows nothing: a random vector for every content, the same for equal contents.

What a score of a benchmark means is seen beside what chance reaches. Promises: the vector follows from seed, text and
pixels alone, on every machine and in any order. The trade: a query and a candidate of the same content match exactly,
so where a benchmark's pools hold the queries themselves this is above chance, as it is for every encoder.
"""

# Shapes: B items, D dimensions.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import numpy as np

from pipeline.encoders import Item
from pipeline.support.errors import UserError


@dataclass(frozen=True)
class Params:
    """All that may change the vectors.

    dimension: of the vectors
    seed:      another number, other vectors
    """

    dimension: int = 256
    seed: int = 0


def identity(params: Params) -> dict[str, Any]:
    """What the fingerprint sees; numpy's release too, whose normal numbers may change from one to the next."""
    if params.dimension < 1:
        raise UserError(f"dimension is {params.dimension}; it must be at least 1")
    return {"dimension": params.dimension, "seed": params.seed, "numpy": version("numpy")}


def build(params: Params, device: str, precision: str) -> RandomVectors:
    """The encoder; device and precision change nothing."""
    identity(params)  # the same mistakes are refused with or without a plan
    return RandomVectors(params)


class RandomVectors:
    """Standard normal numbers, drawn by a generator that the item's content seeds."""

    modalities = frozenset({"text", "image", "image,text"})
    uses_device = False

    def __init__(self, params: Params):
        self.dimension, self._seed = params.dimension, params.seed

    def prepare(self, item: Item) -> bytes:
        """32 bytes: the sha256 of seed, text (none and "" are the same) and pixels."""
        total = sha256(f"{self._seed};".encode())
        text = (item.text or "").encode("utf-8", "surrogatepass")
        total.update(f"{len(text)};".encode() + text)
        if item.image is not None:
            total.update(f"{item.image.size};".encode() + item.image.convert("RGB").tobytes())
        return total.digest()

    def encode(self, batch: Sequence[bytes]) -> np.ndarray:
        """float32 [B, D], one row per prepared item in order, not normalised."""
        rows = [np.zeros((0, self.dimension), np.float32), *(self._drawn(digest)[None] for digest in batch)]
        return np.concatenate(rows)

    def _drawn(self, digest: bytes) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        return generator.standard_normal(self.dimension, np.float32)
