"""mteb, and our pipeline, score the same encoder on the same files: the same numbers. The page's example runs.

This module is also the benchmark adapter of the pipeline's side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import pytest
import torch
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.types import PromptType
from PIL import Image

from pipeline.cli import main
from pipeline.encoders import Item
from pipeline.for_mteb import as_mteb_model
from pipeline.support.errors import UserError
from pipeline.tables import Candidate, Qrel, Query
from tests import toy_encoder

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "encoders" / "mteb.md"
PROMPT = "Find what goes with it."
KINDS = {"t2i": ("text", "image"), "i2t": ("image", "text"), "it2i": ("image,text", "image")}
OURS = {"hit": "hit_rate", "recall": "recall", "precision": "precision", "ndcg": "ndcg", "map": "map", "mrr": "mrr"}
CUTOFFS = (1, 3, 5, 10, 20)


def write(root: Path) -> None:
    """Twelve queries and fifty candidates a task, graded judgements, pictures in several modes."""
    rng = np.random.default_rng(1)
    words = "red blue green circle square star above below night day big small".split()
    (root / "images").mkdir(parents=True)
    for number in range(62):
        pixels = Image.fromarray(rng.integers(0, 255, (70 + number % 5, 80, 3), dtype=np.uint8))
        mode = ("RGB", "L", "P", "RGBA")[number % 4]
        pixels.convert(mode).save(root / "images" / f"{number}.png")
    for kind, (sought, found) in KINDS.items():
        rows = [row(f"q{n}", sought, " ".join(rng.choice(words, 4)), f"images/{50 + n}.png") for n in range(12)]
        pool = [row(f"c{n}", found, " ".join(rng.choice(words, 4 + n % 20)), f"images/{n}.png") for n in range(50)]
        qrels = [[f"q{n}", f"c{c}", int(rng.integers(0, 3))] for n in range(12)
                 for c in rng.choice(50, 6, replace=False)]
        (root / f"{kind}.json").write_text(json.dumps({"queries": rows, "candidates": pool, "qrels": qrels}))


def row(name: str, kind: str, text: str, image: str) -> dict[str, Any]:
    return {"id": name, "text": text if "text" in kind else None, "image": image if "image" in kind else None}


def read(root: Path | str, kind: str) -> dict[str, Any]:
    return dict(json.loads((Path(root) / f"{kind}.json").read_text()))


def prepare(benchmark: Any) -> None:
    pass


def task_sources(benchmark: Any, task: Any) -> list[Path]:
    return [Path(benchmark.root) / f"{task.name}.json"]


def pool_sources(benchmark: Any, pool: str) -> list[Path]:
    return [Path(benchmark.root) / f"{pool.removesuffix('_pool')}.json"]


def queries(benchmark: Any, task: Any) -> Iterator[Query]:
    for each in read(benchmark.root, task.name)["queries"]:
        instructed = " ".join(part for part in (PROMPT, each["text"]) if part)
        yield Query(each["id"], each["text"], each["image"], KINDS[task.name][0], [PROMPT], [instructed])


def candidates(benchmark: Any, pool: str) -> Iterator[Candidate]:
    kind = pool.removesuffix("_pool")
    for each in read(benchmark.root, kind)["candidates"]:
        yield Candidate(each["id"], each["text"], each["image"], KINDS[kind][1])


def qrels(benchmark: Any, task: Any) -> Iterator[Qrel]:
    for query_id, candidate_id, relevance in read(benchmark.root, task.name)["qrels"]:
        yield Qrel(query_id, candidate_id, relevance)


def candidate_modality(benchmark: Any, task: Any) -> str:
    return KINDS[task.name][1]


def local_task(root: Path, kind: str) -> Any:
    """The files as one of mteb's retrieval tasks; images are opened by `datasets`, in their own modes."""
    sides = {"t": "text", "i": "image"}
    metadata = mteb.TaskMetadata.model_validate({
        "name": f"Local{kind.upper()}", "description": "test", "type": "Any2AnyRetrieval", "category": kind,
        "modalities": sorted({sides[letter] for letter in kind.replace("2", "")}),
        "dataset": {"path": "none", "revision": "none"}, "eval_splits": ["test"], "eval_langs": ["eng-Latn"],
        "main_score": "ndcg_at_10", "prompt": {"query": PROMPT}})

    def load_data(self: Any, **_: Any) -> None:
        content = read(root, kind)
        judged: dict[str, dict[str, int]] = {}
        for query_id, candidate_id, relevance in content["qrels"]:
            judged.setdefault(query_id, {})[candidate_id] = relevance
        split = {"queries": table(root, content["queries"]), "corpus": table(root, content["candidates"]),
                 "relevant_docs": judged, "top_ranked": None}
        self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return type(f"Local{kind.upper()}", (AbsTaskRetrieval,), {"metadata": metadata, "load_data": load_data})()


