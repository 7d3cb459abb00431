"""Retrieval results from their files: JSON Lines (plain, .gz, .zst), parquet, and UniIR's own `*_retrieved.jsonl`.

Lines stream; nothing is held. Complements are taken from the file of the same name in `complements/`, and are
checked against the candidates, so that two files of different runs are never mixed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.images import ImageStore
from pipeline.rag.records import Candidate, Complement, Picture, Query, Result
from pipeline.support.errors import UserError

_COMPRESSED = (".gz", ".zst")
Store = Callable[[], ImageStore]


def load_results(path: Path | str, images: ImageStore | Path | str | None = None,
                 complements: Path | str | None = None) -> Iterator[Result]:
    """One record per query, in the order of the file.

    `images`: the folder that references are relative to, or a store; None: the benchmark's, as the experiment's
    config.yaml names it (needed only when a picture is opened). `complements`: their file; None: the one that
    `complements` wrote for these results, if it is there. UserError: a file that is missing, damaged or of other
    results, with its line.
    """
    path, store = Path(path), _store(Path(path), images)
    partners = _partner_lines(path, complements)
    for number, line in enumerate(_parquet_lines(path) if path.suffix == ".parquet" else json_lines(path), 1):
        where = f"{path}:{number}"
        try:
            result = _uniir_result(line, store) if "qid" in line["query"] else _result(line, store)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"not a line of retrieval results: {error!r}", where) from None
        if partners is not None:
            result = _with_complements(result, next(partners, None), store, where)
        yield result


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON Lines, decompressed by its suffix; UserError with the line of what is wrong."""
    number = 0
    try:
        with pa.input_stream(str(path), compression="detect") as stream, io.BufferedReader(stream) as file:
            for number, line in enumerate(file, 1):
                yield dict(json.loads(line))
    except FileNotFoundError:
        do = "write them: python -m pipeline results EXPERIMENT"
        raise UserError("there are no results", str(path), do) from None
    except (ValueError, TypeError, OSError) as error:
        what = str(error).splitlines()[0][:120]
        raise UserError(f"cannot be read: {what}", f"{path}:{max(number, 1)}", "write it again") from None


def _parquet_lines(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"cannot be read: {str(error).splitlines()[0][:120]}", str(path), "write it again") from None
    for batch in file.iter_batches(256):
        for row in batch.to_pylist():
            candidates = row.pop("candidates")
            yield {"query": {**row, "instruction": row["instructions"]}, "candidates": candidates}


def _store(path: Path, images: ImageStore | Path | str | None) -> Store:
    if isinstance(images, ImageStore):
        return lambda: images
    if images is not None:
        folder = Path(images)
        return lru_cache(lambda: ImageStore(folder))
    return lru_cache(lambda: _store_beside(path))


def _store_beside(path: Path) -> ImageStore:
    """The images of the benchmark, by the configuration of the experiment that the results lie in."""
    import yaml
    known = next((parent / "config.yaml" for parent in path.absolute().parents if parent.name == "retrieval_results"),
                 path.absolute())
    config = known.parent.parent / "config.yaml"
    do = "say where they are: load_results(path, images=FOLDER)"
    try:
        settings = yaml.safe_load(config.read_text())
        benchmark = settings["benchmark"]
        root, archives, trusted = (benchmark[name] for name in ("root", "archives", "trusted_roots"))
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise UserError("where the pictures of these results are is not known", str(config), do) from None
    if not Path(root).is_dir():
        raise UserError(f"the pictures' folder is not there: {root}", str(config), do)
    return ImageStore(Path(root), archives, trusted, Path(settings["work_dir"]) / "cache")


def _partner_lines(path: Path, complements: Path | str | None) -> Iterator[dict[str, Any]] | None:
    if complements is not None:
        return json_lines(Path(complements))
    name = path.name
    for suffix in (*_COMPRESSED, ".jsonl", ".parquet"):
        name = name.removesuffix(suffix)
    found = path.parent.parent / "complements" / f"{name}.jsonl"
    return json_lines(found) if path.parent.name == "retrieved_candidates" and found.exists() else None


def _picture(reference: str | None, store: Store) -> Picture | None:
    return None if reference is None else Picture(reference, store)


def _score(row: dict[str, Any]) -> float:
    """The float32 that was written, of whose many names in decimals JSON has the shortest."""
    return float(np.float32(row["score"]))


def _result(line: dict[str, Any], store: Store) -> Result:
    query, said = line["query"], line["query"]["instruction"]
    prompts = tuple(said) if isinstance(said, list) else () if said is None else (said,)
    candidates = tuple(
        Candidate(row["candidate_id"], row["rank"], _score(row), row["relevance"], row["text"],
                  _picture(row["image"], store), row["modality"]) for row in line["candidates"])
    return Result(Query(query["query_id"], query["text"], _picture(query["image"], store), query["modality"], prompts),
                  candidates)


def _uniir_result(line: dict[str, Any], store: Store) -> Result:
    """UniIR's keys; a complement stands there for candidates of one modality only, in their order."""
    query, partners = line["query"], iter(line.get("complement_candidates") or ())
    positives, candidates = set(query.get("pos_cand_list") or ()), []
    for rank, row in enumerate(line["candidates"], 1):
        partner = next(partners, None) if row["modality"] in ("text", "image") else None
        complement = partner and Complement(partner["did"], None, None, partner.get("txt"),
                                            _picture(partner.get("img_path"), store), partner["modality"])
        relevance = 1 if row["did"] in positives else None
        candidates.append(Candidate(row["did"], rank, None, relevance, row.get("txt"),
                                    _picture(row.get("img_path"), store), row["modality"], complement))
    return Result(Query(query["qid"], query["query_txt"], _picture(query["query_img_path"], store),
                        query["query_modality"], ()), tuple(candidates))


def _with_complements(result: Result, line: dict[str, Any] | None, store: Store, where: str) -> Result:
    ids = [candidate.candidate_id for candidate in result.candidates]
    if line is None or line["query_id"] != result.query.query_id or line["candidates"] != ids:
        raise UserError("the complements are those of other results", where,
                        "make them again (python -m pipeline complements), or name their file: complements=PATH")
    partners = (row and Complement(row["candidate_id"], row["rank"], _score(row), row["text"],
                                   _picture(row["image"], store), row["modality"]) for row in line["complements"])
    return Result(result.query, tuple(replace(own, complement=partner)
                                      for own, partner in zip(result.candidates, partners)))
