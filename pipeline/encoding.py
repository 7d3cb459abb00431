"""From prepared items to vectors: equal items once, and no more at a time than fits into memory.

An item that was encoded lends its vector to those of the same digest, until that is forgotten: the least recently
used go first, when the vectors fill MAX_BYTES. A batch that is too large for a device is halved, with a warning, and
so are those after it. The trade: like another batch size, either may change the last digits of a vector.
"""

# Shapes: B items, D dimensions.

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from pipeline.encoders import Encoder, Item
from pipeline.support.errors import UserError

log = logging.getLogger("pipeline")

MAX_BYTES = 512 * 2**20  # of vectors that are remembered: 170,000 of 768 dimensions
USUAL_BATCH, LARGEST_BATCH = 64, 1024


class Encoding:
    """An encoder with a memory. `module` is the encoder's name in messages; `size` how many items it is given at once.

    `num_encoded` counts the items that the encoder has really encoded.
    """

    def __init__(self, encoder: Encoder, module: str, size: int, max_bytes: int = MAX_BYTES):
        self.encoder, self.module, self.size = encoder, module, size
        self.num_encoded = 0
        self._most = max(1, max_bytes // (4 * encoder.dimension))
        self._known: OrderedDict[Any, np.ndarray] = OrderedDict()

    def forget(self) -> None:
        self._known.clear()

    def vectors(self, batch: Sequence[Any], digests: Sequence[bytes | None]) -> np.ndarray:
        """float32 [B, D], one row per prepared item in order; items without a digest are like no other."""
        names = [number if digest is None else digest for number, digest in enumerate(digests)]
        found = {name: self._recalled(name) for name in names if name in self._known}
        fresh: dict[Any, Any] = {}
        for name, item in zip(names, batch):
            if name not in found:
                fresh.setdefault(name, item)  # of equal items the first
        found.update(zip(fresh, self._encoded(list(fresh.values()))))
        self._known.update((name, found[name].copy()) for name in fresh if isinstance(name, bytes))
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        return np.stack([found[name] for name in names])

    def _recalled(self, digest: Any) -> np.ndarray:
        self._known.move_to_end(digest)
        return self._known[digest]

    def _encoded(self, items: list[Any]) -> np.ndarray:
        parts, start = [np.zeros((0, self.encoder.dimension), np.float32)], 0
        while start < len(items):
            part = items[start:start + self.size]
            if (vectors_BD := without_exhaustion(lambda: self.encoder.encode(part))) is None:
                self._halve(len(part))
                continue
            self._check(vectors_BD, len(part))
            parts.append(vectors_BD)
            start += len(part)
        self.num_encoded += len(items)
        return np.concatenate(parts)

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise UserError("one item alone does not fit into the memory of the device", self.module,
                            "use another device, a smaller encoder, or embed.precision=bf16")
        self.size = tried // 2
        log.warning("out of memory at %d items: %s goes on with batches of %d", tried, self.module, self.size)

    def _check(self, vectors_BD: np.ndarray, count: int) -> None:
        if vectors_BD.shape != (count, self.encoder.dimension):
            what = f"the encoder returned shape {vectors_BD.shape} for {count} items"
            raise UserError(f"{what}, its dimension is {self.encoder.dimension}", self.module,
                            "encode returns float32 [B, D]: see pipeline/encoders/__init__.py")


def require(encoder: Encoder, name: str, module: str, otherwise: str) -> None:
    """UserError unless the encoder has what its protocol leaves to it."""
    if not hasattr(encoder, name):
        raise UserError(f"this encoder has no `{name}`", module,
                        f"see pipeline/encoders/__init__.py, or set {otherwise}")


def require_modalities(encoder: Encoder, module: str, needed: Iterable[str], table: str) -> None:
    """UserError unless the encoder takes every modality that the table has."""
    lacking = sorted(set(needed) - encoder.modalities)
    if lacking:
        takes = ", ".join(map(repr, sorted(encoder.modalities)))
        raise UserError(f"encoder {module} does not take '{lacking[0]}', which {table} has",
                        do=f"it takes: {takes}; choose other tasks or pools")


def without_exhaustion(run: Callable[[], np.ndarray]) -> np.ndarray | None:
    """What `run` returns; None if the device had too little memory, which is then as free as before."""
    import torch
    try:
        return run()
    except torch.OutOfMemoryError:
        pass  # the error holds the frames whose tensors fill the memory: they go first
    torch.cuda.empty_cache()
    return None


def batch_size(asked: int | str, encoder: Encoder, device: str) -> int:
    """As asked; `auto` is 64 on a CPU, elsewhere the largest power of two that fits and that still helps."""
    import torch
    if asked != "auto":
        return int(asked)
    if torch.device(device).type != "cuda" or not getattr(encoder, "uses_device", True):
        return USUAL_BATCH
    found = fitting_batch(encoder)
    log.info("embed.batch_size=auto: %d", found)
    return found


def fitting_batch(encoder: Encoder) -> int:
    """From 64 to 1,024, doubled as long as as many of the largest items fit, twice: memory fragments."""
    item = encoder.prepare(_largest(encoder))
    size = USUAL_BATCH
    while size < LARGEST_BATCH:
        if without_exhaustion(lambda: encoder.encode([item] * (4 * size))) is None:
            break
        size *= 2
    return size


def _largest(encoder: Encoder) -> Item:
    """An item with all that the encoder takes, a text as long as any among it."""
    from PIL import Image
    kinds = encoder.modalities
    has_image = "image" in kinds or "image,text" in kinds
    has_text = "image,text" in kinds or not has_image
    text = " ".join(["words"] * 2048) if has_text else None
    return Item(text, Image.new("RGB", (1024, 1024)) if has_image else None, bare_text=text)


def unit_vectors(vectors_BD: np.ndarray) -> np.ndarray:
    """Each vector divided by its norm; zero stays zero."""
    norms_B1 = np.linalg.norm(vectors_BD, axis=1, keepdims=True)
    return np.asarray(vectors_BD / np.where(norms_B1 > 0, norms_B1, 1))
