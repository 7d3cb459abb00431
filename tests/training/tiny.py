"""A benchmark of a few words and colours, options that fit it, and two encoders that learn from it in milliseconds."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import yaml
from PIL import Image

from pipeline.encoders import Item, uniir_clip
from pipeline.images import ImageStore
from pipeline.tables import CANDIDATES, QRELS, QUERIES, Candidate, Qrel, Query, table_of
from pipeline.training.draws import Course, Draw
from pipeline.training.examples import Examples, TaskTables, write_examples
from pipeline.training.feeding import Feeder
from pipeline.training.processes import Processes
from pipeline.training.settings import Params, Runtime

WORDS, DIMENSION = 61, 5
ARCHITECTURE = {
    "embed_dim": 16, "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
}


@dataclass
class Task:
    """One task by hand: (query_id, text, image, prompts), (query_id, candidate_id, relevance), hard negatives."""

    name: str
    queries: list[tuple[str, str | None, str | None, int]] = field(default_factory=list)
    pairs: list[tuple[str, str, int]] = field(default_factory=list)
    negatives: list[Any] | None = None

    def tables(self) -> TaskTables:
        rows = []
        for query_id, text, image, num_prompts in self.queries:
            prompts = [f"Prompt {number}." for number in range(num_prompts)]
            texts = [" ".join(filter(None, (prompt, text))) for prompt in prompts]
            rows.append(Query(query_id, text, image, modality_of(text, image), prompts, texts))
        qrels = table_of([Qrel(*pair) for pair in self.pairs], QRELS)
        return TaskTables(self.name, table_of(rows, QUERIES), qrels, self.negatives)


def modality_of(text: str | None, image: str | None) -> str:
    return ",".join(name for name, given in (("image", image), ("text", text)) if given is not None) or "text"


def candidates_table(candidates: Iterable[tuple[str, str | None, str | None]]) -> pa.Table:
    return table_of([Candidate(*row, modality_of(row[1], row[2])) for row in candidates], CANDIDATES)


def examples_of(directory: Path, tasks: Sequence[Task], candidates: Iterable[tuple[str, str | None, str | None]],
                repeats: Mapping[str, int] | None = None) -> Examples:
    write_examples(directory, [task.tables() for task in tasks], candidates_table(candidates), repeats)
    return Examples(directory)


class Toys(NamedTuple):
    examples: Examples
    images: ImageStore
    root: Path


def toys(directory: Path, tasks: Sequence[str], rows: int = 12) -> Toys:
    """`rows` queries for each named task; queries 0 and 1 of a task share a positive, query 2 has two of its own.

    "words" ask for texts, "pictures" are images that ask for images, "captions" are texts that ask for images, "both"
    have text and image on either side. Each query lists three hard negatives.
    """
    made, candidates = [], []
    for number, name in enumerate(tasks):
        task = Task(f"{name}_task{number}", negatives=[])
        for row in range(rows):
            own = f"{name}-c{row}"
            query, answer = _toy(name, row)
            task.queries.append((f"{name}-q{row}", *query, 2))
            candidates.append((own, *answer))
            task.pairs.append((f"{name}-q{row}", f"{name}-c{0 if row == 1 else row}", 1))
            assert task.negatives is not None
            task.negatives.append((f"{name}-q{row}", [f"{name}-c{(row + step) % rows}" for step in (3, 4, 5)]))
        task.pairs.append((f"{name}-q2", f"{name}-c{rows - 1}", 1))
        made.append(task)
    for row in range(rows):
        _paint(directory / f"{row}.png", row)
    return Toys(examples_of(directory / "examples", made, candidates), ImageStore(directory), directory)


def _toy(kind: str, row: int) -> tuple[tuple[str | None, str | None], tuple[str | None, str | None]]:
    query, answer = "find " + "so " * (row % 3) + f"thing {row}", f"it is number {row}" + " really" * (row % 2)
    picture, other = f"{row}.png", f"{(row + 1) % 7}.png"
    return {"words": ((query, None), (answer, None)), "pictures": ((None, picture), (None, other)),
            "captions": ((query, None), (None, picture)), "both": ((query, picture), (answer, other))}[kind]


def _paint(path: Path, row: int) -> None:
    random = np.random.default_rng(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).resize((32, 32)).save(path)


BASE = yaml.safe_load((Path(__file__).parents[2] / "configs" / "base.yaml").read_text())["training"]
SMALL: dict[str, Any] = dict(epochs=2.0, batch_size=8, learning_rate=1e-3, weight_decay=0.1, repeats="once",
                             precision="fp32", seed=5, loaders=0, device="cpu", log_every=1, save_every=0)


def params_of(**changes: Any) -> Params:
    """What base.yaml says, with a small batch in fp32, and these changes."""
    assert set(changes) <= {each.name for each in fields(Params)}
    values = {**BASE, **SMALL, **changes}
    return Params(**{each.name: values[each.name] for each in fields(Params)})


def runtime_of(**changes: Any) -> Runtime:
    assert set(changes) <= {each.name for each in fields(Runtime)}
    values = {**BASE, **SMALL, **changes}
    return Runtime(**{each.name: values[each.name] for each in fields(Runtime)})


def feeder_of(toy: Toys, params: Params, runtime: Runtime, encoder: Any, alone: Processes = Processes()) -> Feeder:
    return Feeder(Course(toy.examples, params), toy.images, encoder, runtime.chunk_size, runtime.loaders,
                  runtime.max_flawed, alone.rank, alone.world)


def draw_of(queries: Sequence[int], positives: Sequence[int], negatives: Sequence[Sequence[int]] | None = None) -> Draw:
    size = len(queries)
    return Draw(np.array(queries), np.full(size, -1), np.array(positives),
                np.array(negatives if negatives is not None else [[]] * size, np.int64).reshape(size, -1))


class Prepared(NamedTuple):
    words: list[int]
    colour: tuple[float, ...] | None


class ToyModel(torch.nn.Module):
    """Two small towers in float64, with dropout in both; names as in CLIP, so that the groups can be told."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.token_embedding = torch.nn.Embedding(WORDS, 6)
            self.ln_final = torch.nn.LayerNorm(6)
            self.text_projection = torch.nn.Parameter(torch.randn(6, DIMENSION) / 2)
            self.visual = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.GELU(), torch.nn.Linear(7, DIMENSION))
            self.dropout = torch.nn.Dropout(dropout)
            self.logit_scale = torch.nn.Parameter(torch.tensor(1.5))
        self.double()


