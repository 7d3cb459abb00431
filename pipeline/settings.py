"""The shape of a configuration: every option and its type. Values live in configs/base.yaml.

(Only what a benchmark's file may leave out has its default here.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from pipeline import indexes, loading
from pipeline.encoders.precision import PRECISIONS
from pipeline.stages import collect, embed, index, retrieve
from pipeline.support.errors import UserError, nearest
from pipeline.training import settings as training

FORMATS = ("trec", "qrels", "jsonl", "tsv", "mteb", "per_query", "per_query_csv", "markdown", "latex")


@dataclass(frozen=True)
class TaskSettings:
    headline: str
    pool: Optional[str] = None
    cutoffs: List[int] = field(default_factory=lambda: [1, 5, 10])


@dataclass(frozen=True)
class BenchmarkSettings:
    name: str
    adapter: str
    root: str
    split: str
    tasks: Dict[str, TaskSettings]
    archives: List[str] = field(default_factory=list)
    trusted_roots: List[str] = field(default_factory=list)
    options: Dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CollectSettings(collect.Runtime):
    rows_per_shard: int

    def __post_init__(self) -> None:
        _at_least("collect.rows_per_shard", self.rows_per_shard, 1)
        _at_least("collect.max_missing_images", self.max_missing_images, 0)


@dataclass(frozen=True)
class EmbedSettings(embed.Runtime):
    precision: str
    storage: str
    instruction: str
    decoding: str

    def __post_init__(self) -> None:
        _one_of("embed.precision", self.precision, PRECISIONS)
        _one_of("embed.storage", self.storage, embed.STORAGES)
        _one_of("embed.instruction", self.instruction, embed.RULES)
        _one_of("embed.decoding", self.decoding, loading.DECODINGS)
        _one_of("embed.share", self.share, loading.SHARING)
        if isinstance(self.batch_size, int):
            _at_least("embed.batch_size", self.batch_size, 1)
        _at_least("embed.loaders", self.loaders, -1)
        _at_least("embed.max_flawed", self.max_flawed, 0)


@dataclass(frozen=True)
class IndexSettings(index.Params):
    pass


@dataclass(frozen=True)
class RetrieveSettings(retrieve.Params, retrieve.Runtime):
    def __post_init__(self) -> None:
        _one_of("retrieve.coarse", self.coarse, indexes.COARSE)
        _one_of("retrieve.kernel", self.kernel, indexes.KERNELS)
        indexes.check_parameters(self.faiss_parameters)
        _at_least("retrieve.depth", self.depth, 1)
        _at_least("retrieve.queries_per_pass", self.queries_per_pass, 1)
        _more_than("retrieve.memory_gb", self.memory_gb, 0)


@dataclass(frozen=True)
class ScoreSettings:
    cutoff_metrics: List[str]
    metrics: List[str]
    confidence: float
    resamples: int
    seed: int

    def __post_init__(self) -> None:
        _at_least("score.resamples", self.resamples, 1)
        _more_than("score.confidence", self.confidence, 0)
        if self.confidence >= 1:
            raise UserError(f"score.confidence is {self.confidence}; it must be below 1, such as 0.95")


@dataclass(frozen=True)
class ExportSettings:
    formats: List[str]
    depth: int

    def __post_init__(self) -> None:
        for name in self.formats:
            _one_of("export.formats", name, FORMATS)
        _at_least("export.depth", self.depth, 1)


@dataclass(frozen=True)
class TrainingSettings(training.Params, training.Runtime):
    def __post_init__(self) -> None:
        _one_of("training.precision", self.precision, PRECISIONS)
        _one_of("training.repeats", self.repeats, training.REPEATS)
        _one_of("training.validation_pool", self.validation_pool, training.POOLS)
        _one_of("training.instruction", self.instruction, training.INSTRUCTIONS)
        for key in ("batch_size", "log_every", "keep"):
            _at_least(f"training.{key}", getattr(self, key), 1)
        for key in ("chunk_size", "hard_negatives", "same_task", "max_flawed", "save_every", "validate_every"):
            _at_least(f"training.{key}", getattr(self, key), 0)
        _at_least("training.loaders", self.loaders, -1)
        _more_than("training.epochs", self.epochs, 0)
        if not 0 <= self.warmup < 1:
            raise UserError(f"training.warmup is {self.warmup}; it is a share of all steps, from 0 to below 1")
        if len(self.betas) != 2:
            raise UserError(f"training.betas is {self.betas}; it has two numbers, such as [0.9, 0.98]")


@dataclass(frozen=True)
class LocalSettings:
    workers: int


@dataclass(frozen=True)
class LogSettings:
    wandb: Optional[str]


@dataclass(frozen=True)
class Settings:
    name: Optional[str]
    work_dir: str
    benchmark: BenchmarkSettings
    encoders: Dict[str, Any]
    pools: List[str]
    tasks: List[str]
    unions: Dict[str, List[str]]
    collect: CollectSettings
    embed: EmbedSettings
    index: IndexSettings
    retrieve: RetrieveSettings
    score: ScoreSettings
    export: ExportSettings
    training: TrainingSettings
    local: LocalSettings
    cluster: Optional[str]
    log: LogSettings

    def __post_init__(self) -> None:
        for key in ("pools", "encoders"):
            if not getattr(self, key):
                raise UserError(f"`{key}` is empty: there would be nothing to do")


def _one_of(key: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise UserError(f"{key}: '{value}' is not one of {', '.join(known)}", do=nearest(value, known))


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{key} is {value}; it must be at least {least}")


def _more_than(key: str, value: float, bound: float) -> None:
    if value <= bound:
        raise UserError(f"{key} is {value}; it must be more than {bound}")
