"""The M-BEIR adapter against small trees written by hand: what rows become, and what is refused where."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pipeline.benchmarks import Benchmark, Task, mbeir
from pipeline.benchmarks.mbeir import format_string
from pipeline.support.errors import UserError
from pipeline.tables import Candidate, Qrel, Query

CONFIG = Path(__file__).parents[2] / "configs" / "benchmarks" / "mbeir.yaml"
HEADER = "query_modality\tcand_modality\tdataset\tdataset_id\tprompt_1\tprompt_2\tprompt_3\tprompt_4"


def task(name: str, pool: str | None = None) -> Task:
    return Task(name, pool or name, (1, 5, 10), "hit@5")


def benchmark(root: Path, *tasks: Task, split: str = "test", **options: Any) -> Benchmark:
    return Benchmark("mbeir", "mbeir", str(root), split, tasks, options=options)


def write(path: Path, *rows: dict[str, Any] | str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
             for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def query(query_id: str, text: str | None = None, image: str | None = None, **more: Any) -> dict[str, Any]:
    modality = ",".join(kind for kind, value in (("image", image), ("text", text)) if value is not None)
    return {"qid": query_id, "query_txt": text, "query_img_path": image, "query_modality": modality,
            "query_src_content": None, "pos_cand_list": ["9:1"], "neg_cand_list": [], **more}


def candidate(
        candidate_id: str, modality: str, text: str | None = None, image: str | None = None
) -> dict[str, Any]:
    return {"did": candidate_id, "modality": modality, "txt": text, "img_path": image, "src_content": "{}"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One task of MSCOCO's and one of WebQA's, in test."""
    write(tmp_path / "query/test/mbeir_mscoco_task0_test.jsonl",
          query("9:2", "A dog.", task_id=0), query("9:1", "a \"cat\"", task_id=0))
    write(tmp_path / "qrels/test/mbeir_mscoco_task0_test_qrels.txt", "9:2 0 9:7 1 0", "9:1 0 9:5 1 0")
    write(tmp_path / "cand_pool/local/mbeir_mscoco_task0_test_cand_pool.jsonl",
          candidate("9:7", "image", image="images/7.jpg"), candidate("9:5", "image", image="images/5.jpg"))
    write(tmp_path / "query/test/mbeir_webqa_task2_test.jsonl", query("2:1", "Where is it?"))
    write(tmp_path / "qrels/test/mbeir_webqa_task2_test_qrels.txt", "2:1 0 2:1 1 2")
    write(tmp_path / "cand_pool/local/mbeir_webqa_task2_cand_pool.jsonl",
          candidate("2:1", "image,text", "a vane", "mbeir_images/1.jpg"))
    write(tmp_path / "instructions/query_instructions.tsv", HEADER,
          "text\timage\tMSCOCO\t9\tfind an image\t\tShow me one?\t",
          "text\timage,text\tWebQA\t2\tFind a page.")
    return tmp_path


MSCOCO = task("mscoco_task0", "mscoco_task0_test")
WEBQA = task("webqa_task2")


def refused(message: str, where: object, rows: Any) -> UserError:
    with pytest.raises(UserError, match=message) as caught:
        list(rows)
    assert caught.value.where == str(where)
    return caught.value


@pytest.mark.parametrize("text, expected", [
    (None, ""), ("", ""), ("   ", ""), ('"', ""),
    ("red bus", "Red bus."),
    ("is it open?", "Is it open?"),
    ("  tall tree \r\n", "Tall tree."),
    ('"quoted caption"', "Quoted caption."),
    ('" spaced inside"', " spaced inside."),
    (" spaced inside.", "Spaced inside."),
    ('he said "hi"', 'He said "hi.'),
    ("line one\nline two", "Line one\nline two."),
    ("iPhone 6", "IPhone 6."),
    ("ends\u2026", "Ends\u2026."),
    ("stop!", "Stop!"), ("NATO", "NATO."), ("a\rb", "Ab."),
    ("\u00e9t\u00e9", "\u00c9t\u00e9."), ("'s", "'s."),
])
def test_golden_vectors_of_format_string(text: str | None, expected: str) -> None:
    assert format_string(text) == expected


@given(st.text())
def test_format_string_agrees_with_its_definition_as_patterns(text: str) -> None:
    stripped = re.sub(r'\A"+|"+\Z', "", re.sub(r"\A\s+|\s+\Z", "", text.replace("\r", "")))
    stop = "" if re.search(r"[.?!]\Z", stripped) else "."
    expected = stripped and stripped[:1].upper() + stripped[1:] + stop
    assert format_string(text) == expected


