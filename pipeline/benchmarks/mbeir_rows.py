"""What single lines of M-BEIR's files say; used by the adapter `mbeir`, which knows the files.

Lenient about what cannot change a number: absent keys are null, `text,image` is `image,text`, candidates are
listed as strings or as objects, qrels have four columns or five. All else is a UserError with file and line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.support.errors import UserError
from pipeline.support.rows import Row, text_lines
from pipeline.tables import Qrel

# Number of a task -> modality of the query, modality of what is sought (5: declared by UniIR, used nowhere).
TASKS = {0: ("text", "image"), 1: ("text", "text"), 2: ("text", "image,text"), 3: ("image", "text"),
         4: ("image", "image"), 5: ("image", "image,text"), 6: ("image,text", "text"),
         7: ("image,text", "image"), 8: ("image,text", "image,text")}

_MODALITIES = {"text": "text", "image": "image", "image,text": "image,text", "text,image": "image,text"}
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")  # fits the int32 of the qrels table

Key = tuple[str, str, str]  # data set id, modality of the query, modality of what is sought


def content(row: Row, text_key: str, image_key: str, modality_key: str) -> tuple[str | None, str | None, str]:
    """Text, image and modality of a row. They must agree; a text may be empty, beside an image also null."""
    text, image = row.string(text_key), row.string(image_key) or None
    given = row.string(modality_key)
    modality = _MODALITIES.get(given or "")
    if modality is None:
        raise row.error(f"{modality_key} is {given!r}", f"one of: {', '.join(map(repr, _MODALITIES))}")
    if text is None if modality == "text" else text and modality == "image":
        raise row.error(f"{modality_key} is '{modality}', but {text_key} is {text!r}")
    if (image is not None) != ("image" in modality):
        raise row.error(f"{modality_key} is '{modality}', but {image_key} is {image!r}")
    return text, image, modality


def task_number(row: Row) -> int | None:
    """The task that a query says it belongs to."""
    value = row.fields.get("task_id")
    if value is not None and (type(value) is not int or value not in TASKS):
        raise row.error(f"task_id must be a number from 0 to 8, not {value!r}")
    return value


def listed(row: Row, key: str) -> list[str]:
    """Ids of candidates, from strings or from objects with a `did`."""
    values = row.fields.get(key) or []
    if not isinstance(values, list):
        raise row.error(f"{key} must be a list, not {values!r}")
    ids = [value.get("did") if isinstance(value, dict) else value for value in values]
    names = [name for name in ids if isinstance(name, str)]
    if len(names) < len(ids):
        raise row.error(f"{key} must list strings, or objects with a did")
    return names


def judgements(path: Path) -> Iterator[tuple[Qrel, int]]:
    """The lines of a qrels file, each with the number of its task: M-BEIR has five columns where TREC has four."""
    for line, text in text_lines(path):
        columns = text.split()
        if len(columns) != 5:
            raise UserError(f"a line of M-BEIR's qrels has 5 columns, not {len(columns)}", f"{path}:{line}",
                            "they are: query id, 0, candidate id, relevance, task id")
        if not all(map(_INTEGER.fullmatch, columns[3:])):
            raise UserError(f"whole numbers are expected, not {' '.join(columns[3:])}", f"{path}:{line}")
        yield Qrel(columns[0], columns[2], int(columns[3])), int(columns[4])


def read_prompts(path: Path) -> dict[Key, list[str]]:
    """Prompts as they stand in the instructions table; its header is skipped unread, as in UniIR.

    Columns: query modality, candidate modality, name of the data set, its id, prompts (empty ones dropped).
    """
    prompts: dict[Key, list[str]] = {}
    for line, text in text_lines(path):
        if line == 1:
            continue
        cells = [cell.strip() for cell in text.split("\t")]
        if len(cells) < 4 or cells[0] not in _MODALITIES or cells[1] not in _MODALITIES:
            what = "two modalities, a name, a data set id and prompts are expected, with tabs between"
            raise UserError(what, f"{path}:{line}")
        key = cells[3], _MODALITIES[cells[0]], _MODALITIES[cells[1]]
        if key in prompts:
            raise UserError("a second row for these modalities of a data set", f"{path}:{line}", "keep one")
        prompts[key] = [cell for cell in cells[4:] if cell]
    return prompts
