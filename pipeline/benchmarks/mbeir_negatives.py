"""Hard negatives of M-BEIR's query files: read from files that stand elsewhere, and written into copies.

A copy differs from its original in the `neg_cand_list` of the rows that are given one, and in nothing else: other
lines are the same text. Lists are taken as they come, so that memory does not grow with their number; the price is
that they must come in the order of the rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.artifacts import atomic_path
from pipeline.benchmarks.mbeir_rows import listed
from pipeline.support.errors import UserError
from pipeline.support.rows import Row, json_rows, text_lines

_MINE = "mine them for this task too, or do without: benchmark.options.negatives=null"

Lists = Iterator[tuple[str, list[str]]]  # (query id, ids of its hard negatives)


class MinedNegatives:
    """Hard negatives by query id, from one query file."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"there are no hard negatives {path.name}", str(path), _MINE)
        self.path = path
        self.lists = {row.identifier("qid"): listed(row, "neg_cand_list") for row in json_rows(path)}

    def of(self, query_id: str) -> list[str]:
        if query_id not in self.lists:
            raise UserError(f"there are no hard negatives for query '{query_id}'", str(self.path), _MINE)
        return self.lists[query_id]


def copy_with_negatives(source: Path, destination: Path, tasks: Mapping[str, int], lists: Mapping[int, Lists]) -> None:
    """Copy a query file. `tasks` has the task number of each query, `lists` what the queries of a task get."""
    with atomic_path(destination) as path:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for row, (_, line) in zip(json_rows(source), text_lines(source)):
                number = tasks.get(row.identifier("qid"))
                if number is None:
                    raise _changed(f"{row.path}:{row.line}")
                file.write((_replaced(row, line, lists[number]) if number in lists else line) + "\n")
        if any(next(left, None) for left in lists.values()):
            raise _changed(str(source))


def _replaced(row: Row, line: str, lists: Lists) -> str:
    query_id, negatives = next(lists, ("", []))
    if query_id != row.identifier("qid"):
        raise _changed(f"{row.path}:{row.line}")
    # A key that is there keeps its place; text is escaped where it was.
    return json.dumps({**row.fields, "neg_cand_list": negatives}, ensure_ascii=line.isascii())


def _changed(where: str) -> UserError:
    return UserError("the queries of this file are not those that were searched", where,
                     "was it changed meanwhile? run the same command again")