def test_queries_come_in_file_order_with_every_prompt(root: Path) -> None:
    prompts = ["Find an image.", "Show me one?"]
    assert list(mbeir.queries(benchmark(root), MSCOCO)) == [
        Query("9:2", "A dog.", None, "text", prompts, ["Find an image. A dog.", "Show me one? A dog."]),
        Query("9:1", 'A "cat.', None, "text", prompts, ['Find an image. a "cat.', 'Show me one? a "cat.'])]
    assert list(mbeir.queries(benchmark(root), WEBQA)) == [
        Query("2:1", "Where is it?", None, "text", ["Find a page."], ["Find a page. Where is it?"])]


def test_an_image_query_has_no_text_but_its_instructions_have(root: Path) -> None:
    write(root / "query/test/mbeir_nights_task4_test.jsonl", query("4:1", image="a.jpg"),
          query("4:2", image="b.jpg") | {"query_txt": ""})
    write(root / "instructions/query_instructions.tsv", HEADER, "image\timage\tNIGHTS\t4\tfind the same")
    assert list(mbeir.queries(benchmark(root), task("nights_task4"))) == [
        Query("4:1", None, "a.jpg", "image", ["Find the same."], ["Find the same."]),
        Query("4:2", None, "b.jpg", "image", ["Find the same."], ["Find the same."])]


def test_without_instructions_their_file_is_neither_needed_nor_a_source(root: Path) -> None:
    bare = benchmark(root, MSCOCO, WEBQA, instructions=False)
    with_instructions = mbeir.task_sources(benchmark(root), MSCOCO)
    table = root / "instructions/query_instructions.tsv"
    table.unlink()
    mbeir.prepare(bare)
    assert [(row.instructions, row.instructed_texts) for row in mbeir.queries(bare, MSCOCO)] == [([], [])] * 2
    assert with_instructions == [*mbeir.task_sources(bare, MSCOCO), table]
    with pytest.raises(UserError, match="query_instructions.tsv") as caught:
        mbeir.prepare(benchmark(root, MSCOCO))
    assert "benchmark.options.instructions=false" in str(caught.value)


def test_a_task_without_a_row_of_instructions_is_refused_by_its_key(root: Path) -> None:
    table = root / "instructions/query_instructions.tsv"
    for rows in (["text\timage\tWebQA\t2\tFind."], ["text\timage,text\tX\t22\tFind."],
                 ["text\timage,text\tX\t2"], ["text\timage,text\tWebQA\t2\t\"\t"]):
        write(table, HEADER, *rows)
        error = refused("data set 2, text -> image,text", table, mbeir.queries(benchmark(root), WEBQA))
        assert "benchmark.options.instructions=false" in str(error.do)


@pytest.mark.parametrize("message, row", [
    ("two modalities", "text\timage\tX"), ("two modalities", "text image X 9 Find."),
    ("two modalities", "text\tvideo\tX\t9\tFind."), ("second row", "text\timage\tMSCOCO\t9\tAgain."),
    ("not UTF-8", b"text\timage\tX\t3\t\xff")])
def test_broken_rows_of_instructions_are_refused(root: Path, message: str, row: str | bytes) -> None:
    table = root / "instructions/query_instructions.tsv"
    write(table, HEADER, "", "text\timage\tMSCOCO\t9\tFind.", row)
    refused(message, f"{table}:4", mbeir.queries(benchmark(root), MSCOCO))


def test_the_header_is_skipped_unread_and_modalities_are_canonical(root: Path) -> None:
    write(root / "instructions/query_instructions.tsv",
          b"\xef\xbb\xbftext\timage,text\tWebQA\t2\tNot this one.",
          "text\ttext,image\tWebQA\t2\tThis one.\r")
    assert [row.instructions for row in mbeir.queries(benchmark(root), WEBQA)] == [["This one."]]


