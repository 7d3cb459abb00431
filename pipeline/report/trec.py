"""Runs and qrels in the text formats of TREC, for other tools and from them.

A run line is `query_id Q0 candidate_id rank score tag`; a qrels line is `query_id 0 candidate_id relevance`,
to which M-BEIR adds a fifth column that is not read. Files are read and written in blocks by Arrow's column
kernels, so that millions of lines take seconds; in exchange a malformed line is looked for only after its
block has failed. Columns may be parted by any white space, and nothing is quoted. trec_eval compares scores
as float32 and breaks ties by candidate id, descending: it may rank a file with tied scores otherwise than
its rank column says (`order_run` knows both rules).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.support.errors import UserError
from pipeline.tables import QRELS, RUN

BLOCK_BYTES = 1 << 24
BLOCK_ROWS = 1 << 20

_OTHER_SPACES = bytes.maketrans(b"\t\v\f\r", b"    ")
_SPACE_OR_NOTHING = r"[\t-\r ]|^$"


class _Layout(NamedTuple):
    """The columns of a line, and the types of those that are read."""

    columns: str
    types: dict[str, pa.DataType]


_RUN_LAYOUT = _Layout("query_id Q0 candidate_id rank score tag", {
    "query_id": pa.string(), "rank": pa.int32(), "candidate_id": pa.string(), "score": pa.float64()})
_QRELS_LAYOUT = _Layout("query_id 0 candidate_id relevance", {
    "query_id": pa.string(), "candidate_id": pa.string(), "relevance": pa.int32()})


def read_trec_run(path: str | Path) -> pa.Table:
    """The rows of a run file as they stand there, in the schema RUN; `order_run` makes them fit to be judged.

    UserError names file and line of the first line that is malformed.
    """
    table = _read(Path(path), _RUN_LAYOUT)
    # By way of float64, as trec_eval reads them, so that what it takes for a tie is a tie here.
    score_H = table.column("score").to_numpy().astype(np.float32)
    return table.set_column(RUN.names.index("score"), "score", pa.array(score_H)).cast(RUN)


def read_trec_qrels(path: str | Path) -> pa.Table:
    """The rows of a qrels file of four or five columns as they stand there, in the schema QRELS.

    UserError names file and line of the first line that is malformed.
    """
    path = Path(path)
    with _open(path) as file:
        first = next((line for line in file if line.strip()), b"")
    columns = _QRELS_LAYOUT.columns + (" task" if len(first.split()) == 5 else "")
    return _read(path, _QRELS_LAYOUT._replace(columns=columns)).cast(QRELS)


def write_trec_run(table: pa.Table, path_or_file: str | Path | BinaryIO, tag: str) -> None:
    """Six columns; scores in the fewest digits that give the same float32 again.

    UserError: an identifier or a tag that is empty or holds white space, which the format cannot express.
    """
    _refuse_spaces(pa.array([tag]), "tag")
    columns = ["query_id", pa.scalar("Q0"), "candidate_id", "rank", "score", pa.scalar(tag)]
    _write(table, path_or_file, columns)


def write_trec_qrels(table: pa.Table, path_or_file: str | Path | BinaryIO) -> None:
    """Four columns; judgements of relevance 0 are kept.

    UserError: an identifier that is empty or holds white space, which the format cannot express.
    """
    _write(table, path_or_file, ["query_id", pa.scalar("0"), "candidate_id", "relevance"])


def _read(path: Path, layout: _Layout) -> pa.Table:
    tables, line = [_parse(b"", layout)], 1
    for block in _blocks(path):
        try:
            tables.append(_parse(block, layout))
        except pa.ArrowInvalid:
            _refuse_first_malformed(block, layout, path, line)
        line += block.count(b"\n")
    return pa.concat_tables(tables)


def _blocks(path: Path) -> Iterator[bytes]:
    """The file in blocks of whole lines."""
    with _open(path) as file:
        while block := file.read(BLOCK_BYTES):
            yield block + file.readline()


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(path)) from error


def _parse(block: bytes, layout: _Layout) -> pa.Table:
    """The typed columns of a block of lines; ArrowInvalid if a line is malformed."""
    text = _single_spaced(block)
    if not text.strip():
        return pa.table({name: pa.array([], kind) for name, kind in layout.types.items()})
    table = pyarrow.csv.read_csv(
        pa.py_buffer(text),
        pyarrow.csv.ReadOptions(column_names=layout.columns.split()),
        pyarrow.csv.ParseOptions(delimiter=" ", quote_char=False),
        # No word stands for null: a candidate may well be called "NA".
        pyarrow.csv.ConvertOptions(
            column_types=layout.types, include_columns=list(layout.types), null_values=[]))
    if "score" in layout.types and pc.any(pc.is_nan(table.column("score"))).as_py():
        raise pa.ArrowInvalid("the score is not a number")
    return table


def _single_spaced(block: bytes) -> bytes:
    """The lines of a block with one space between columns and none around them."""
    text = block.translate(_OTHER_SPACES)
    while b"  " in text:
        text = text.replace(b"  ", b" ")
    return text.replace(b" \n", b"\n").replace(b"\n ", b"\n").strip(b" ")


def _refuse_first_malformed(block: bytes, layout: _Layout, path: Path, line: int) -> None:
    """UserError naming the first malformed line of `block`, whose first line has number `line`."""
    rows = block.split(b"\n")

    def fails(last: int) -> bool:
        return bool(_flaw(b"\n".join(rows[:last + 1]), layout))

    first = bisect_left(range(len(rows)), True, key=fails)
    flaw = _flaw(rows[first], layout)
    found, expected = len(rows[first].split()), len(layout.columns.split())
    if found != expected:
        flaw = f"expected {expected} columns, got {found}"
    raise UserError(f"malformed line: {flaw}", f"{path}:{line + first}", f"a line reads: {layout.columns}")


def _flaw(block: bytes, layout: _Layout) -> str:
    try:
        _parse(block, layout)
    except pa.ArrowInvalid as error:
        return str(error)
    return ""


def _write(table: pa.Table, path_or_file: str | Path | BinaryIO, layout: list[str | pa.Scalar]) -> None:
    """Lines of columns (by name) and fixed words (scalars), parted by single spaces."""
    with _target(path_or_file) as file:
        for batch in table.to_batches(max_chunksize=BLOCK_ROWS):
            for name in ("query_id", "candidate_id"):
                _refuse_spaces(batch.column(name), name)
            columns = [batch.column(part).cast(pa.string()) if isinstance(part, str) else part
                       for part in layout]
            lines = pc.binary_join_element_wise(*columns, " ")
            lines = pc.binary_join_element_wise(lines, "", "\n")
            # The values of a string array stand one after the other in one buffer: that buffer is the file.
            num_bytes = pc.sum(pc.binary_length(lines).cast(pa.int64())).as_py() or 0
            assert lines.offset == 0, "a newly computed array starts at its buffer's start"
            file.write(lines.buffers()[2][:num_bytes])


def _target(path_or_file: str | Path | BinaryIO) -> AbstractContextManager[BinaryIO]:
    if isinstance(path_or_file, (str, Path)):
        return Path(path_or_file).open("wb")
    return nullcontext(path_or_file)


def _refuse_spaces(words: pa.Array, name: str) -> None:
    is_bad = pc.match_substring_regex(words.cast(pa.string()), _SPACE_OR_NOTHING)
    if pc.any(is_bad).as_py():
        bad = words[is_bad.index(True).as_py()]
        raise UserError(f"{name} '{bad}' is empty or holds white space: a TREC file cannot express it",
                        do="give such items other identifiers, or read the tables instead")
