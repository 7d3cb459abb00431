"""Mining against brute force on mini M-BEIR, and against a few texts whose order can be told by eye."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmarks import load_adapter, mbeir, mini_mbeir
from pipeline.config import Experiment, for_split, load
from pipeline.encoders import Item
from pipeline.mining import Wanted, mine, on_train
from pipeline.support.errors import UserError
from tests.toy_encoder import Params, ToyEncoder

DIMENSION, COUNT, SKIP = 32, 6, 2
Rows = list[dict[str, Any]]


def quiet(*_: object) -> None:
    pass


def rows_of(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Mini M-BEIR at a hundredth of its size, all tasks, mined with the toy encoder."""
    directory = tmp_path_factory.mktemp("mining")
    mini_mbeir.generate(directory / "data", 0.01)
    path = directory / "toys.yaml"
    path.write_text("benchmark: mini_mbeir\nencoders: [tests.toy_encoder]\nembed: {loaders: 0, storage: float32, "
                    "instruction: none}\ncollect: {rows_per_shard: 20}\n"
                    f"encoders.tests_toy_encoder.dimension: {DIMENSION}\n")
    return load(str(path), [f"work_dir={directory / 'work'}", f"benchmark.root={directory / 'data'}",
                            "benchmark.options.scale=0.01", "retrieve.depth=60"])


@pytest.fixture(scope="module")
def mined(mini: Experiment) -> list[Path]:
    return mine(mini, COUNT, SKIP, quiet)