def test_candidates_come_in_file_order_from_every_lenient_form(root: Path) -> None:
    path = root / "cand_pool/local/mbeir_webqa_task2_cand_pool.jsonl"
    first = json.dumps(candidate("2:9", "text,image", "both", "9.jpg"))
    write(path, b"\xef\xbb\xbf" + first.encode() + b"\r",
          {"did": "2:3", "txt": "no image key", "modality": "text"}, "", "   ",
          {"did": "2:3", "txt": None, "img_path": "3.jpg", "modality": "image", "src_content": {"any": []}},
          {"did": "2:4", "txt": "", "img_path": "4.jpg", "modality": "image,text"},
          {"did": "2:7", "txt": None, "img_path": "7.jpg", "modality": "image,text"},
          {"did": "2:5", "txt": " ", "img_path": "", "modality": "text"},
          {"did": "2:6", "txt": "smile \U0001f600 \u2028 here", "modality": "text"})
    assert list(mbeir.candidates(benchmark(root), "webqa_task2")) == [
        Candidate("2:9", "Both.", "9.jpg", "image,text"), Candidate("2:3", "No image key.", None, "text"),
        Candidate("2:3", None, "3.jpg", "image"), Candidate("2:4", None, "4.jpg", "image,text"),
        Candidate("2:7", None, "7.jpg", "image,text"),
        Candidate("2:5", "", None, "text"), Candidate("2:6", "Smile \U0001f600 \u2028 here.", None, "text")]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.booleans()), max_size=20))
def test_any_text_comes_back_formatted(tmp_path_factory: Any, rows: list[tuple[str, bool]]) -> None:
    root = tmp_path_factory.mktemp("m")
    write(root / "cand_pool/local/mbeir_x_task1_cand_pool.jsonl", *(
        json.dumps({"did": f"1:{row}", "txt": text, "modality": "text"}, ensure_ascii=escaped)
        for row, (text, escaped) in enumerate(rows)))
    assert list(mbeir.candidates(benchmark(root), "x_task1")) == [
        Candidate(f"1:{row}", format_string(text), None, "text") for row, (text, _) in enumerate(rows)]


def test_listed_candidates_are_strings_or_objects(root: Path) -> None:
    write(root / "query/test/mbeir_webqa_task2_test.jsonl",
          query("2:1", "a", pos_cand_list=["2:1", "2:2"], neg_cand_list=[{"did": "2:3"}, "2:4"]),
          query("2:2", "b", pos_cand_list=None, neg_cand_list=[]))
    lists = mbeir.candidate_lists(benchmark(root), WEBQA)
    assert list(lists) == [("2:1", ["2:1", "2:2"], ["2:3", "2:4"]), ("2:2", [], [])]
    path = root / "query/test/mbeir_webqa_task2_test.jsonl"
    for broken in ("2:1", {"did": "2:1"}, [1], [{"id": "2:1"}], [None], 7):
        write(path, query("2:1", "a", pos_cand_list=broken))
        refused("pos_cand_list", f"{path}:1", mbeir.candidate_lists(benchmark(root), WEBQA))


FIRST, SECOND = task("webqa_task1"), task("webqa_task2")


@pytest.fixture
def train(tmp_path: Path) -> Benchmark:
    """Two tasks of WebQA's in one train file, their queries in turns; 2:4 has no list of negatives."""
    train_tree(tmp_path, [query("2:1", "a", task_id=1, neg_cand_list=["2:9"]), query("2:2", "b", task_id=2),
                          query("2:3", "c", task_id=1, weight=[1.5]), {"qid": "2:4", "task_id": 2}],
               [f"2:{number} 0 2:1 1 {2 - number % 2}" for number in range(1, 5)])
    return benchmark(tmp_path, FIRST, SECOND, split="train")


def with_negatives(train: Benchmark, folder: object) -> Benchmark:
    return replace(train, options={"negatives": folder})


def test_rewritten_negatives_load_back_and_nothing_else_changes(train: Benchmark, tmp_path: Path) -> None:
    given = {SECOND: [("2:2", ["2:5"]), ("2:4", ["2:6", "2:7"])], FIRST: [("2:1", []), ("2:3", ["2:8"])]}
    paths = mbeir.rewrite_negatives(train, given, tmp_path / "mined")
    assert paths == [tmp_path / "mined/mbeir_webqa_train.jsonl"]
    before = [json.loads(line) for line in (tmp_path / "query/train" / paths[0].name).read_text().splitlines()]
    after = [json.loads(line) for line in paths[0].read_text().splitlines()]
    expected = [{**row, "neg_cand_list": lists} for row, lists in zip(before, ([], ["2:5"], ["2:8"], ["2:6", "2:7"]))]
    assert list(map(list, after)) == list(map(list, expected)) and after == expected
    for one, lists in given.items():
        found = mbeir.candidate_lists(with_negatives(train, str(tmp_path / "mined")), one)
        assert [(query_id, negatives) for query_id, _, negatives in found] == lists
    assert [path.name for path in (tmp_path / "mined").iterdir()] == [paths[0].name]


