"""The command `bench`, and that what the benchmarks measure is what they say."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import bench
from pipeline.cli import main
from pipeline.support.errors import UserError
from tests.speed import retrieve
from tests.speed.comparison import ROOT, Process, Row, alone, disk_flaw, memory_flaw, processes_by_turns
from tests.speed.synthetic import Generator, alike, brute_force, write_pool

NAMES = ("collect", "retrieve", "search", "startup", "train")
TOY = '''"""A toy. It compares nothing."""
from dataclasses import dataclass, field
from typing import List
from tests.speed.comparison import Row
import sys

@dataclass
class Options:
    rows: int = 3
    share: float = 0.5
    names: List[str] = field(default_factory=lambda: ["a", "b,c"])
    wide: bool = True

def rows(options):
    for number in range(options.rows):
        sys.stderr.write(f"measuring {number}\\n")
        yield Row.of("toy", f"row {number}", 12, "steps/s", [2.0, 4.0, 3.0], [8.0, 4.0, 9.0], "a toy's toy", True,
                     share=options.share)
'''


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of benchmarks in place of tests/speed."""
    folder = tmp_path / f"toys_{tmp_path.name}"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    (folder / "part.py").write_text('"""No benchmark."""\n')
    (folder / "lonely.py").write_text("import no_such_library\nclass Options: ...\ndef rows(options): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(bench, "_PACKAGE", folder.name)
    return folder


def test_without_a_name_all_are_listed_and_none_is_imported() -> None:
    code = ("import sys; from pipeline.cli import main; main(['bench'])\n"
            "sys.exit(any(name in sys.modules for name in ('torch', 'faiss', 'numpy', 'tests.speed.search')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = {line.split()[0]: line for line in done.stdout.splitlines() if line[:1].isalpha()}
    assert set(NAMES) < set(found) and "comparison" not in found
    assert "rows=200000" in done.stdout


def test_the_listing_shows_what_can_be_typed(toys: Path) -> None:
    shown = bench.listing()
    assert "A toy. It compares nothing." in shown
    assert 'rows=3 share=0.5 names=["a","b,c"] wide=true' in shown


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_defaults_that_fit(name: str) -> None:
    module: Any = importlib.import_module(f"tests.speed.{name}")
    assert bench._options(module, name, []) == module.Options()
    assert bench._options(module, name, ["repetitions=2"]).repetitions == 2
    with pytest.raises(UserError, match="repetitions is 0; it must be at least 1"):
        bench._options(module, name, ["repetitions=0"])


def test_rows_are_printed_as_they_are_measured(toys: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = "import sys; sys.stderr = sys.stdout; from pipeline import bench; from pipeline.cli import main\n" \
             f"bench._PACKAGE = '{toys.name}'; sys.path.insert(0, '{toys.parent}'); main(['bench', 'toy', 'rows=2'])"
    lines = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    assert "cores" in lines[0] and lines[2].split() == ["name", "work", "ours", "baseline", "unit", "ratio", "(spread)",
                                                        "equal", "baseline", "and", "facts"]
    assert [line.split()[0] for line in lines[3:]] == ["measuring", "toy", "share", "measuring", "toy", "share"]
    assert lines[4].split() == ["toy", "row", "0", "4", "1.5", "steps/s", "3", "(1-4)", "yes", "a", "toy's", "toy"]


def test_json_is_one_object_per_row_and_nothing_else(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "toy", "--json", "rows=2", "share=0.25"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first == {"name": "toy", "work": "row 0", "ours": 4.0, "baseline": 1.5, "baseline_name": "a toy's toy",
                     "ratio": 3.0, "spread": [1.0, 4.0], "unit": "steps/s", "equal": True, "share": 0.25}
    assert second["work"] == "row 1"


@pytest.mark.parametrize("arguments, message", (
    (["tyo"], "(?s)there is no benchmark 'tyo'.*nearest: toy.*all: lonely, toy"),
    (["part"], "there is no benchmark 'part'"),
    (["toy", "row=3"], "(?s)'row' is not an option of benchmark toy.*nearest: rows"),
    (["toy", "rows=many"], "rows: 'many' does not fit"),
    (["toy", "rows=[1]"], "rows: .* does not fit"),
    (["toy", "names.0.x=1"], "'names.0.x' is not an option"),
    (["toy", "rows"], "not of the form key=value"),
    (["lonely"], "(?s)needs no_such_library, which is not installed.*pip install -e '.\\[test\\]'"),
    (["my_lab.absent"], "benchmark 'my_lab.absent' is not known")))
def test_mistakes_are_named(toys: Path, arguments: list[str], message: str) -> None:
    name, *overrides = arguments
    with pytest.raises(UserError, match=message):
        list(bench.rows(name, overrides))


def test_outside_a_checkout_it_says_where_to_go(monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "_PACKAGE", "no_such_tests.speed")
    assert main(["bench", "search"]) == main(["bench"]) == 2
    assert "run from the root of the checkout" in capsys.readouterr().err


def test_a_row_without_a_baseline_has_no_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row.skipped("toy", "work", "steps/s", "a giant", "needs 99 GB", 1234.56, peak_gb=1.5)
    assert bench.row_text(row).split() == ["toy", "work", "1,235", "-", "steps/s", "-", "-", "a", "giant", "skipped",
                                           "needs", "99", "GB,", "peak_gb", "1.5"]
    assert row.as_json()["ratio"] is None and row.as_json()["skipped"] == "needs 99 GB"


def test_machines_without_room_say_so(tmp_path: Path) -> None:
    assert memory_flaw(0.001) == disk_flaw(tmp_path, 0.001) == ""
    assert "are free" in memory_flaw(1e6) and "directory=" in disk_flaw(tmp_path, 1e6)


def test_the_peak_of_a_process_is_its_own() -> None:
    """Not that of the one which started it, and that of the greatest that it started."""
    ours = np.ones(400 << 17)  # 400 MB
    small, large = alone("-c", "print('seen')"), alone("-c", "x = b'1' * (200 << 20)")
    assert small.peak_gb < 0.1 and small.output == "seen\n" and len(ours)
    assert 0.19 < large.peak_gb < 0.3
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(200 << 20)'])"
    assert 0.19 < alone("-c", child).peak_gb < 0.3


def test_a_process_that_fails_is_not_measured() -> None:
    with pytest.raises(RuntimeError, match="(?s)failed:.*ZeroDivisionError"):
        processes_by_turns({"ours": lambda: alone("-c", "1 / 0")}, 1)


@pytest.mark.parametrize("data", ("clip", "duplicates"))
def test_search_compares_every_way_with_the_exact_order(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["bench", "search", "--json", "rows=1000", "queries=30", "k=5", "dimension=32", "repetitions=1",
                 f"data={data}", "baselines=[flat,knn,matrix,blocks,half,heaps]", "peak=false",
                 f"faiss={str(data == 'clip').lower()}", 'factories=["IVF{lists},Flat", "HNSW8", "SQ8"]'])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0 and {row["equal"] for row in rows if "sample" in row} == {True}
    exact = [row for row in rows if "sample" in row and "float16" not in row["baseline_name"]]
    assert len(exact) == 5
    if data == "clip":  # no ties, and hardly a near tie
        assert all(row["baseline_equal"] > 0.9 and row["baseline_same_sets"] > 0.9 for row in exact)
    found = {row["baseline_name"]: row["recall@5"] for row in rows if "recall@5" in row}
    assert len(found) == (3 + 3 + 1 if data == "clip" else 0)
    assert found.get("FAISS IVF32,Flat, mapped from a file, nprobe=16", 1) > 0.8


@pytest.mark.parametrize("mistake, message", (
    ("k=2000", "k=2000 is more than rows=1000"), ("baselines=[flt]", "nearest: flat"), ("data=clap", "nearest: clip"),
    ("kernel=natve", "nearest: native"), ("coarse=bfloat61", "nearest: bfloat16")))
def test_search_refuses_what_it_cannot_do(mistake: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "search", "rows=1000", "queries=3", "dimension=8", mistake]) == 2
    assert message in capsys.readouterr().err


def test_searchers_have_what_they_need_and_no_more_is_imported_early() -> None:
    """The process that measures stays small until a flow begins."""
    for name in ("comparison", "search", "searchers", "synthetic", "retrieve", "collect", "startup"):
        tree = ast.parse((ROOT / "tests" / "speed" / f"{name}.py").read_text())
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not {alias.name for node in imports for alias in node.names} & {"torch", "faiss"}, name


def test_retrieve_compares_whole_flows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "retrieve", "--json", "rows=25000", "queries=20", "k=5", "dimension=16", "repetitions=1",
                 f"directory={tmp_path}"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["equal"] >= 0.9 and row["ratio"] > 0 and row["peak_gb"] > 0 and not list(tmp_path.iterdir())


def test_retrieve_runs_alone_or_not_at_all_where_there_is_no_room(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = retrieve.Options(rows=2**20, dimension=128, queries=10)
    monkeypatch.setattr(retrieve, "memory_flaw", lambda needed_gb: f"{needed_gb:.2f} GB are too many")
    reason = retrieve._why_alone(tmp_path, options)
    assert reason == "1.06 GB are too many"  # 8.5 bytes per value
    assert retrieve._why_alone(tmp_path, retrieve.Options(baseline=False)) == "baseline=false"
    row = retrieve._row(tmp_path, "work", options, {"ours": [Process(2.0, 1.5, ""), Process(4.0, 1.25, "")]}, reason)
    assert (row.ours, row.baseline, row.facts["skipped"], row.facts["peak_gb"]) == (3.333, None, reason, 1.5)
    monkeypatch.setattr(retrieve, "disk_flaw", lambda directory, needed_gb: "no room")
    assert main(["bench", "retrieve", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ours"] is None and found["skipped"] == "no room"


def test_collect_reads_what_uniir_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "collect", "--json", "rows=200", "repetitions=1", f"directory={tmp_path}"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["equal"] is True and row["baseline_peak_gb"] < row["peak_gb"] < 1


@pytest.mark.parametrize("data, least, most", (("gauss", -0.2, 0.2), ("cone", 0.85, 0.95)))
def test_data_are_as_hard_as_they_say(data: str, least: float, most: float) -> None:
    vectors_ND = Generator(256, data=data).vectors(200, 0).astype(np.float64)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    assert least < np.median(vectors_ND[:100] @ vectors_ND[100:].T) < most


def test_duplicates_are_in_the_pool_and_break_ties_by_id(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", 400, Generator(16, data="duplicates"))
    vectors_ND = np.concatenate([block[-1] for block in pool.blocks()])
    assert len(np.unique(vectors_ND, axis=0)) == 400 - 20
    order_N = np.arange(400)[::-1]
    rows_QK = brute_force(pool, vectors_ND[:3], order_N, 2)
    assert rows_QK.tolist() == [[380, 0], [381, 1], [382, 2]]
    assert alike(rows_QK[:, ::-1], rows_QK) == (0.0, 1.0)