class ToyEncoder:
    """A TrainableEncoder whose sums are exact enough to compare gradients."""

    dimension, modalities, device = DIMENSION, frozenset({"text", "image", "image,text"}), "cpu"

    def __init__(self, dropout: float = 0.0) -> None:
        self.model = ToyModel(dropout)

    def prepare(self, item: Item) -> Prepared:
        words = [zlib.crc32(word.encode()) % WORDS for word in (item.text or "").split()]
        if item.image is None:
            return Prepared(words or [0], None)
        return Prepared(words, tuple(np.asarray(item.image, np.float64).mean(axis=(0, 1)) / 255 - 0.5))

    def encode(self, batch: Sequence[Prepared]) -> np.ndarray:
        with torch.inference_mode():
            return self.embed(batch).float().numpy()

    def embed(self, batch: Sequence[Prepared]) -> torch.Tensor:
        model = self.model
        vectors = torch.zeros(len(batch), DIMENSION, dtype=torch.float64)
        for row, item in enumerate(batch):
            own = torch.zeros(DIMENSION, dtype=torch.float64)
            if item.words:
                hidden = model.ln_final(model.token_embedding(torch.tensor(item.words)).sum(dim=0))
                own = own + model.dropout(hidden) @ model.text_projection
            if item.colour is not None:
                own = own + model.dropout(model.visual(torch.tensor(item.colour, dtype=torch.float64)))
            vectors = vectors.index_add(0, torch.tensor([row]), own[None])
        return vectors


def tiny_clip(directory: Path) -> Any:
    """CLIP_SF with one layer in each tower, random but the same every time."""
    path = directory / "tiny.json"
    path.write_text(json.dumps(ARCHITECTURE))
    return uniir_clip.build(uniir_clip.Params(str(path), seed=3), "cpu", "fp32")


def weights_of(encoder: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in encoder.model.state_dict().items()}