def test_lines_of_other_tasks_are_the_same_text(train: Benchmark, tmp_path: Path) -> None:
    source = tmp_path / "query/train/mbeir_webqa_train.jsonl"
    odd = '{"qid":"2:2","task_id":2,  "neg_cand_list":null,"note":"caf\u00e9 \\u00e9", "weight": 1.50}'
    write(source, query("2:1", "caf\u00e9", task_id=1), odd.encode(),
          json.dumps(query("2:3", "caf\u00e9", task_id=1), ensure_ascii=False).encode())
    (path,) = mbeir.rewrite_negatives(train, {FIRST: iter([("2:1", ["2:7"]), ("2:3", ["2:8"])])}, tmp_path / "mined")
    first, second, third = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert second == odd and first.isascii() and not third.isascii()
    assert [json.loads(line)["query_txt"] for line in (first, third)] == ["caf\u00e9"] * 2


@pytest.mark.parametrize("lists, line", [
    ([("2:1", [])], ":3"), ([("2:1", []), ("2:9", [])], ":3"), ([("2:3", []), ("2:1", [])], ":1"),
    ([("2:1", []), ("2:3", []), ("2:5", [])], "")])
def test_negatives_of_other_queries_are_refused_and_nothing_is_written(
        train: Benchmark, tmp_path: Path, lists: list[tuple[str, list[str]]], line: str) -> None:
    with pytest.raises(UserError, match="not those that were searched") as caught:
        mbeir.rewrite_negatives(train, {FIRST: lists}, tmp_path / "mined")
    assert caught.value.where == f"{tmp_path}/query/train/mbeir_webqa_train.jsonl{line}"
    assert list((tmp_path / "mined").iterdir()) == []


def test_a_missing_file_or_query_of_negatives_is_named(train: Benchmark, tmp_path: Path) -> None:
    mined, path = with_negatives(train, str(tmp_path / "mined")), tmp_path / "mined/mbeir_webqa_train.jsonl"
    error = refused("mbeir_webqa_train.jsonl", path, mbeir.candidate_lists(mined, FIRST))
    assert "benchmark.options.negatives=null" in str(error.do)
    write(path, query("2:1", "a", neg_cand_list=[{"did": "2:5"}]))
    refused("for query '2:3'", path, mbeir.candidate_lists(mined, FIRST))
    write(path, query("2:3", "c"), query("2:1", "a", neg_cand_list=["2:5"]))
    assert [row[2] for row in mbeir.candidate_lists(mined, FIRST)] == [["2:5"], []]
    write(path, query("2:3", "c"), query("2:1", "a", neg_cand_list="2:5"))
    refused("neg_cand_list", f"{path}:2", mbeir.candidate_lists(mined, FIRST))


def test_mined_negatives_are_for_train_queries_only(root: Path, train: Benchmark) -> None:
    test = with_negatives(benchmark(root, MSCOCO), "/nowhere")
    assert [row[0] for row in mbeir.candidate_lists(test, MSCOCO)] == ["9:2", "9:1"]
    for without in (None, ""):
        assert [row[2] for row in mbeir.candidate_lists(with_negatives(train, without), FIRST)] == [["2:9"], []]