def table(root: Path, rows: list[dict[str, Any]]) -> datasets.Dataset:
    columns = {"id": [each["id"] for each in rows]}
    if rows[0]["text"] is not None:
        columns["text"] = [each["text"] for each in rows]
    if rows[0]["image"] is None:
        return datasets.Dataset.from_dict(columns)
    columns["image"] = [str(root / each["image"]) for each in rows]
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write(root)
    return root


def by_mteb(model: Any, data: Path) -> dict[tuple[str, str], float]:
    """(task, metric as we call it) -> its mean."""
    result = mteb.evaluate(model, [local_task(data, kind) for kind in KINDS], cache=None, show_progress_bar=False)
    scores = {each.task_name: each.scores["test"][0] for each in result.task_results}
    assert len(scores) == len(KINDS)
    return {(kind, f"{name}@{k}"): scores[f"Local{kind.upper()}"][f"{theirs}_at_{k}"]
            for kind in KINDS for name, theirs in OURS.items() for k in CUTOFFS}


def by_pipeline(data: Path, work: Path, instruction: str, capsys: pytest.CaptureFixture[str]) -> dict[Any, float]:
    tasks = "\n".join(f"  {kind}: {{pool: {kind}_pool, headline: hit@1, cutoffs: {list(CUTOFFS)}}}" for kind in KINDS)
    (work / "local.yaml").write_text(f"adapter: tests.test_for_mteb\nroot: {data}\nsplit: test\ntasks:\n{tasks}\n")
    (work / "trial.yaml").write_text(f"benchmark: {work / 'local.yaml'}\nencoders: [tiny_clip_random]\npools: [local]\n"
                                     f"work_dir: {work}\n")
    metrics = ",".join(f"{name}@{k}" for name in ("map", "mrr") for k in CUTOFFS)
    capsys.readouterr()  # mteb says something, too
    assert main(["run", str(work / "trial.yaml"), "--json", "embed.storage=float32", "embed.loaders=0",
                 f"embed.instruction={instruction}", f"score.metrics=[{metrics}]"]) == 0
    rows = json.loads(capsys.readouterr().out)["scores"]
    return {(each["task"], name): value["mean"] for each in rows for name, value in each["metrics"].items()}


