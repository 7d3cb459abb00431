"""embed: one shard of a queries or candidates table -> one shard of embeddings.

Shards are a property of the data, so any number of workers, now or after a kill, makes the same files. All shards
of one encoder form one stream: weights load once, and the loaders never run dry between two shards. Equal items of a
shard are encoded once. A broken image is a value (`flaw`): its item is encoded from its text alone, or as the zero
vector, whose score with everything is 0; more of them than `max_flawed` and the shard is not written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Union

import numpy as np

from pipeline import artifacts
from pipeline.artifacts import Artifact, shard_file, shard_number
from pipeline.devices import resolve_device
from pipeline.embeddings import read_table, shard_facts, write_shard
from pipeline.encoders import load_encoder
from pipeline.encoding import Encoding, batch_size, require, require_modalities, unit_vectors
from pipeline.images import Flaw, ImageStore
from pipeline.loading import DRAFT, Batch, Source, batches, num_loaders
from pipeline.support.elsewhere import yielded_elsewhere
from pipeline.support.errors import UserError
from pipeline.support.loaders import let_waiting_threads_sleep
from pipeline.support.progress import Landed

log = logging.getLogger("pipeline")

VERSION = 1
RULES = ("none", "first", "hashed", "all")
STORAGES = ("float16", "float32")


@dataclass(frozen=True)
class Params(artifacts.Params):
    """`encoder` is the identity its module gives; `instruction` is "" for candidates, which have none."""

    encoder: dict[str, Any]
    precision: str
    storage: str
    instruction: str
    decoding: str


@dataclass(frozen=True)
class Runtime(artifacts.Runtime):
    batch_size: Union[int, Literal["auto"]]
    share: str
    compile: bool
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
    python: str | None = None

    @property
    def encoder(self) -> tuple[str, Any, str, str | None]:
        """Module, parameters, precision, interpreter: jobs that share them share one encoder in memory."""
        return self.module, self.encoder_params, self.artifact.params.precision, self.python

    @property
    def shards(self) -> list[dict[str, Any]]:
        return list(_shards_of(self.table.directory))

    def rows_of(self, unit: str) -> int:
        return int(self.shards[shard_number(unit)]["rows"])

    def source(self, unit: str) -> Source:
        shard = self.shards[shard_number(unit)]["file"]
        params = self.artifact.params
        return Source(self.table.path(shard), self.table.fingerprint, self.images, params.instruction, params.decoding,
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
    name, flaws = job.artifact.name, job.artifact.manifest()["flaws"]
    if flaws["count"] > runtime.max_flawed:
        raise UserError(f"{name}: {flaws['count']} items have a broken image, {runtime.max_flawed} tolerated", do=(
            "\n".join(flaws["first"][:5]) + f"\ntolerate them with embed.max_flawed={flaws['count']}, or mend the "
            f"images and then: rm -r {job.artifact.directory}"))


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
    for (*_, python), group in groupby(work, key=lambda pair: pair[0].encoder):
        call = list(group), runtime
        yield from embed_here(*call) if python is None else yielded_elsewhere(python, f"{__name__}:embed_here", *call)


def embed_here(work: Sequence[tuple[Job, str]], runtime: Runtime) -> Iterator[Landed]:
    """Make units of jobs that share one encoder, in this process."""
    let_waiting_threads_sleep()
    encoding = _encoding(work, runtime)
    # where a vector belongs to an id, equal items are not one
    share = "none" if getattr(encoding.encoder, "needs_ids", False) else runtime.share
    refused: list[str] = []
    shards: dict[int, _Shard] = {}
    num_items, num_shared = 0, 0
    loaders = num_loaders(runtime.loaders, sum(job.rows_of(unit) for job, unit in work))
    for batch in batches([job.source(unit) for job, unit in work], encoding.encoder, encoding.size, loaders, share):
        if batch.position not in shards:
            shards[batch.position] = _Shard(*work[batch.position], encoding, share)
            if share != "worker":  # or the vectors would depend on which shards came before
                encoding.forget()
        shard = shards[batch.position]
        shard.take(batch)
        if not shard.awaited:
            finished = shards.pop(batch.position)
            num_items, num_shared = num_items + finished.num_items, num_shared + finished.num_shared
            if len(finished.flaws) > runtime.max_flawed:
                refused.extend(finished.named_flaws())
                continue
            finished.write()
            yield Landed(finished.job.artifact.name, finished.unit, len(finished.ids), finished.note)
    log.info("%-9s %s  %s items, %s shared the vector of an equal one", "embed", encoding.module, f"{num_items:,}",
             f"{num_shared:,}")
    if refused:
        raise _too_many(refused, runtime.max_flawed)


def _encoding(work: Sequence[tuple[Job, str]], runtime: Runtime) -> Encoding:
    module, params, precision, _ = work[0][0].encoder
    device = resolve_device(runtime.device)
    encoder: Any = load_encoder(module).build(params, device, precision)
    for job in {job.artifact.label: job for job, _ in work}.values():
        needed = artifacts.read_manifest(job.table.directory)["modalities"]
        require_modalities(encoder, module, needed, job.table.name)
        if job.artifact.params.decoding == DRAFT:
            require(encoder, "image_size", module, "embed.decoding=exact")
    if runtime.compile:
        require(encoder, "compile", module, "embed.compile=false")
        encoder.compile()
    return Encoding(encoder, module, batch_size(runtime.batch_size, encoder, device))


@dataclass
class _Shard:
    """Vectors of one shard while its batches arrive."""

    job: Job
    unit: str
    encoding: Encoding
    share: str
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    num_shared: int = 0
    flaws: dict[int, Flaw] = field(default_factory=dict)

    def __post_init__(self) -> None:
        source = self.job.source(self.unit)
        self.ids: list[str] = read_table(source.path, source.fingerprint).column(0).to_pylist()
        self.rows_of = {key[1:]: rows for key, rows in source.items(0, self.share).items()}
        self.num_items, self.awaited = sum(map(len, self.rows_of.values())), len(self.rows_of)
        self.vectors_ND = np.zeros((len(self.ids), self.encoding.encoder.dimension), np.float32)

    def named_flaws(self) -> list[str]:
        return [f"{self.ids[row]}: {flaw.kind} ({flaw.detail})" for row, flaw in sorted(self.flaws.items())]

    @property
    def note(self) -> str:
        """`shared` is what was not encoded, because an equal item was."""
        busy = self.seconds / max(time.monotonic() - self.started, 1e-9)
        return (f"encoding {busy:.0%} of the time"
                + (f", {self.num_shared / self.num_items:.1%} shared" if self.num_shared else "")
                + (f", {len(self.flaws)} flawed" if self.flaws else ""))

    def take(self, batch: Batch) -> None:
        self.awaited -= len(batch.keys)
        rows = [self.rows_of[key[1:]] for key in batch.keys]
        self.num_shared += sum(map(len, rows)) - len(rows)
        self.flaws.update({row: flaw for each, flaw in zip(rows, batch.flaws) if flaw is not None for row in each})
        sound = [number for number, item in enumerate(batch.prepared) if item is not None]
        if not sound:
            return
        started, before = time.monotonic(), self.encoding.num_encoded
        encoded_BD = self.encoding.vectors([batch.prepared[number] for number in sound],
                                           [batch.digests[number] for number in sound])
        self.seconds += time.monotonic() - started
        self.num_shared += len(sound) - (self.encoding.num_encoded - before)
        if self.job.artifact.params.instruction == "all":
            encoded_BD = unit_vectors(encoded_BD)
        counts = [len(rows[number]) for number in sound]
        np.add.at(self.vectors_ND, [row for number in sound for row in rows[number]],
                  encoded_BD.repeat(counts, axis=0))

    def write(self) -> None:
        """Under the rule "all" a row holds the sum of its unit vectors, whose cosine ranks like the averaged scores."""
        artifact = self.job.artifact
        flaws = [self.flaws[row].kind if row in self.flaws else None for row in range(len(self.ids))]
        write_shard(artifact.path(self.unit), self.ids, self.vectors_ND, flaws, artifact.params.storage,
                    artifact.fingerprint)
