"""Scores in the layout of mteb's result folder, so that programs that read mteb's results read these too.

results/plumbline__<encoder>/<revision>/<task>.json, with model_meta.json beside it; the revision is a hash of all that
makes the vectors, so other weights never pass for these. Metrics have mteb's names, at the cutoffs that this
experiment has; the main score is the task's headline, which for M-BEIR is hit_rate_at_5 and not mteb's ndcg_at_10. What
was not measured (time, carbon, languages) is null or undetermined. mteb itself has not run: its version is null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from pipeline.artifacts import canonical_json
from pipeline.metrics.ranking import Metric
from pipeline.plan import Scored
from pipeline.report.rows import Made, ScoreRow

_DECIMALS = 6
_LANGUAGE = "und-Zyyy"  # undetermined, in ISO's codes; mteb would take an entry without a language out of every mean
_UNKNOWN = ("loader", "release_date", "languages", "n_parameters", "memory_usage_mb", "max_tokens", "embed_dim",
            "license", "open_weights", "public_training_code", "public_training_data", "training_datasets")


def folder(row: ScoreRow) -> str:
    """Of an encoder: results/<organisation>__<model>/<revision>."""
    return f"results/plumbline__{row.encoder}/{revision(row.made)}"


def revision(made: Made) -> str:
    """12 hex digits over encoder, precision, storage and the rule of instructions."""
    facts = {"module": made.module, **made.identity, "precision": made.precision, "storage": made.storage,
             "instruction": made.instruction}
    return sha256(canonical_json(facts).encode()).hexdigest()[:12]


def task_name(row: ScoreRow) -> str:
    """A task on its own pool has its name; on another pool it is another task."""
    return row.task if row.pool == "local" else f"{row.task}.{row.pool}"


def task_result(scored: Scored, row: ScoreRow, split: str) -> str:
    """One task's file. `dataset_revision` is a hash of queries, qrels and candidates."""
    inputs = {key: digest for key, digest in scored.job.artifact.identity.inputs.items() if key != "run"}
    metrics = {_metric_name(name): round(value.mean, _DECIMALS) for name, value in row.metrics.items()}
    scores = {**metrics, "main_score": round(row.value.mean, _DECIMALS), "main_metric": _metric_name(row.headline),
              "hf_subset": "default", "languages": [_LANGUAGE]}
    return _json({"dataset_revision": sha256(canonical_json(inputs).encode()).hexdigest()[:40],
                  "task_name": task_name(row), "mteb_version": None, "scores": {split: [scores]},
                  "evaluation_time": None, "kg_co2_emissions": None})


def model_meta(row: ScoreRow) -> str:
    """What mteb wants to know about a model, as far as it is known."""
    return _json({"name": f"plumbline/{row.encoder}", "revision": revision(row.made), **dict.fromkeys(_UNKNOWN),
                  "framework": [], "similarity_fn_name": "cosine", "use_instructions": row.made.instruction != "none"})


def _metric_name(name: str) -> str:
    """hit@5 is hit_rate_at_5, ndcg@10 ndcg_at_10; over the whole run, mrr is mrr."""
    metric = Metric.parse(name)
    foreign = "hit_rate" if metric.name == "hit" else metric.name
    return foreign if metric.k is None else f"{foreign}_at_{metric.k}"


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
