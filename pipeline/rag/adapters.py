"""Results as other libraries' types. Each is imported when it is asked for; none is needed for anything else."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.rag.loading import load_results
from pipeline.rag.records import Candidate, Complement, Picture, Query, Result
from pipeline.support.errors import UserError


def to_hf_dataset(path: Path | str, images: Path | str | None = None, with_images: bool = False,
                  streaming: bool = False, **options: Any) -> Any:
    """A `datasets.Dataset` (`streaming`: an IterableDataset), one row per query, of the file that `load_results` reads.

    Pictures are references, or with `with_images` the images themselves. `options` go to `from_generator`.
    """
    datasets = _library("datasets", "datasets")
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    given = {"path": str(path), "images": None if images is None else str(images), "with_images": with_images}
    return kind.from_generator(_rows, features=_features(datasets, with_images), gen_kwargs=given, **options)


def _rows(path: str, images: str | None, with_images: bool) -> Iterator[dict[str, Any]]:
    for result in load_results(path, images):
        yield {**_row(result.query, with_images), "instructions": list(result.query.instructions),
               "candidates": [_candidate_row(candidate, with_images) for candidate in result.candidates]}


def _candidate_row(candidate: Candidate, with_images: bool) -> dict[str, Any]:
    partner = candidate.complement
    return {**_row(candidate, with_images), "relevance": candidate.relevance,
            "complement": None if partner is None else _row(partner, with_images)}


def _row(item: Query | Candidate | Complement, with_images: bool) -> dict[str, Any]:
    fields = {name: value for name, value in vars(item).items() if name not in ("instructions", "complement")}
    return {**fields, "image": _image(item.image, with_images)}


def _image(picture: Picture | None, with_images: bool) -> Any:
    if picture is None:
        return None
    return {"path": picture.reference, "bytes": picture.read()} if with_images else picture.reference


def _features(datasets: Any, with_images: bool) -> Any:
    text, number = datasets.Value("string"), datasets.Value("int32")
    content = {"text": text, "image": datasets.Image() if with_images else text, "modality": text}
    found = {"candidate_id": text, "rank": number, "score": datasets.Value("float32"), **content}
    return datasets.Features({
        "query_id": text, **content, "instructions": datasets.List(text),
        "candidates": datasets.List({**found, "relevance": number, "complement": found})})


def to_langchain(result: Result) -> list[Any]:
    """LangChain's documents, best first: the text as content, everything else as metadata, images as references."""
    documents = _library("langchain_core.documents", "langchain-core")
    return [documents.Document(id=candidate.candidate_id, page_content=_text(candidate),
                               metadata=_metadata(result, candidate)) for candidate in result.candidates]


def to_llama_index(result: Result) -> list[Any]:
    """LlamaIndex's nodes with scores, best first; a candidate with an image is an ImageNode with its path."""
    schema = _library("llama_index.core.schema", "llama-index-core")
    nodes = []
    for candidate in result.candidates:
        said = {"id_": candidate.candidate_id, "text": _text(candidate), "metadata": _metadata(result, candidate)}
        node = (schema.TextNode(**said) if candidate.image is None
                else schema.ImageNode(image_path=candidate.image.reference, **said))
        nodes.append(schema.NodeWithScore(node=node, score=candidate.score))
    return nodes


def _text(candidate: Candidate) -> str:
    """The candidate's own, or its partner's: what a reader of text alone can use."""
    return candidate.text or (candidate.complement and candidate.complement.text) or ""


def _metadata(result: Result, candidate: Candidate) -> dict[str, Any]:
    partner = candidate.complement
    picture = candidate.image or (partner.image if partner else None)
    return {"query_id": result.query.query_id, "rank": candidate.rank, "score": candidate.score,
            "relevance": candidate.relevance, "modality": candidate.modality,
            "image": picture.reference if picture else None, "complement_id": partner.candidate_id if partner else None}


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise UserError(f"{package} is not installed", do=f"pip install {package}") from None
