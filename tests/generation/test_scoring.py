"""References: the texts that the qrels call relevant, or those of a file; everything else is refused or left out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.artifacts import Artifact, Identity
from pipeline.embeddings import write_table
from pipeline.generation.scoring import read_references, relevant_texts
from pipeline.stages.score import Job
from pipeline.support.errors import UserError
from pipeline.tables import CANDIDATES, QRELS, Candidate, Qrel, table_of


@dataclass(frozen=True)
class NoParams(artifacts.Params):
    subject: str


def artifact_of(root: Path, name: str) -> Artifact[NoParams]:
    return Artifact(root, name, Identity("collect", 1, NoParams(name), {}))


def test_references_are_the_texts_of_relevant_candidates_of_all_pools(tmp_path: Path) -> None:
    task, pools = artifact_of(tmp_path, "task"), (artifact_of(tmp_path, "one"), artifact_of(tmp_path, "two"))
    rows = [[Candidate("c1", "first", None, "text"), Candidate("c2", "second", None, "text")],
            [Candidate("c3", None, "3.png", "image"), Candidate("c4", "fourth", "4.png", "image,text"),
             Candidate("c5", "  ", None, "text")]]
    for pool, candidates in zip(pools, rows):
        write_table(pool.path("candidates-00000.parquet"), table_of(candidates, CANDIDATES), pool.fingerprint)
        pool.seal({"shards": [{"file": "candidates-00000.parquet"}]})
    judged = [Qrel("q1", "c1", 1), Qrel("q1", "c2", 0), Qrel("q1", "c4", 2), Qrel("q1", "elsewhere", 1),
              Qrel("q2", "c3", 1), Qrel("q3", "c2", -1), Qrel("q4", "c5", 1), Qrel("q5", "c2", 1)]
    write_table(task.path("qrels.parquet"), table_of(judged, QRELS), task.fingerprint)
    job = Job(task, task, task, pools, task)  # type: ignore[arg-type]
    assert relevant_texts(job) == {"q1": ["first", "fourth"], "q5": ["second"]}


@pytest.mark.parametrize("line", [{"query_id": "b"}, {"query_id": "b", "references": []}, {"references": ["x"]},
                                  {"query_id": "b", "references": [1]}, {"query_id": "a", "references": ["x"]}])
def test_a_wrong_line_of_references_is_named(tmp_path: Path, line: dict[str, object]) -> None:
    path = tmp_path / "references.jsonl"
    good = {"query_id": "a", "references": ["x", ""], "more": 1}
    path.write_text(json.dumps(good) + "\n")
    assert read_references(path) == {"a": ["x", ""]}
    path.write_text(json.dumps(good) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(UserError, match="references.jsonl:2"):
        read_references(path)