def vectors(root: Path, rows: Rows, text_key: str, image_key: str) -> np.ndarray:
    """float64 [N, D] of length 1: the encoder, called by hand on rows of M-BEIR's files."""
    encoder = ToyEncoder(Params(DIMENSION))
    found = []
    for row in rows:
        image = Image.open(root / row[image_key]).convert("RGB") if row.get(image_key) else None
        found.append(encoder.prepare(Item(mbeir.format_string(row.get(text_key)) or None, image)))
    vectors_ND = np.stack(found).astype(np.float64)
    return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def test_negatives_are_the_best_of_the_rest_by_brute_force(mini: Experiment, mined: list[Path]) -> None:
    root = Path(mini.benchmark.root)
    candidates = rows_of(root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl")
    place = {row["did"]: number for number, row in enumerate(candidates)}
    candidates_ND = vectors(root, candidates, "txt", "img_path")
    others = 0
    for path in mined:
        queries = rows_of(path)
        scores_QN = vectors(root, queries, "query_txt", "query_img_path") @ candidates_ND.T
        for query, scores_N in zip(queries, scores_QN):
            scores_N[[place[candidate_id] for candidate_id in query["pos_cand_list"]]] = -np.inf
            best_K = np.sort(scores_N)[::-1][SKIP:SKIP + COUNT]
            negatives = query["neg_cand_list"]
            found_K = scores_N[[place[candidate_id] for candidate_id in negatives]]
            np.testing.assert_allclose(found_K, best_K, rtol=0, atol=1e-6)
            assert len(set(negatives)) == COUNT
            others += sum(each.partition(":")[0] != query["qid"].partition(":")[0] for each in negatives)
    assert others > 0, "the whole union is searched, not each task's own pool"


def test_positives_are_never_among_the_negatives(mini: Experiment, mined: list[Path]) -> None:
    judged = {tuple(line.split()[:3:2]) for path in Path(mini.benchmark.root, "qrels/train").iterdir()
              for line in path.read_text().splitlines()}
    listed = [(row, each) for path in mined for row in rows_of(path) for each in row["neg_cand_list"]]
    assert len(listed) > 1000
    assert not any((row["qid"], each) in judged or each in row["pos_cand_list"] for row, each in listed)


def test_files_are_the_benchmarks_own_but_for_the_negatives(mini: Experiment, mined: list[Path]) -> None:
    originals = Path(mini.benchmark.root, "query/train")
    assert sorted(path.name for path in mined) == sorted(path.name for path in originals.iterdir())
    assert {path.parent for path in mined} == {mini.directory / "mined_negatives"}
    for path in mined:
        before, after = rows_of(originals / path.name), rows_of(path)
        assert [list(row) for row in after] == [list(row) for row in before]
        assert ([{**row, "neg_cand_list": None} for row in after]
                == [{**row, "neg_cand_list": None} for row in before] != [])


def test_mined_files_load_back(mini: Experiment, mined: list[Path]) -> None:
    written = {row["qid"]: row["neg_cand_list"] for path in mined for row in rows_of(path)}
    train = for_split(mini, "train")
    options = {**train.benchmark.options, "negatives": str(mined[0].parent)}
    again = replace(train.benchmark, options=options)
    loaded = {}
    for task in again.tasks:
        lists = list(mini_mbeir.candidate_lists(again, task))
        plain = list(mini_mbeir.candidate_lists(train.benchmark, task))
        assert [row[:2] for row in lists] == [row[:2] for row in plain] and lists != plain
        loaded.update({query_id: negatives for query_id, _, negatives in lists})
    assert loaded == written


def test_a_second_mining_finds_everything_done_and_writes_equal_bytes(mini: Experiment, mined: list[Path]) -> None:
    before = {path: path.read_bytes() for path in mined}
    lines: list[str] = []
    assert mine(mini, COUNT, SKIP, lines.append) == mined
    assert [line.split()[0] for line in lines] == ["collect", "embed", "index", "retrieve"]
    assert all("there already" in line and "made" not in line for line in lines)
    assert {path: path.read_bytes() for path in mined} == before


def test_what_was_mined_before_does_not_change_what_is_mined(mini: Experiment, mined: list[Path]) -> None:
    chosen = replace(mini.settings.benchmark, options={**mini.settings.benchmark.options, "negatives": "/nowhere"})
    assert on_train(replace(mini, settings=replace(mini.settings, benchmark=chosen))) == on_train(mini)


CANDIDATES = ["one two three four", "one two three five", "one two six seven", "one eight nine ten"]
HEADER = "query_modality\tcand_modality\tdataset\tdataset_id\tprompt\n"


class Texts:
    """Data set 3 with tasks 1 (text -> text) and 3 (image -> text, never chosen) in one train file."""

    def __init__(self, root: Path):
        self.root = root
        self.queries: list[Any] = [
            {"qid": "3:1", "task_id": 1, "neg_cand_list": ["3:4"], "query_txt": "one two three four",
             "query_modality": "text", "pos_cand_list": ["3:1"], "weight": 0.5, "note": "caf\u00e9"},
            '{"qid":"3:2",  "query_modality": "image", "query_img_path": "a.jpg", "task_id": 3, '
            '"pos_cand_list": ["3:2"], "neg_cand_list": ["3:3"], "caf\u00e9": 1.50}',
            {"qid": "3:3", "task_id": 1, "query_txt": "one two three five", "query_modality": "text",
             "pos_cand_list": ["3:2"]}]
        self.qrels = ["3:1 0 3:1 1 1", "3:3 0 3:2 1 1", "3:3 0 3:1 2 1", "3:3 0 3:3 0 1", "3:2 0 3:2 1 3"]
        self.candidates = [{"did": f"3:{number}", "modality": "text", "txt": text}
                           for number, text in enumerate(CANDIDATES, 1)]
        self.benchmark = root / "texts.yaml"
        self.benchmark.write_text(f"adapter: mbeir\nroot: {root}\nsplit: test\noptions: {{instructions: false}}\n"
                                  "tasks:\n  texts_task1: {headline: hit@1, cutoffs: [1]}\n")
        self.write()

    def write(self) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in self.queries]
        contents = {"query/train/mbeir_texts_train.jsonl": lines,
                    "qrels/train/mbeir_texts_train_qrels.txt": self.qrels,
                    "cand_pool/global/mbeir_union_train_cand_pool.jsonl": [json.dumps(row) for row in self.candidates]}
        for name, rows in contents.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")

    def experiment(self, *overrides: str, encoders: Sequence[str] = ("tests.toy_encoder",)) -> Experiment:
        path = self.root / "find_texts.yaml"
        path.write_text(f"benchmark: {self.benchmark}\nencoders: [{', '.join(encoders)}]\n"
                        f"work_dir: {self.root / 'work'}\nembed: {{loaders: 0}}\nretrieve: {{depth: 4}}\n")
        large = [f"encoders.{name.replace('.', '_')}.dimension=64" for name in encoders]
        return load(str(path), [*large, *overrides])


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    return Texts(tmp_path)


def test_the_order_that_the_eye_sees(texts: Texts) -> None:
    (path,) = mine(texts.experiment(), 2, 0, quiet)
    first, _, third = rows_of(path)
    assert first["neg_cand_list"] == ["3:2", "3:3"]
    # 3:1 is relevant by the qrels alone, 3:2 by both; 3:3 was judged not to be, and so may be a negative.
    assert third["neg_cand_list"] == ["3:3", "3:4"]


def test_a_positive_that_only_the_query_file_lists_is_no_negative(texts: Texts) -> None:
    texts.queries[0]["pos_cand_list"] = ["3:1", {"did": "3:2"}]
    texts.write()
    (path,) = mine(texts.experiment(), 2, 0, quiet)
    assert rows_of(path)[0]["neg_cand_list"] == ["3:3", "3:4"]


