"""The adapter of BEIR's layout against small trees written by hand, and against what it writes itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pipeline.benchmarks import Benchmark, Task, beir, load_adapter
from pipeline.support.errors import UserError
from pipeline.tables import Candidate, Qrel, Query

CONFIG = Path(__file__).parents[2] / "configs" / "benchmarks" / "beir.yaml"


def task(name: str, pool: str | None = None) -> Task:
    return Task(name, pool or name, (1, 10), "ndcg@10")


def benchmark(root: Path, *tasks: Task, split: str = "test") -> Benchmark:
    return Benchmark("beir", "beir", str(root), split, tasks)


def write(folder: Path, qrels: str = "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\n", **files: list[Any]) -> Path:
    rows: dict[str, list[Any]] = {
        "corpus": [{"_id": "d1", "title": " Bees ", "text": "They fly. "}, {"_id": "d2", "title": "", "text": "Zoo"},
                   {"_id": "q1", "text": "", "title": "Only a title", "metadata": {}}],
        "queries": [{"_id": "q1", "text": "what flies", "metadata": {}}, {"_id": "q2", "text": "of another split"}],
        **files}
    (folder / "qrels").mkdir(parents=True)
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return folder


def read(given: Benchmark, name: str = "toys") -> tuple[list[Query], list[Candidate], list[Qrel]]:
    adapter, chosen = load_adapter("beir"), next(each for each in given.tasks if each.name == name)
    adapter.prepare(given)
    return (list(adapter.queries(given, chosen)), list(adapter.candidates(given, chosen.pool)),
            list(adapter.qrels(given, chosen)))


def test_rows_are_read_as_beir_means_them(tmp_path: Path) -> None:
    write(tmp_path / "toys")
    queries, candidates, qrels = read(benchmark(tmp_path, task("toys")))
    assert queries == [Query("q1", "what flies", None, "text", [], [])]
    assert candidates == [Candidate("d1", "Bees They fly.", None, "text"), Candidate("d2", "Zoo", None, "text"),
                          Candidate("q1", "Only a title", None, "text")]
    assert qrels == [Qrel("q1", "d1", 1), Qrel("q1", "d2", 0)]
    assert beir.candidate_modality(benchmark(tmp_path), task("toys")) == "text"


def test_a_single_task_may_lie_in_the_root_itself(tmp_path: Path) -> None:
    write(tmp_path)
    assert len(read(benchmark(tmp_path, task("toys")))[1]) == 3
    with pytest.raises(UserError, match="task toys needs queries.jsonl"):
        read(benchmark(tmp_path, task("toys"), task("zoo")))


def test_a_pool_may_be_anothers(tmp_path: Path) -> None:
    write(tmp_path / "toys")
    (write(tmp_path / "more", queries=[{"_id": "q1", "text": "other"}]) / "corpus.jsonl").unlink()
    queries, candidates, _ = read(benchmark(tmp_path, task("toys"), task("more", "toys")), "more")
    assert queries[0].text == "other" and len(candidates) == 3


def test_ids_may_be_numbers_and_the_header_may_be_missing(tmp_path: Path) -> None:
    """As EvalScope's image_caption writes them."""
    write(tmp_path / "toys", "0\t0\t1\n1\t0\t1\n", corpus=[{"_id": 0, "text": "a"}],
          queries=[{"_id": 0, "text": "b"}, {"_id": 1, "text": "c"}])
    queries, candidates, qrels = read(benchmark(tmp_path, task("toys")))
    assert [query.query_id for query in queries] == ["0", "1"] and candidates[0].candidate_id == "0"
    assert qrels == [Qrel("0", "0", 1), Qrel("1", "0", 1)]


@pytest.mark.parametrize("qrels, line", [("q1\td1\t1\nq1 d1 1\n", 2), ("q\tc\ts\nq1\td1\tmuch\n", 2),
                                         ("q1\td1\n", 1), ("q\tc\ts\nq1\t\t1\n", 2), ("q1\td1\t1.5\nq1\td1\t1.5\n", 2)])
def test_a_wrong_line_is_named(tmp_path: Path, qrels: str, line: int) -> None:
    write(tmp_path / "toys", qrels)
    with pytest.raises(UserError) as error:
        read(benchmark(tmp_path, task("toys")))
    assert f"test.tsv:{line}" in str(error.value)


@pytest.mark.parametrize("row", [{"text": "no id"}, {"_id": ""}, {"_id": True}, {"_id": 1.5}, {"_id": "a", "text": 3}])
def test_a_wrong_candidate_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    write(tmp_path / "toys", corpus=[{"_id": "d1", "text": "a"}, row])
    with pytest.raises(UserError, match="corpus.jsonl:2"):
        read(benchmark(tmp_path, task("toys")))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "toys")
    with pytest.raises(UserError, match="dev.tsv, which is not there"):
        read(benchmark(tmp_path, task("toys"), split="dev"))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    corpus = [("d\u00e9", "a \"text\"\u2028 with\nlines"), ("2", "")]
    judged = [Qrel("q", "d\u00e9", 2), Qrel("q", "2", 0)]
    beir.write(tmp_path / "toys", "test", corpus, [("q", "\U0001f600?")], judged)
    queries, candidates, qrels = read(benchmark(tmp_path, task("toys")))
    assert [(row.candidate_id, row.text) for row in candidates] == corpus and qrels == judged
    assert queries == [Query("q", "\U0001f600?", None, "text", [], [])]
    rows = [json.loads(line) for line in (tmp_path / "toys" / "qrels.jsonl").open()]
    assert rows[0] == {"query-id": "q", "corpus-id": "d\u00e9", "score": 2}


def test_the_shipped_benchmark_is_whole() -> None:
    shipped = OmegaConf.load(CONFIG)
    assert shipped.adapter == "beir" and len(shipped.tasks) == 11
    assert all(options.headline == "ndcg@10" for options in shipped.tasks.values())
