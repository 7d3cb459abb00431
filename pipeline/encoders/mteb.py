"""Any dense model of mteb's registry, as mteb itself runs it: its prompts, its way to join a text and an image.

Promises: the revision is the registry's, written in the configuration, so that a plan needs no import of mteb and a
newer mteb cannot change the model in silence; models that run code from their repository are refused unless asked.
The trade: what precision the weights have, and how long a text may be, is decided by mteb's loader of the model.
"""

# Shapes: B items, D dimensions.

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.encoders import Item
from pipeline.encoders.precision import arithmetic, check_precision
from pipeline.encoders.prompted import Prepared, loading, probes, warn_unless_cosine
from pipeline.support.errors import UserError

_CATEGORIES = {"text": "t2t", "image": "i2i", "image,text": "it2it"}


@dataclass(frozen=True)
class Params:
    """All that may change the vectors.

    model:             a name in mteb's registry (`owner/name`)
    revision:          the revision that the registry has for it (40 hex digits; for closed models a number)
    task_type:         the type of task the model is told it is used for, by which it may choose a prompt
    languages:         of that task, as mteb writes them
    query_prompt:      the task's prompt for queries, as an mteb task has one; null: none
    candidate_prompt:  that for candidates
    instruction_as:    "text": the final text, instruction included, is the text; "prompt": a query's instruction is
                       the task's prompt instead of `query_prompt`, and its bare text is the text
    embed_dim:         the dimension, of those that the model offers
    trust_remote_code: run the code that comes with the model; never without having read it
    """

    model: str
    revision: str | None = None
    task_type: str = "Any2AnyRetrieval"
    languages: list[str] = field(default_factory=lambda: ["eng-Latn"])
    query_prompt: str | None = None
    candidate_prompt: str | None = None
    instruction_as: str = "text"
    embed_dim: int | None = None
    trust_remote_code: bool = False


def identity(params: Params) -> dict[str, Any]:
    """What the fingerprint sees: the registry's name and revision, and how items are put to the model. No mteb.

    Not mteb's version: a release every few days changes the registry, seldom a vector.
    """
    if params.revision is None:
        raise UserError(f"mteb model '{params.model}' needs `revision`", None,
                        f"""python -c "import mteb; print(mteb.get_model_meta('{params.model}').revision)" tells it""")
    if params.instruction_as not in ("text", "prompt"):
        raise UserError(f"instruction_as '{params.instruction_as}' is not known", None, "one of: text, prompt")
    return {name: value for name, value in asdict(params).items() if name != "trust_remote_code"}


def build(params: Params, device: str, precision: str) -> MtebEncoder:
    """The encoder on `device`; precision is what the model's own loader leaves open: fp32, bf16 or fp16."""
    identity(params)  # the same mistakes are refused with or without a plan
    check_precision(precision)
    meta = _registered(params)
    if "dense" not in meta.model_type:
        raise UserError(f"this model is {' and '.join(meta.model_type)}: it makes no dense vector of an item",
                        params.model, "choose a dense model")
    if not {"text", "image"} & set(meta.modalities):
        raise UserError(f"this model takes {', '.join(meta.modalities)} only", params.model, "choose another one")
    if meta.similarity_fn_name is not None:
        warn_unless_cosine(params.model, meta.similarity_fn_name.value)
    with loading("mteb", params.model, "run once with network access; some need more packages"), _own_code_only(params):
        model = meta.load_model(device=device, embed_dim=params.embed_dim)
    return MtebEncoder(model, params, device, precision, meta.modalities)


def _registered(params: Params) -> Any:
    try:
        import mteb
    except ImportError as error:
        raise UserError("mteb is not installed", None, "pip install 'plumbline[mteb]'") from error
    try:
        return mteb.get_model_meta(params.model, params.revision)
    except KeyError as error:
        raise UserError(str(error.args[0]), None, "for others: encoder: sentence_transformers") from error
    except ValueError as error:
        raise UserError(str(error), None, "set what is expected, or install the mteb that has yours") from error


@contextmanager
def _own_code_only(params: Params) -> Iterator[None]:
    """Close the one door through which transformers and its kin run code from a repository: mteb often opens it."""
    from transformers import dynamic_module_utils

    def refuse(*_: Any, **__: Any) -> Any:
        raise UserError(f"mteb model '{params.model}' runs code from its repository", None,
                        "read that code, then set trust_remote_code: true")

    original = dynamic_module_utils.get_class_in_module
    if not params.trust_remote_code:
        setattr(dynamic_module_utils, "get_class_in_module", refuse)
    try:
        yield
    finally:
        setattr(dynamic_module_utils, "get_class_in_module", original)


