"""Examples against dictionaries: who answers whom, who does not, what is left out, and how it is shared."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.support.errors import UserError
from pipeline.training.examples import Examples, ranges, write_examples
from tests.training.tiny import Task, candidates_table, examples_of, toys

POOL = [f"9:{number}" for number in range(6)]
KNOWN_OR_NOT = st.sampled_from([*POOL, "9:absent"])


class Drawn(NamedTuple):
    tasks: list[Task]
    repeats: dict[str, int] | None


@st.composite
def benchmarks(draw: st.DrawFn) -> Drawn:
    """One to three tasks; qrels and negatives also name queries and candidates that are not there."""
    tasks, names = [], []
    for number in range(draw(st.integers(1, 3))):
        ids = [f"{number}:{row}" for row in range(draw(st.integers(0, 4)))]
        named = st.sampled_from([*ids, f"{number}:absent"])
        pairs = draw(st.lists(st.tuples(named, KNOWN_OR_NOT, st.integers(0, 2)), max_size=10,
                              unique_by=lambda pair: pair[:2]))
        negatives = draw(st.none() | st.lists(
            st.tuples(named, st.lists(KNOWN_OR_NOT, max_size=4)), unique_by=lambda own: own[0], max_size=4))
        texts = draw(st.lists(st.none() | st.sampled_from(["", "a"]), min_size=len(ids), max_size=len(ids)))
        queries = [(name, text, draw(st.none() | st.just("x.png")), draw(st.integers(0, 2)))
                   for name, text in zip(ids, texts)]
        tasks.append(Task(f"set_task{number}", queries, pairs, negatives))
        names += ids
    repeats = draw(st.none() | st.dictionaries(st.sampled_from([*names, "nobody"]), st.integers(0, 3)))
    return Drawn(tasks, repeats)


def expected_rows(drawn: Drawn) -> list[dict[str, Any]]:
    """The definition, with dictionaries and loops."""
    rows = []
    for task in drawn.tasks:
        negatives = dict(task.negatives or ())
        for query_id, text, image, num_prompts in task.queries:
            answers = [own for asked, own, relevance in task.pairs if asked == query_id and relevance > 0]
            positives = [POOL.index(own) for own in answers if own in POOL]
            wrong = dict.fromkeys(POOL.index(own) for own in negatives.get(query_id, ()) if own in POOL)
            prompted = [" ".join(filter(None, (f"Prompt {number}.", text))) for number in range(num_prompts)]
            repeats = 1 if drawn.repeats is None else drawn.repeats.get(query_id, 0)
            if positives:
                rows.append({"query_id": query_id, "task": task.name, "text": text, "image": image,
                             "instructed_texts": prompted, "positives": positives,
                             "negatives": [row for row in wrong if row not in positives], "repeats": repeats})
    return rows


def pool() -> pa.Table:
    return candidates_table((own, own, None) for own in POOL)


@settings(max_examples=60)
@given(benchmarks())
def test_what_is_read_back_is_what_dictionaries_say(drawn: Drawn) -> None:
    expected = expected_rows(drawn)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tables = [task.tables() for task in drawn.tasks]
        if not expected:
            with pytest.raises(UserError, match="no query has a positive"):
                write_examples(directory, tables, pool(), drawn.repeats)
            return
        facts = write_examples(directory, tables, pool(), drawn.repeats)
        examples = Examples(directory)
        assert examples.queries.to_pylist() == expected
        assert examples.candidates.to_pylist() == [{"candidate_id": own, "text": own, "image": None} for own in POOL]
        known = {query[0] for task in drawn.tasks for query in task.queries}
        relevant = [pair for task in drawn.tasks for pair in task.pairs if pair[0] in known and pair[2] > 0]
        assert facts == {
            "queries": len(expected), "candidates": len(POOL),
            "rows_per_epoch": sum(row["repeats"] for row in expected),
            "queries_without_positive": len(known) - len(expected),
            "positives_outside_pools": sum(own not in POOL for _, own, _ in relevant)}
        for row, wanted in enumerate(expected):
            assert examples.positives.of(row).tolist() == wanted["positives"]
            assert examples.negatives.of(row).tolist() == wanted["negatives"]
            assert examples.task_names[examples.tasks[row]] == wanted["task"]


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 5), unique=True, min_size=1, max_size=4), min_size=1, max_size=5), st.data())
def test_are_positive_against_brute_force(answers: list[list[int]], data: st.DataObject) -> None:
    """Columns repeat, are -1 where there is no candidate, or are none at all; so do queries."""
    queries = np.array(data.draw(st.lists(st.integers(0, len(answers) - 1), max_size=6)), np.int64)
    columns = np.array(data.draw(st.lists(st.integers(-1, 5), max_size=9)), np.int64)
    task = Task("set_task0", [(f"0:{row}", None, None, 0) for row in range(len(answers))],
                [(f"0:{row}", POOL[own], 1) for row, listed in enumerate(answers) for own in listed])
    with tempfile.TemporaryDirectory() as name:
        examples = examples_of(Path(name), [task], ((own, own, None) for own in POOL))
        found = examples.are_positive(queries, columns)
    expected = [[int(column) in answers[query] for column in columns] for query in queries]
    assert found.dtype == bool and found.shape == (len(queries), len(columns))
    assert found.tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4))))
def test_ranges_one_after_the_other(spans: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in spans], np.int64)
    ends = starts + np.array([length for _, length in spans], np.int64)
    assert ranges(starts, ends).tolist() == [
        number for start, length in spans for number in range(start, start + length)]


def test_tables_of_several_shards(tmp_path: Path) -> None:
    """Collected tables come in shards: columns of many chunks."""
    whole = Task("set_task0", [(f"0:{row}", f"t{row}", None, 1) for row in range(5)],
                 [(f"0:{row}", POOL[row], 1) for row in range(1, 5)]).tables()
    cut = whole._replace(queries=pa.concat_tables([whole.queries.slice(0, 2), whole.queries.slice(2)]),
                         qrels=pa.concat_tables([whole.qrels.slice(0, 3), whole.qrels.slice(3)]))
    candidates = pool()
    for name, tables, pools in (("whole", whole, candidates),
                                ("cut", cut, pa.concat_tables([candidates.slice(0, 4), candidates.slice(4)]))):
        write_examples(tmp_path / name, [tables], pools, None)
    one, other = (Examples(tmp_path / name) for name in ("whole", "cut"))
    assert one.queries.to_pylist() == other.queries.to_pylist() and len(one.queries) == 4
    assert other.instructed_texts.of(0).tolist() == ["Prompt 0. t1"]
    for file in ("queries.arrow", "candidates.arrow"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


def test_two_processes_map_the_same_file(tmp_path: Path) -> None:
    """A pickle holds the directory alone; another process opens the same bytes and counts the same."""
    examples = toys(tmp_path, ["words", "both"]).examples
    assert examples.positives.of(2).tolist() == [2, 11]
    packed = pickle.dumps(examples)
    assert len(packed) < 1000, "what was read must not travel along"
    code = ("import json, pickle, sys; found = pickle.load(sys.stdin.buffer);"
            "rows = [found.positives.of(row).tolist() for row in range(len(found.queries))];"
            "maps = sum('queries.arrow' in line for line in open('/proc/self/maps'));"
            "print(json.dumps([rows, found.task_names, maps, sorted({'torch', 'PIL'} & set(sys.modules))]))")
    done = subprocess.run([sys.executable, "-c", code], input=packed, capture_output=True, check=True,
                          cwd=Path(__file__).parents[2])
    rows, names, maps, heavy = json.loads(done.stdout)
    assert rows == [examples.positives.of(row).tolist() for row in range(len(examples.queries))]
    assert names == examples.task_names == ["words_task0", "both_task1"] and heavy == []
    assert not sys.platform.startswith("linux") or maps > 0
