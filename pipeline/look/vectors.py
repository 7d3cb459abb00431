"""A query that was typed -> its vector, made as the embed stage makes one.

It goes through the stage's own way: a row of a queries table, the same loading, the same rule for its instruction,
rounded to what is stored. The one difference is the company: it is encoded alone, which may move the last bits
(README). An encoder with an interpreter of its own is started anew for every query.

Shapes: B items, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline.devices import resolve_device
from pipeline.embeddings import write_table
from pipeline.encoders import load_encoder
from pipeline.encoding import Encoding, require, require_modalities, unit_vectors
from pipeline.images import ImageStore
from pipeline.loading import DRAFT, Source, batches
from pipeline.stages import embed
from pipeline.support.elsewhere import yielded_elsewhere
from pipeline.support.errors import UserError
from pipeline.tables import QUERIES, Query, table_of

_USUAL = 64  # prompts that are encoded together


class QueryEncoder:
    """The encoder of an embed job, opened once."""

    def __init__(self, job: embed.Job, device: str):
        self.job, self.device = job, device
        self._folder = TemporaryDirectory()
        self._count = 0
        self._encoding = None if job.python else opened(*self._call)

    @property
    def _call(self) -> tuple[str, Any, str, str]:
        return self.job.module, self.job.encoder_params, self.device, self.job.artifact.params.precision

    @property
    def is_elsewhere(self) -> bool:
        return self._encoding is None

    @property
    def needs_ids(self) -> bool:
        return self._encoding is not None and bool(getattr(self._encoding.encoder, "needs_ids", False))

    def vector(self, row: Mapping[str, Any], rule: str, images: ImageStore) -> np.ndarray:
        """[1, D] of the stored type; `row` has the columns of a queries table. UserError if its image is broken."""
        params = self.job.artifact.params
        self._count += 1  # what was read from a file is remembered by its path
        path, fingerprint = Path(self._folder.name, f"{self._count}.parquet"), f"query {self._count}"
        write_table(path, table_of([Query(**row)], QUERIES), fingerprint)
        source = Source(path, fingerprint, images, rule, params.decoding, path.with_suffix(".none"))
        if self._encoding is not None:
            summed_1D = vector_of(self._encoding, source, row["modality"])
        else:
            summed_1D, = yielded_elsewhere(str(self.job.python), f"{__name__}:opened_for_one", *self._call, source,
                                           row["modality"])
        path.unlink()
        return np.asarray(summed_1D.astype(params.storage))


def opened(module: str, params: Any, device: str, precision: str) -> Encoding:
    return Encoding(load_encoder(module).build(params, resolve_device(device), precision), module, _USUAL)


def opened_for_one(module: str, params: Any, device: str, precision: str, source: Source,
                   modality: str) -> Iterator[np.ndarray]:
    """What another interpreter is asked for."""
    yield vector_of(opened(module, params, device, precision), source, modality)


def vector_of(encoding: Encoding, source: Source, modality: str) -> np.ndarray:
    """float32 [1, D] of a source with one row: under the rule "all" the sum of its prompts' unit vectors."""
    require_modalities(encoding.encoder, encoding.module, [modality], "this query")
    if source.decoding == DRAFT:
        require(encoding.encoder, "image_size", encoding.module, "embed.decoding=exact")
    summed_1D = np.zeros((1, encoding.encoder.dimension), np.float32)
    for batch in batches([source], encoding.encoder, encoding.size, 0, "none"):
        if flaw := next(filter(None, batch.flaws), None):
            raise UserError(f"this image cannot be used: {flaw}", None, "choose another one")
        vectors_BD = encoding.vectors(batch.prepared, batch.digests)
        for vector_D in unit_vectors(vectors_BD) if source.instruction == "all" else vectors_BD:
            summed_1D[0] += vector_D
    return summed_1D