BROKEN = [
    ("not a line of JSON", '{"did": "9:1", "modality": "im'), ("not a line of JSON", "[" * 100_000),
    ("not a line of JSON", '{"did": "9:1", "txt": "\\ud800", "modality": "text"}'),
    ("not a line of JSON", '{"did": "9:1", "txt": "\\uDFFF", "modality": "text"}'),
    ("not UTF-8", b'{"did": "9:1", "txt": "\xff", "modality": "text"}'),
    ("object is expected", '["9:1"]'), ("object is expected", "17"), ("object is expected", "null"),
    ("did is missing", {"modality": "image", "img_path": "a.jpg"}),
    ("did is missing", {"did": "", "modality": "image", "img_path": "a.jpg"}),
    ("did is missing", {"did": None, "modality": "image", "img_path": "a.jpg"}),
    ("did must be a string", {"did": 9, "modality": "image", "img_path": "a.jpg"}),
    ("txt must be a string", {"did": "9:1", "modality": "text", "txt": ["a"]}),
    ("img_path must be a string", {"did": "9:1", "modality": "image", "img_path": 1}),
    ("modality must be a string", {"did": "9:1", "modality": ["text"], "txt": "a"}),
    ("modality is 'video'", {"did": "9:1", "modality": "video", "txt": "a"}),
    ("modality is None", {"did": "9:1", "txt": "a"}),
    ("'image', but img_path is None", {"did": "9:1", "modality": "image"}),
    ("'image', but img_path is None", {"did": "9:1", "modality": "image", "img_path": ""}),
    ("'image,text', but img_path is None", {"did": "9:1", "modality": "text,image", "txt": "a"}),
    ("'text', but txt is None", {"did": "9:1", "modality": "text"}),
    ("'text', but img_path is 'a.jpg'", {"did": "9:1", "modality": "text", "txt": "a", "img_path": "a.jpg"}),
    ("'image', but txt is 'a'", {"did": "9:1", "modality": "image", "txt": "a", "img_path": "a.jpg"}),
]


@pytest.mark.parametrize("message, row", BROKEN)
def test_broken_candidates_are_refused_by_file_and_line(root: Path, message: str, row: Any) -> None:
    path = write(root / "cand_pool/local/mbeir_webqa_task2_cand_pool.jsonl",
                 candidate("2:1", "text", "fine"), "", row, candidate("2:2", "text", "fine"))
    refused(message, f"{path}:3", mbeir.candidates(benchmark(root), "webqa_task2"))


@pytest.mark.parametrize("message, row", [
    ("qid is missing", {"query_txt": "a", "query_modality": "text"}),
    ("query_img_path is None", query("9:3") | {"query_modality": "image"}),
    ("in mscoco_task0 it must be 'text'", query("9:3", image="a.jpg")),
    ("task_id is 3 in a file of mscoco_task0", query("9:3", "a", task_id=3)),
    ("task_id must be a number", query("9:3", "a", task_id="0")),
    ("task_id must be a number", query("9:3", "a", task_id=9)),
    ("task_id must be a number", query("9:3", "a", task_id=False)),
])
def test_broken_queries_are_refused_by_file_and_line(root: Path, message: str, row: dict[str, Any]) -> None:
    path = write(root / "query/test/mbeir_mscoco_task0_test.jsonl", query("9:1", "fine"), row)
    refused(message, f"{path}:2", mbeir.queries(benchmark(root), MSCOCO))


def test_rows_stream(root: Path) -> None:
    path = root / "cand_pool/local/mbeir_webqa_task2_cand_pool.jsonl"
    write(path, candidate("2:1", "text", "fine"), "broken")
    assert next(iter(mbeir.candidates(benchmark(root), "webqa_task2"))).candidate_id == "2:1"


def test_qrels_keep_grades_strangers_and_every_row_of_a_tasks_own_file(root: Path) -> None:
    path = root / "qrels/test/mbeir_webqa_task2_test_qrels.txt"
    write(path, "2:1 0 2:9 1 2", "2:1\t0\t3:9\t0\t2\r", "", "  2:4 Q0 2:8 -2 2", "2:5 0 2:7 3 1")
    assert list(mbeir.qrels(benchmark(root), WEBQA)) == [
        Qrel("2:1", "2:9", 1), Qrel("2:1", "3:9", 0), Qrel("2:4", "2:8", -2), Qrel("2:5", "2:7", 3)]


@pytest.mark.parametrize("message, row", [
    ("not 3", "2:1 0 2:9"), ("not 6", "2:1 0 2:9 1 2 x"), ("not 1", "{}"), ("not yes 2", "2:1 0 2:9 yes 2"),
    ("not 1.0 2", "2:1 0 2:9 1.0 2"), ("not 1_0", "2:1 0 2:9 1_0 2"), ("not 4", "2:1 0 2:9 1"),
    ("not 1 two", "2:1 0 2:9 1 two"), ("not 99999999999", "2:1 0 2:9 99999999999 2"),
    ("not UTF-8", b"2:1 0 2:\xff 1 2")])
def test_broken_qrels_are_refused_by_file_and_line(root: Path, message: str, row: str | bytes) -> None:
    path = write(root / "qrels/test/mbeir_webqa_task2_test_qrels.txt", "2:1 0 2:9 1 2", row)
    refused(message, f"{path}:2", mbeir.qrels(benchmark(root), WEBQA))