@pytest.mark.parametrize("instruction, instructions", [("none", "none"), ("first", "task")])
def test_mteb_and_our_pipeline_agree(instruction: str, instructions: str, data: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    theirs = by_mteb(as_mteb_model("tiny_clip_random", instructions=instructions), data)
    ours = by_pipeline(data, tmp_path, instruction, capsys)
    assert len(theirs) == len(KINDS) * len(OURS) * len(CUTOFFS)
    rounded = {key: round(ours[key], 5) if "mrr" not in key[1] else ours[key] for key in theirs}  # mteb rounds
    assert max(abs(rounded[key] - value) for key, value in theirs.items()) <= 1e-6
    assert 0 < min(value for (_, name), value in theirs.items() if name == "ndcg@20") < 1


def test_another_encoder_or_a_prompt_gives_other_scores(data: Path, tmp_path: Path) -> None:
    """What makes the agreement above mean something."""
    other = tmp_path / "other.yaml"
    piece = (ROOT / "configs/encoders/tiny_clip_random.yaml").read_text()
    other.write_text(piece.replace("seed: 0", "seed: 1"))
    base = by_mteb(as_mteb_model("tiny_clip_random"), data)
    for model in (as_mteb_model(str(other)), as_mteb_model("tiny_clip_random", instructions="task")):
        changed = by_mteb(model, data)
        assert max(abs(changed[key] - value) for key, value in base.items()) > 1e-2


def test_vectors_are_the_encoders_own_in_the_loaders_order(data: Path) -> None:
    model = as_mteb_model("tiny_clip_random")
    rows = read(data, "it2i")["queries"]
    batches = [{"id": ["q0"], "text": [rows[0]["text"]], "image": [Image.open(data / rows[0]["image"])]},
               {"id": ["q1", "q2"], "text": [each["text"] for each in rows[1:3]],
                "image": [Image.open(data / each["image"]) for each in rows[1:3]]}]
    task = local_task(data, "it2i").metadata
    found = model.encode(batches, task_metadata=task, hf_split="test", hf_subset="default",
                         prompt_type=PromptType.query, batch_size=1)
    items = [Item(each["text"], Image.open(data / each["image"]).convert("RGB")) for each in rows[:3]]
    expected = model.encoder.encode([model.encoder.prepare(item) for item in items])
    assert found.dtype == np.float32 and np.abs(found - expected).max() <= 1e-5
    similar = model.similarity(found, expected)
    assert similar.dtype == torch.float64 and similar.shape == (3, 3)
    assert torch.allclose(similar.diagonal(), model.similarity_pairwise(found, expected), rtol=0, atol=1e-12)
    assert np.abs(similar.numpy() - 1).max() > 1e-3 > np.abs(similar.diagonal().numpy() - 1).max()


class Recording(toy_encoder.ToyEncoder):
    def prepare(self, item: Item) -> np.ndarray:
        self.seen = [*getattr(self, "seen", []), (item.text, item.instruction, item.bare_text, item.role, item.id)]
        return super().prepare(item)


def test_prompts_and_instructions_reach_the_encoder(data: Path) -> None:
    encoder: Any = Recording(toy_encoder.Params())
    batch = {"id": ["q7"], "text": ["red in colour"], "query": ["red"], "instruction": ["in colour"]}
    task = local_task(data, "t2i").metadata
    call: dict[str, Any] = {"task_metadata": task, "hf_split": "test", "hf_subset": "default"}
    for instructions in ("none", "task"):
        model = as_mteb_model(encoder, instructions=instructions, name="lab/toy", revision="1")
        model.encode([batch], prompt_type=PromptType.query, **call)
        model.encode([{"text": ["red"]}], prompt_type=PromptType.document, **call)
        model.encode([{"text": ["red"]}], **call)
    candidate = ("red", None, "red", "candidate", None)
    assert encoder.seen == [("red in colour", "in colour", "red", "query", "q7"), candidate, candidate,
                            (f"{PROMPT} red in colour", PROMPT, "red in colour", "query", "q7"), candidate, candidate]


def test_mteb_sees_an_encoder_of_its_own_with_the_fingerprint_as_revision(tmp_path: Path) -> None:
    model = as_mteb_model("tiny_clip_random")
    assert isinstance(model, mteb.EncoderProtocol) and not isinstance(model, mteb.SearchProtocol)
    meta = model.mteb_model_meta
    assert meta.name == "plumbline/tiny_clip_random" and meta.embed_dim == 128
    assert re.fullmatch("[0-9a-f]{12}", meta.revision) and set(meta.modalities) == {"text", "image"}
    copy = tmp_path / "tiny_clip_random.yaml"
    copy.write_text((ROOT / "configs/encoders/tiny_clip_random.yaml").read_text())
    assert as_mteb_model(str(copy)).mteb_model_meta.revision == meta.revision
    for changed in (as_mteb_model("tiny_clip_random", precision="bf16"),
                    as_mteb_model("tiny_clip_random", instructions="task")):
        assert changed.mteb_model_meta.revision != meta.revision


def test_mistakes_are_told(data: Path) -> None:
    with pytest.raises(UserError, match="instructions 'all' are not known"):
        as_mteb_model("tiny_clip_random", instructions="all")
    apart: Any = toy_encoder.ToyEncoder(toy_encoder.Params(), frozenset({"text", "image"}))
    with pytest.raises(UserError, match="needs `name` and `revision`"):
        as_mteb_model(apart)
    with pytest.raises(UserError, match="does not take 'image,text', which task LocalIT2I has"):
        mteb.evaluate(as_mteb_model(apart, name="lab/toy", revision="1"), local_task(data, "it2i"), cache=None)
    with pytest.raises(UserError, match="nothing that can be encoded among mteb's columns: id, audio"):
        model = as_mteb_model(apart, name="lab/toy", revision="1")
        model.encode([{"id": ["1"], "audio": [0]}], task_metadata=local_task(data, "t2i").metadata, hf_split="test",
                     hf_subset="default")


def test_the_pages_example_runs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the data of a task that mteb knows put in by us, since tests download nothing."""
    block, = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    name, = re.findall(r'get_tasks\(tasks=\["(\w+)"\]\)', block)
    assert mteb.get_task(name).metadata.category == "t2i"
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [local_task(data, "t2i")])
    monkeypatch.setenv("MTEB_CACHE", str(data))
    found: dict[str, Any] = {}
    exec(block, found)
    assert 0 <= found["score"] <= 1
