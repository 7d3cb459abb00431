"""embed: one shard of a queries or candidates table -> one shard of embeddings.

Shards are a property of the data, so any number of workers, now or after a kill, makes the same files. All shards
of one encoder form one stream: weights load once, and the loaders never run dry between two shards. A broken image
is a value (`flaw`): its item is encoded from its text alone, or as the zero vector, whose score with everything is
0; more of them than `max_flawed` and the shard is not written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import artifacts
from pipeline.artifacts import Artifact, shard_file, shard_number
from pipeline.devices import resolve_device
from pipeline.embeddings import read_table, shard_facts, write_shard
from pipeline.encoders import Encoder, load_encoder
from pipeline.images import Flaw, ImageStore
from pipeline.loading import Batch, Source, batches, keys_of, num_loaders
from pipeline.support.errors import UserError
from pipeline.support.progress import Landed

VERSION = 1
RULES = ("none", "first", "hashed", "all")
PRECISIONS = ("fp32", "bf16", "fp16")
STORAGES = ("float16", "float32")


@dataclass(frozen=True)
class Params(artifacts.Params):
    """`encoder` is the identity its module gives; `instruction` is "" for candidates, which never have one."""

    encoder: dict[str, Any]
    precision: str
    storage: str
    instruction: str


@dataclass(frozen=True)
class Runtime(artifacts.Runtime):
    batch_size: int
    loaders: int
    device: str
    max_flawed: int


@dataclass(frozen=True)
class Job:
    artifact: Artifact[Params]
    table: Artifact
    module: str
    encoder_params: Any
    images: ImageStore

    @property
    def encoder(self) -> tuple[str, Any, str]:
        """Module, parameters and precision: jobs that share them share one encoder in memory."""
        return self.module, self.encoder_params, self.artifact.params.precision

    @property
    def shards(self) -> list[dict[str, Any]]:
        return list(_shards_of(self.table.directory))

    def rows_of(self, unit: str) -> int:
        return int(self.shards[shard_number(unit)]["rows"])

    def source(self, unit: str) -> Source:
        shard = self.shards[shard_number(unit)]["file"]
        return Source(self.table.path(shard), self.table.fingerprint, self.images, self.artifact.params.instruction,
                      self.artifact.path(unit))


@lru_cache(maxsize=256)
def _shards_of(directory: Path) -> tuple[dict[str, Any], ...]:
    return tuple(artifacts.read_manifest(directory)["shards"])


def units(job: Job) -> list[str]:
    return [shard_file("embeddings", number) for number in range(len(job.shards))]


def facts(job: Job, runtime: Runtime) -> dict[str, Any]:
    """Rows, dimension and flaws of the whole; UserError if shards disagree or flaws exceed what is tolerated."""
    found = [shard_facts(job.artifact.path(unit), job.artifact.fingerprint) for unit in units(job)]
    for unit, shard, source in zip(units(job), found, job.shards):
        if shard.rows != source["rows"] or shard.dimension != found[0].dimension:
            has = f"{unit} has {shard.rows} rows of dimension {shard.dimension}"
            raise UserError(f"{has}, not {source['rows']} of {found[0].dimension}", str(job.artifact.directory),
                            f"delete it and run again: rm {job.artifact.path(unit)}")
    by_unit = {unit: _flaws_in(job, unit) for unit in units(job)}
    flaws = [flaw for found_flaws in by_unit.values() for flaw in found_flaws]
    if len(flaws) > runtime.max_flawed:
        files = " ".join(str(job.artifact.path(unit)) for unit, found_flaws in by_unit.items() if found_flaws)
        error = _too_many(flaws, runtime.max_flawed)
        raise UserError(error.what, do=f"{error.do}\nif they are mended already, have them encoded again: rm {files}")
    return {"rows": sum(shard.rows for shard in found), "dimension": found[0].dimension,
            "flaws": {"count": len(flaws), "first": flaws[:20]}}


def accept(job: Job, runtime: Runtime) -> None:
    """Finished embeddings may have been made when more flaws were tolerated than now."""
    flaws = job.artifact.manifest()["flaws"]
    if flaws["count"] > runtime.max_flawed:
        subject, listed = job.artifact.name, "\n".join(flaws["first"][:5])
        raise UserError(f"{subject}: {flaws['count']} items have a broken image, {runtime.max_flawed} tolerated", do=(
            f"{listed}\ntolerate them with embed.max_flawed={flaws['count']}, or mend the images and then: "
            f"rm -r {job.artifact.directory}"))


def _flaws_in(job: Job, unit: str) -> list[str]:
    table = read_table(job.artifact.path(unit), job.artifact.fingerprint, ["id", "flaw"])
    flawed = table.filter(table["flaw"].is_valid())
    return [f"{row['id']}: {row['flaw']}" for row in flawed.to_pylist()]


def _too_many(flaws: Sequence[str], tolerated: int) -> UserError:
    more = f"\n... and {len(flaws) - 10} more" if len(flaws) > 10 else ""
    return UserError(f"{len(flaws)} items have a broken image, {tolerated} tolerated", do=(
        "\n".join(flaws[:10]) + more + f"\nmend the images, or tolerate them with embed.max_flawed={len(flaws)}; "
        "shards with more than the tolerated number were not written, everything else stays"))


def make(work: Sequence[tuple[Job, str]], runtime: Runtime) -> Iterator[Landed]:
    for _, group in groupby(work, key=lambda pair: pair[0].encoder):
        yield from _embed_with_one_encoder(list(group), runtime)


def _embed_with_one_encoder(work: list[tuple[Job, str]], runtime: Runtime) -> Iterator[Landed]:
    module, params, precision = work[0][0].encoder
    encoder = load_encoder(module).build(params, resolve_device(runtime.device), precision)
    for job in {job.artifact.label: job for job, _ in work}.values():
        _check_modalities(job, encoder)
    refused: list[str] = []
    shards: dict[int, _Shard] = {}
    sources = [job.source(unit) for job, unit in work]
    loaders = num_loaders(runtime.loaders, sum(job.rows_of(unit) for job, unit in work))
    for batch in batches(sources, encoder, runtime.batch_size, loaders):
        if batch.position not in shards:
            shards[batch.position] = _Shard(*work[batch.position], encoder.dimension)
        shard = shards[batch.position]
        shard.take(batch, encoder)
        if shard.is_full:
            finished = shards.pop(batch.position)
            if len(finished.flaws) > runtime.max_flawed:
                refused.extend(finished.named_flaws())
                continue
            finished.write()
            yield Landed(finished.job.artifact.name, finished.unit, len(finished.ids), finished.note)
    if refused:
        raise _too_many(refused, runtime.max_flawed)


def _check_modalities(job: Job, encoder: Encoder) -> None:
    lacking = sorted(set(artifacts.read_manifest(job.table.directory)["modalities"]) - encoder.modalities)
    if lacking:
        raise UserError(f"encoder {job.module} does not take '{lacking[0]}', which {job.table.name} has",
                        do=f"it takes: {', '.join(map(repr, sorted(encoder.modalities)))}; choose other tasks or pools")


@dataclass
class _Shard:
    """Vectors of one shard while its batches arrive."""

    job: Job
    unit: str
    dimension: int
    started: float = field(default_factory=time.monotonic)
    encoding: float = 0.0
    flaws: dict[int, Flaw] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.job.source(self.unit).table()
        self.ids: list[str] = rows.column(0).to_pylist()
        self.awaited = len(keys_of(0, rows, self.job.artifact.params.instruction))
        self.vectors_ND = np.zeros((len(self.ids), self.dimension), np.float32)

    @property
    def is_full(self) -> bool:
        return self.awaited == 0

    def named_flaws(self) -> list[str]:
        return [f"{self.ids[row]}: {flaw.kind} ({flaw.detail})" for row, flaw in sorted(self.flaws.items())]

    @property
    def note(self) -> str:
        share = self.encoding / max(time.monotonic() - self.started, 1e-9)
        return f"encoding {share:.0%} of the time" + (f", {len(self.flaws)} flawed" if self.flaws else "")

    def take(self, batch: Batch, encoder: Encoder) -> None:
        self.awaited -= len(batch.keys)
        self.flaws.update({key.row: flaw for key, flaw in zip(batch.keys, batch.flaws) if flaw is not None})
        sound = [number for number, item in enumerate(batch.prepared) if item is not None]
        if not sound:
            return
        before = time.monotonic()
        encoded_BD = encoder.encode([batch.prepared[number] for number in sound])
        self.encoding += time.monotonic() - before
        if encoded_BD.shape != (len(sound), self.dimension):
            what = f"the encoder returned shape {encoded_BD.shape} for {len(sound)} items"
            raise UserError(f"{what}, its dimension is {self.dimension}", self.job.module,
                            "encode returns float32 [B, D]: see pipeline/encoders/__init__.py")
        if self.job.artifact.params.instruction == "all":
            encoded_BD = _unit(encoded_BD)
        np.add.at(self.vectors_ND, [batch.keys[number].row for number in sound], encoded_BD)

    def write(self) -> None:
        """Under the rule "all" a row holds the sum of its unit vectors, whose cosine ranks like the averaged scores."""
        artifact = self.job.artifact
        flaws = [self.flaws[row].kind if row in self.flaws else None for row in range(len(self.ids))]
        write_shard(artifact.path(self.unit), self.ids, self.vectors_ND, flaws, artifact.params.storage,
                    artifact.fingerprint)


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.asarray(vectors_ND / np.where(norms_N1 > 0, norms_N1, 1))