class MtebEncoder:
    """One of mteb's models behind the contract. `model` is mteb's own object."""

    def __init__(self, model: Any, params: Params, device: str, precision: str, modalities: Sequence[str]):
        self.model, self.params, self.device, self.precision = model, params, device, precision
        alone = {name: self._vectors([self.prepare(item)]) for name, item in probes().items() if name in modalities}
        self.dimension = next(iter(alone.values())).shape[1]
        self.modalities = frozenset({*alone, *(("image,text",) if self._joins(alone) else ())})

    def _joins(self, alone: Mapping[str, np.ndarray]) -> bool:
        """Whether text and image make one vector of both: some models refuse, some look at one of them."""
        if len(alone) < 2:
            return False
        try:
            joined_1D = self._vectors([self.prepare(probes()["image,text"])])
        except (NotImplementedError, ValueError, KeyError, TypeError):
            return False
        return not any(np.allclose(joined_1D, alone_1D) for alone_1D in alone.values())

    def prepare(self, item: Item) -> Prepared:
        """Text and prompt chosen, the image as uint8 [H, W, 3]."""
        text, is_query = item.text, item.role == "query"
        prompt = self.params.query_prompt if is_query else self.params.candidate_prompt
        if is_query and self.params.instruction_as == "prompt" and item.instruction:
            text, prompt = item.bare_text, item.instruction
        return Prepared.of(item, text, prompt)

    def encode(self, batch: Sequence[Prepared]) -> np.ndarray:
        """float32 [B, D], normalised where mteb's own wrapper of the model does."""
        groups: defaultdict[tuple[str, str, str | None], list[int]] = defaultdict(list)
        for row, item in enumerate(batch):
            groups[item.kind, item.role, item.prompt].append(row)
        vectors_BD = np.zeros((len(batch), self.dimension), np.float32)
        for rows in groups.values():
            vectors_BD[rows] = self._vectors([batch[row] for row in rows])
        return vectors_BD

    def _vectors(self, items: Sequence[Prepared]) -> np.ndarray:
        """float32 [B, D] of items of one kind, role and prompt."""
        import torch
        from mteb.types import PromptType
        from torch.utils.data import DataLoader

        first, rows = items[0], Rows(items)
        side = PromptType.query if first.role == "query" else PromptType.document
        loader: Any = DataLoader(rows, batch_size=len(items), collate_fn=rows.collate)  # type: ignore[arg-type]
        task = _task(first.kind, self.params.task_type, tuple(self.params.languages), side.value, first.prompt)
        with arithmetic(self.device, self.precision), torch.no_grad():
            found = self.model.encode(loader, task_metadata=task, hf_split="test", hf_subset="default",
                                      prompt_type=side, batch_size=len(items), show_progress_bar=False)
        vectors_BD = torch.as_tensor(found).float().cpu().numpy()
        if vectors_BD.ndim != 2 or len(vectors_BD) != len(items):
            raise UserError(f"the model returned shape {vectors_BD.shape} for {len(items)} items", self.params.model)
        return np.asarray(vectors_BD, np.float32)


class Rows:
    """The data set that mteb's wrappers look at: its `features` tell them what there is."""

    def __init__(self, items: Sequence[Prepared]):
        import datasets

        self.rows: list[dict[str, Any]] = []
        for number, item in enumerate(items):
            words = {"text": item.text, "query": item.text}
            if item.role == "candidate":  # mteb strips these
                words = {"text": (item.text or "").strip(), "body": item.text}
            picture = {} if item.image is None else {"image": item.picture}
            self.rows.append({"id": str(number), **(words if item.text is not None else {}), **picture})
        self.column_names = list(self.rows[0])
        string, image = datasets.Value("string"), datasets.Image()
        self.features = {name: image if name == "image" else string for name in self.column_names}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int | str) -> Any:
        return [each[row] for each in self.rows] if isinstance(row, str) else self.rows[row]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        return {name: [row[name] for row in rows] for name in self.column_names}


@lru_cache(maxsize=1024)
def _task(kind: str, task_type: str, languages: tuple[str, ...], side: str, prompt: str | None) -> Any:
    """The least that mteb lets a task say of itself."""
    from mteb import TaskMetadata
    from mteb.languages import check_language_code

    try:
        for language in languages:
            check_language_code(language)
        return TaskMetadata.model_validate({
            "name": "Plumbline", "description": "", "type": task_type, "category": _CATEGORIES[kind],
            "modalities": kind.split(","), "dataset": {"path": "none", "revision": "none"}, "main_score": "ndcg_at_10",
            "eval_langs": list(languages), "prompt": {side: prompt} if prompt else None})
    except ValueError as error:
        raise UserError(f"mteb has no task of type '{task_type}' in {', '.join(languages)}", None,
                        "as in task_type: Any2AnyRetrieval, languages: [eng-Latn]") from error