def train_tree(root: Path, queries: list[dict[str, Any]], judgements: list[str]) -> None:
    write(root / "query/train/mbeir_webqa_train.jsonl", *queries)
    write(root / "qrels/train/mbeir_webqa_train_qrels.txt", *judgements)
    write(root / "instructions/query_instructions.tsv", HEADER, "text\ttext\tWebQA\t2\tA.",
          "text\timage,text\tWebQA\t2\tB.")
    write(root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl", candidate("1:1", "text", "other"),
          candidate("2:1", "text", "ours"), candidate("2:2", "text,image", "ours", "2.jpg"),
          candidate("22:1", "text", "other"), candidate("2:3", "text", "ours"))


TASKS_GIVEN: dict[str, tuple[list[int | None], list[str]]] = {
    "in queries": ([1, 2, 1], ["2:1 0 2:1 1 2", "2:2 0 2:2 1 1", "2:1 0 5:7 1 2", "2:3 0 2:3 1 2"]),
    "in qrels": ([None] * 3, ["2:1 0 2:1 1 1", "2:2 0 2:2 1 2", "2:1 0 5:7 1 2", "2:3 0 2:3 1 1"]),
    "in both": ([1, 2, None], ["2:1 0 2:1 1 1", "2:2 0 2:2 1 2", "2:1 0 5:7 1 1", "2:3 0 2:3 1 1"]),
}


@pytest.mark.parametrize("place", TASKS_GIVEN)
def test_train_is_parted_by_the_task_of_the_query(tmp_path: Path, place: str) -> None:
    numbers, judgements = TASKS_GIVEN[place]
    train_tree(tmp_path, [query(f"2:{row}", "a") | ({} if number is None else {"task_id": number})
                          for row, number in enumerate(numbers, 1)], judgements)
    first, second = task("webqa_task1"), task("webqa_task2", "webqa_task2_train")
    train = benchmark(tmp_path, first, second, split="train")
    mbeir.prepare(train)
    assert [(row.query_id, row.instructions) for row in mbeir.queries(train, first)] == [
        ("2:1", ["A."]), ("2:3", ["A."])]
    assert [(row.query_id, row.instructions) for row in mbeir.queries(train, second)] == [("2:2", ["B."])]
    assert [row.candidate_id for row in mbeir.qrels(train, first)] == ["2:1", "5:7", "2:3"]
    assert [row.candidate_id for row in mbeir.qrels(train, second)] == ["2:2"]
    assert [row.candidate_id for row in mbeir.candidates(train, first.pool)] == ["2:1", "2:3"]
    assert [row.candidate_id for row in mbeir.candidates(train, second.pool)] == ["2:2"]


def test_a_train_query_of_no_known_task_is_refused(tmp_path: Path) -> None:
    train_tree(tmp_path, [query("2:1", "a", task_id=1), query("2:2", "b")], ["2:1 0 2:1 1 1"])
    train = benchmark(tmp_path, split="train")
    for rows in (mbeir.queries, mbeir.qrels):
        refused("the task of this query is not known", f"{tmp_path}/query/train/mbeir_webqa_train.jsonl:2",
                rows(train, task("webqa_task1")))


def test_judgements_of_unknown_train_queries_are_left_for_the_audit(tmp_path: Path) -> None:
    train_tree(tmp_path, [query("2:1", "a", task_id=1)], ["2:1 0 2:1 1 1", "2:99 0 2:1 1 1"])
    train = benchmark(tmp_path, split="train")
    assert [row.query_id for row in mbeir.qrels(train, task("webqa_task1"))] == ["2:1", "2:99"]


def test_a_train_pool_without_queries_is_refused(tmp_path: Path) -> None:
    train_tree(tmp_path, [], [])
    refused("no query", tmp_path / "query/train/mbeir_webqa_train.jsonl",
            mbeir.candidates(benchmark(tmp_path, split="train"), "webqa_task1"))


def test_a_complete_tree_is_accepted_and_its_sources_are_files_of_it(root: Path) -> None:
    whole = benchmark(root, MSCOCO, WEBQA)
    mbeir.prepare(whole)
    sources = {path for one in whole.tasks for path in mbeir.task_sources(whole, one)}
    sources |= {path for pool in whole.pools for path in mbeir.pool_sources(whole, pool)}
    assert sources == {path for path in root.rglob("*") if path.is_file()}


