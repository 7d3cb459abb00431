"""What the parts of mini M-BEIR hand to each other: the world, a picture, what is shown, what is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Container, Hashable, NamedTuple

import numpy as np
from numpy.typing import NDArray

Key = Hashable
Pool = Container[Key]


class Picture(NamedTuple):
    """A file below the benchmark's root, and how to make it. Equal paths are equal pictures."""

    path: str
    png: Callable[[], bytes]


class Shown(NamedTuple):
    """One side of a pair; the words are all its attributes, for src_content."""

    text: str | None
    picture: Picture | None
    words: dict[str, str]


class Asked(NamedTuple):
    shown: Shown
    wants: tuple[Key, ...]


@dataclass(frozen=True)
class World:
    """The seed, and by split the scans (per digit [N, 8, 8]) of those who write candidates and queries."""

    seed: int
    hands: dict[str, tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]]
