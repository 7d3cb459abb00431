"""search: a query by hand, against a pool of an experiment. Encoder and pool are opened once for many queries.

A typed text is written as the benchmark writes its own (an adapter may have `format_string`), and joined with its
instruction by a blank; a query of the task is taken as its table has it, so that it gets the vector and the ranking
of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.benchmarks import load_adapter
from pipeline.images import ImageStore
from pipeline.look import Candidate, View
from pipeline.look.cells import Cell
from pipeline.look.contents import contents_of
from pipeline.look.pools import OpenPool
from pipeline.look.showing import candidate_at, judgements, query_of
from pipeline.look.vectors import QueryEncoder
from pipeline.support.errors import UserError

TASK, NONE = "task", "none"


@dataclass(frozen=True)
class Asked:
    """What somebody asks. instruction: "task" (the task's own, by the experiment's rule; of a typed query, which has no
    id to choose by, the first), "none", or a text of one's own. `image`: a file, or a reference of the benchmark."""

    text: str | None = None
    image: str | None = None
    query_id: str | None = None
    instruction: str = TASK
    top: int = 10


class Searcher:
    """NotReady unless the pool is embedded and indexed; UserError if the encoder cannot be opened."""

    def __init__(self, cell: Cell):
        settings = cell.experiment.settings
        self.cell, self.pool = cell, OpenPool(cell.search, settings.retrieve)
        self.encoder = QueryEncoder(cell.queries, settings.embed.device)
        self.queries, self.contents = contents_of(cell)
        adapter = load_adapter(cell.experiment.benchmark.adapter)
        self.written: Callable[[str], str] = getattr(adapter, "format_string", str)

    def search(self, asked: Asked) -> View:
        """UserError if there is nothing to search for, or too much, or an image cannot be used."""
        if asked.query_id is not None and (asked.text or asked.image):
            raise UserError("a query of the task has a text and an image of its own", None, "leave out one of the two")
        row, rule, images = self._row(asked)
        if self.encoder.needs_ids and asked.query_id is None:
            raise UserError("this encoder has vectors for the task's queries only, not for what is typed", None,
                            "name one of them: --query QUERY_ID, or :query QUERY_ID")
        found = self.pool.hits(self.encoder.vector(row, rule, images), asked.top)
        scored = self.cell.scored
        judged = judgements(self.cell, asked.query_id) if asked.query_id is not None else {}
        return View(scored.encoder, scored.task.name, scored.pool, len(self.contents),
                    query_of(row, rule, images, is_typed=asked.query_id is None), (),
                    self._hits(found.rows_QK[0], found.scores_QK[0], asked.top, judged), {},
                    self.cell.search.artifact.params.depth)

    def images_of(self, asked: Asked) -> ImageStore:
        """Where the query's image is."""
        if asked.image is None or asked.query_id is not None:
            return self.cell.experiment.images
        path = Path(asked.image).expanduser()
        if path.is_file():
            return ImageStore(path.parent)
        if path.is_absolute() or self.cell.experiment.images.size(asked.image) is None:
            raise UserError("there is no such image", asked.image, "name a file, or an image as the benchmark does")
        return self.cell.experiment.images

    def _row(self, asked: Asked) -> tuple[dict[str, Any], str, ImageStore]:
        """The query as a row of a table, the rule for its instruction, and where its image is."""
        stored, images = asked.query_id is not None, self.images_of(asked)
        row = self.queries.row(self.queries.row_number(str(asked.query_id))) if stored else self._typed(asked, images)
        rule = self.cell.queries.artifact.params.instruction
        if asked.instruction == NONE:
            return row, NONE, images
        if asked.instruction == TASK:
            return row, "first" if rule == "hashed" and not stored else rule, images
        instruction = self.written(asked.instruction)
        return {**row, "instructions": [instruction], "instructed_texts": [self._joined(instruction, row["text"])]
                }, "first", images

    def _typed(self, asked: Asked, images: ImageStore) -> dict[str, Any]:
        text = self.written(asked.text) if asked.text and asked.text.strip() else None
        if text is None and asked.image is None:
            raise UserError("there is nothing to search for", None, "give a text, or an image")
        modality = "image,text" if text and asked.image else "image" if asked.image else "text"
        own = images is not self.cell.experiment.images
        reference = Path(asked.image).name if asked.image and own else asked.image
        prompts = self._prompts(modality)
        return {"query_id": "", "text": text, "image": reference, "modality": modality, "instructions": prompts,
                "instructed_texts": [self._joined(prompt, text) for prompt in prompts]}

    def _prompts(self, modality: str) -> list[str]:
        """Those of the first query of this modality; of the first query, if the task has none of it."""
        first: Mapping[str, Any] | None = None
        for number in range(min(len(self.queries), 1000)):
            row = self.queries.row(number)
            first = first or row
            if row["modality"] == modality:
                return list(row["instructions"])
        return list(first["instructions"]) if first else []

    def _joined(self, instruction: str, text: str | None) -> str:
        return self.written(f"{instruction} {text or ''}".strip())

    def _hits(self, rows_K: Any, scores_K: Any, top: int, judged: Mapping[str, int]) -> tuple[Candidate, ...]:
        return tuple(candidate_at(self.contents, int(row), rank, float(score), judged)
                     for rank, (row, score) in enumerate(zip(rows_K[:top], scores_K[:top]), 1) if row >= 0)