def test_val_reads_the_files_of_val(root: Path) -> None:
    write(root / "query/val/mbeir_mscoco_task0_val.jsonl", query("9:1", "another"))
    write(root / "qrels/val/mbeir_mscoco_task0_val_qrels.txt", "9:1 0 9:8 1 0")
    write(root / "cand_pool/local/mbeir_mscoco_task0_val_cand_pool.jsonl",
          candidate("9:8", "image", image="8.jpg"))
    val = benchmark(root, task("mscoco_task0", "mscoco_task0_val"), split="val")
    mbeir.prepare(val)
    assert [row.text for row in mbeir.queries(val, val.tasks[0])] == ["Another."]
    assert [row.candidate_id for row in mbeir.qrels(val, val.tasks[0])] == ["9:8"]
    assert [row.candidate_id for row in mbeir.candidates(val, val.pools[0])] == ["9:8"]


def test_what_is_not_m_beir_is_refused_with_advice(root: Path, tmp_path: Path) -> None:
    for directory in (tmp_path / "nowhere", root / "query"):
        with pytest.raises(UserError) as caught:
            mbeir.prepare(benchmark(directory, MSCOCO))
        assert caught.value.where == str(directory) and "MBEIR_DATA_DIR" in str(caught.value.do)
    with pytest.raises(UserError, match="split 'tset'"):
        mbeir.prepare(benchmark(root, MSCOCO, split="tset"))


@pytest.mark.parametrize("wrong, nearest", [
    (task("mscoco_task1", "mscoco_task0_test"), "mbeir_mscoco_task0_test.jsonl"),
    (task("webqaa_task2", "webqa_task2"), "mbeir_webqa_task2_test.jsonl"),
    (task("webqa_task2", "webq_task2"), "mbeir_webqa_task2_cand_pool.jsonl")])
def test_unknown_tasks_and_pools_are_refused_with_the_nearest(root: Path, wrong: Task, nearest: str) -> None:
    with pytest.raises(UserError) as caught:
        mbeir.prepare(benchmark(root, wrong))
    assert nearest in str(caught.value.do)


@pytest.mark.parametrize("name", ["mscoco", "mscoco_task9", "task0", "mscoco_task0_test", "../x_task0"])
def test_names_that_are_no_tasks_are_refused(root: Path, name: str) -> None:
    with pytest.raises(UserError, match="is not a task of M-BEIR"):
        mbeir.prepare(benchmark(root, task(name)))


def test_a_file_that_vanishes_after_prepare_is_a_users_error(root: Path) -> None:
    refused("cannot be read", root / "cand_pool/local/mbeir_gone_cand_pool.jsonl",
            mbeir.candidates(benchmark(root), "gone"))


def test_what_a_task_seeks_is_known_from_its_number(root: Path) -> None:
    sought = [mbeir.candidate_modality(benchmark(root), task(f"x_task{number}")) for number in range(9)]
    assert sought == ["image", "text", "image,text", "text", "image", "image,text", "text", "image",
                      "image,text"]


def test_the_configuration_lists_the_sixteen_test_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBEIR_DATA_DIR", "/data/M-BEIR")
    config = OmegaConf.to_container(OmegaConf.load(CONFIG), resolve=True)
    assert isinstance(config, dict)
    tasks = config["tasks"]
    assert (config["adapter"], config["root"], config["split"]) == ("mbeir", "/data/M-BEIR", "test")
    assert list(tasks) == (
        "visualnews_task0 mscoco_task0 fashion200k_task0 webqa_task1 edis_task2 webqa_task2 visualnews_task3 "
        "mscoco_task3 fashion200k_task3 nights_task4 oven_task6 infoseek_task6 fashioniq_task7 cirr_task7 "
        "oven_task8 infoseek_task8").split()
    for name, given_task in tasks.items():
        is_fashion = name.startswith("fashion")
        assert given_task["headline"] == ("hit@10" if is_fashion else "hit@5"), name
        assert given_task.get("cutoffs") == ([10, 20, 50] if is_fashion else None), name
        assert given_task.get("pool") == (f"{name}_{{split}}" if name.startswith("mscoco") else None), name


def test_the_root_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MBEIR_DATA_DIR", raising=False)
    assert OmegaConf.load(CONFIG).root == "M-BEIR"