def test_the_best_are_skipped_after_the_positives_are_dropped(texts: Texts) -> None:
    (path,) = mine(texts.experiment(), 1, 1, quiet)
    assert [row["neg_cand_list"] for row in rows_of(path)] == [["3:3"], ["3:3"], ["3:4"]]


def test_other_tasks_and_fields_stay_as_they_are(texts: Texts) -> None:
    (path,) = mine(texts.experiment(), 2, 0, quiet)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert path.name == "mbeir_texts_train.jsonl" and lines[1] == texts.queries[1]
    assert list(json.loads(lines[0]).items()) == list({**texts.queries[0], "neg_cand_list": ["3:2", "3:3"]}.items())
    assert json.loads(lines[2]) == {**texts.queries[2], "neg_cand_list": ["3:3", "3:4"]}


def test_a_depth_that_is_too_small_is_told_with_one_that_suffices(texts: Texts) -> None:
    with pytest.raises(UserError, match="retrieve.depth is 2") as caught:
        mine(texts.experiment("retrieve.depth=2"), 2, 1, quiet)
    assert not (texts.root / "work").exists(), "known before anything is searched"
    assert "retrieve.depth=3" in str(caught.value.do)
    with pytest.raises(UserError, match="2 queries have fewer than 2 negatives after the first 0") as caught:
        mine(texts.experiment("retrieve.depth=2"), 2, 0, quiet)
    assert caught.value.do == "set retrieve.depth=4"
    assert not list(texts.root.rglob("mined_negatives/*")), "nothing is written in part"
    assert mine(texts.experiment("retrieve.depth=4"), 2, 0, quiet)


def test_a_pool_that_is_too_small_is_not_called_too_small_a_depth(texts: Texts) -> None:
    with pytest.raises(UserError, match="only 4 candidates were found for query '3:1'") as caught:
        mine(texts.experiment("retrieve.depth=50"), 4, 0, quiet)
    assert "a greater depth finds no more" in str(caught.value.do)


@pytest.mark.parametrize("count, skip", [(0, 0), (-1, 0), (1, -1)])
def test_impossible_numbers_are_refused(texts: Texts, count: int, skip: int) -> None:
    with pytest.raises(UserError, match="cannot be mined"):
        mine(texts.experiment(), count, skip, quiet)


def test_exactly_one_encoder_finds_negatives(texts: Texts, tmp_path: Path) -> None:
    twin = tmp_path / "twin.yaml"
    twin.write_text("encoder: tests.toy_encoder\n")
    for encoders, found in ((["tests.toy_encoder", str(twin)], "2: tests_toy_encoder, twin"), ([], "0: none")):
        experiment = texts.experiment()
        experiment = replace(experiment, encoders=experiment.encoders[:0]) if not encoders else load(
            str(tmp_path / "find_texts.yaml"), [f"encoders=[{', '.join(encoders)}]"])
        with pytest.raises(UserError, match=f"not {found}"):
            mine(experiment, 1, 0, quiet)


def test_an_adapter_that_cannot_write_its_files_is_refused(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(load_adapter("mbeir"), "rewrite_negatives")
    with pytest.raises(UserError, match="adapter 'mbeir' cannot be mined") as caught:
        mine(texts.experiment(), 1, 0, quiet)
    assert "rewrite_negatives" in str(caught.value.do) and not (texts.root / "work").exists()


def test_fewer_are_left_where_candidates_end() -> None:
    assert Wanted(2, 0).of([], {"3:1"}) == [] and Wanted(1, 1).of(["a", "b", "c"], {"a"}) == ["c"]


def test_pools_and_unions_follow_the_split(mini: Experiment) -> None:
    unions = {"pictures": ["streets_task0_test", "scenes_task0"]}
    whole = replace(mini, settings=replace(mini.settings, unions=unions, tasks=["streets_task0"]))
    train, val = for_split(whole, "train"), for_split(whole, "val")
    assert train.benchmark.split == "train" and {*train.benchmark.pools} == {
        f"{task.name}_train" for task in mini.benchmark.tasks}
    assert [task.pool for task in (*train.tasks, *val.tasks)] == ["streets_task0_train", "streets_task0_val"]
    assert val.members("pictures", val.tasks[0]) == ("scenes_task0", "streets_task0_val")
    assert train.members("pictures", train.tasks[0]) == ("scenes_task0_train", "streets_task0_train")
    assert for_split(whole, "test").benchmark == whole.benchmark
