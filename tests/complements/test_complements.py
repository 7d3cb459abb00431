"""Complements: held against brute force and against UniRAG's rule as it is published, killed, resumed, reused."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from pipeline.artifacts import Artifact
from pipeline.cli import main
from pipeline.complements.making import Wanted, make_complements
from pipeline.config import Experiment, load
from pipeline.embeddings import EmbeddingStore
from pipeline.garbage import collect_garbage
from pipeline.plan import Plan, Scored, make_plan
from pipeline.rag import load_results
from pipeline.report.results import Cells, complements_path, write_results
from pipeline.stages.score import run_tables, tables_of
from pipeline.support.errors import UserError
from tests.forks import alive, fork_server, kill
from tests.report.test_results import SCHEMA, lines

TASKS = ("scenes_task3", "quiz_task6", "museum_task8")
DEPTH = 20
OTHER = {"text": "image", "image": "text"}
ARGUMENTS = [f"tasks=[{','.join(TASKS)}]", f"export.depth={DEPTH}"]


@pytest.fixture(scope="module")
def finished(quick_run: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished quick start's work directory, so that derived artifacts are this module's own."""
    directory = tmp_path_factory.mktemp("complements") / "work"
    shutil.copytree(quick_run.work_dir, directory)
    return directory


@pytest.fixture(scope="module")
def experiment(finished: Path, small_arguments: list[str]) -> Experiment:
    return load("quickstart", [f"work_dir={finished}", *ARGUMENTS, *small_arguments])


@pytest.fixture(scope="module")
def plan(experiment: Experiment) -> Plan:
    make_complements(experiment, Wanted(Cells()), say=lambda *_: None)
    return make_plan(experiment)


def rows_of(experiment: Experiment, cell: Scored, rule: str = "plumbline") -> list[dict[str, Any]]:
    return lines(complements_path(experiment, cell, DEPTH, rule))


def hits_of(cell: Scored) -> dict[str, list[str]]:
    """Query id -> candidates, best first."""
    found: dict[str, list[str]] = {row: [] for row in tables_of(cell.job.task)["query_id"].to_pylist()}
    for table in run_tables(cell.job.run):
        for hit in table.to_pylist():
            if hit["rank"] <= DEPTH:
                found[hit["query_id"]].append(hit["candidate_id"])
    return found


def content_of(cells: list[Scored]) -> dict[str, dict[str, Any]]:
    pools = {pool.label: pool for cell in cells for pool in cell.job.pools}
    return {row["candidate_id"]: row for pool in pools.values() for row in tables_of(pool).to_pylist()}


def unit_vectors(artifact: Artifact) -> dict[str, np.ndarray]:
    found = {}
    for block in EmbeddingStore.of(artifact).blocks():
        for name, vector_D in zip(block.ids.to_pylist(), block.vectors_ND.astype(np.float64)):
            found[name] = vector_D / max(np.linalg.norm(vector_D), 1e-300)
    return found


def derived(experiment: Experiment, cell: Scored, stage: str, asks: str) -> list[Path]:
    name = f"{cell.job.run.name}.{asks}_to_{OTHER[asks]}-"
    return [path for path in (experiment.work_dir / "artifacts" / stage).iterdir() if path.name.startswith(name)]


def asking_vectors(experiment: Experiment, cell: Scored) -> dict[str, np.ndarray]:
    """The vectors of the derived queries, from whatever shards lie there."""
    import pyarrow.parquet as pq
    found: dict[str, np.ndarray] = {}
    for asks in OTHER:
        for folder in derived(experiment, cell, "embed", asks):
            for shard in sorted(folder.glob("*.parquet")):
                table = pq.read_table(shard)
                found.update(zip(table["id"].to_pylist(), np.array(table["vector"].to_pylist(), np.float64)))
    return found


def test_partners_are_those_of_brute_force(experiment: Experiment, plan: Plan) -> None:
    union = next(cell for cell in plan.scored if cell.pool == "union")
    content = content_of(plan.scored)
    stores = {job.artifact.name: job.artifact for job in plan.jobs["embed"]}
    pools = {name: vector for pool in experiment.members("union", union.task)
             for name, vector in unit_vectors(stores[f"quickstart_clip.pool.{pool}"]).items()}
    checked = 0
    for cell in plan.scored:
        askers = asking_vectors(experiment, cell)
        queries = {row["query_id"]: row for row in tables_of(cell.job.task).to_pylist()}
        for line in rows_of(experiment, cell):
            for candidate_id, partner in zip(line["candidates"], line["complements"], strict=True):
                seeks = OTHER.get(content[candidate_id]["modality"])
                if seeks is None:
                    assert partner is None
                    continue
                vector_D = askers[candidate_id] / np.linalg.norm(askers[candidate_id])
                ranked = sorted(((-np.float32(vector_D @ vector), name) for name, vector in pools.items()
                                 if content[name]["modality"] == seeks
                                 and content[name][seeks] != queries[line["query_id"]][seeks]))
                assert partner["candidate_id"] == ranked[0][1]
                assert partner["score"] == pytest.approx(-ranked[0][0], abs=1e-6)
                assert {key: partner[key] for key in ("text", "image", "modality")} == {
                    key: content[partner["candidate_id"]][key] for key in ("text", "image", "modality")}
                checked += 1
            if checked > 1200:
                break
    assert checked > 500


def test_lines_stand_as_the_results_stand(experiment: Experiment, plan: Plan) -> None:
    mixed = 0
    schema = {**SCHEMA["$defs"]["complements"], "$defs": SCHEMA["$defs"]}
    content = content_of(plan.scored)
    for cell in plan.scored:
        hits, rows = hits_of(cell), rows_of(experiment, cell)
        assert [row["query_id"] for row in rows] == list(hits)
        for row in rows:
            jsonschema.validate(row, schema)
            assert row["candidates"] == hits[row["query_id"]] and len(row["complements"]) == len(row["candidates"])
            for candidate_id, partner in zip(row["candidates"], row["complements"]):
                modality = content[candidate_id]["modality"]
                mixed += modality == "image,text"
                assert (partner is None) == (modality == "image,text")
                assert partner is None or partner["candidate_id"] != candidate_id
                assert partner is None or partner["modality"] == OTHER[modality]
    assert mixed > 10


def test_results_come_with_their_complements(experiment: Experiment, plan: Plan) -> None:
    for written, cell in zip(write_results(experiment, Cells(), None, "jsonl", None), plan.scored, strict=True):
        for result, row in zip(load_results(written.path), rows_of(experiment, cell), strict=True):
            partners = [candidate.complement and candidate.complement.candidate_id for candidate in result.candidates]
            assert partners == [each and each["candidate_id"] for each in row["complements"]]


def published_rule(line: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> list[Any]:
    """UniIR's selection over UniIR's objects, word for word what its specification says."""
    complements: list[Any] = []
    for candidate in line["candidates"]:
        if candidate["modality"] not in OTHER:
            continue
        chosen = None
        for hit in found[candidate["did"]][:10]:
            if hit["modality"] != OTHER[candidate["modality"]]:
                continue
            other_picture = hit["img_path"] and hit["img_path"] != line["query"]["query_img_path"]
            if other_picture or (hit["txt"] and hit["txt"] != line["query"]["query_txt"]):
                chosen = hit
                break
        complements.append(chosen)
    return complements


def test_unirag_s_rule_as_published(experiment: Experiment, plan: Plan) -> None:
    with pytest.raises(UserError, match="MSCOCO"):
        make_complements(experiment, Wanted(Cells(), rule="unirag"), say=lambda *_: None)
    wanted = Wanted(Cells(), rule="unirag", prompts=["scenes_task0", "scenes_task3"], reuse="never")
    make_complements(experiment, wanted, say=lambda *_: None)
    stores = {job.artifact.name: job.artifact for job in plan.jobs["embed"]}
    content, found, empty = content_of(plan.scored), 0, 0
    for cell, written in zip(plan.scored, write_results(experiment, Cells(), None, "uniir", None), strict=True):
        names = experiment.members(cell.pool, cell.task)
        pool = [pair for name in names for pair in unit_vectors(stores[f"quickstart_clip.pool.{name}"]).items()]
        ids, pool_ND = [name for name, _ in pool], np.stack([vector for _, vector in pool])
        hits = {}
        for asker, vector_D in asking_vectors(experiment, cell).items():
            score_N = (pool_ND @ (vector_D / np.linalg.norm(vector_D))).astype(np.float32)
            ranked = sorted(range(len(ids)), key=lambda row: (-score_N[row], ids[row]))[:10]
            hits[asker] = [{"did": ids[row], "txt": content[ids[row]]["text"], "img_path": content[ids[row]]["image"],
                            "modality": content[ids[row]]["modality"], "src_content": None} for row in ranked]
        for line in lines(written.path):
            expected = published_rule(line, hits)
            assert line["complement_candidates"] == expected
            found, empty = found + sum(map(bool, expected)), empty + sum(each is None for each in expected)
    assert found > 100 and empty > 100


def silent(*_: object) -> None:
    pass


def partners(experiment: Experiment, cell: Scored) -> list[list[str | None]]:
    return [[each and each["candidate_id"] for each in row["complements"]] for row in rows_of(experiment, cell)]


def test_vectors_that_are_there_give_the_same_partners(experiment: Experiment, plan: Plan) -> None:
    said: list[str] = []
    make_complements(experiment, Wanted(Cells()), say=said.append)
    reused = [partners(experiment, cell) for cell in plan.scored]
    assert any(line.startswith("reuse") and " 0 vectors" not in line for line in said)
    make_complements(experiment, Wanted(Cells(), reuse="never"), say=silent)
    assert [partners(experiment, cell) for cell in plan.scored] == reused
    make_complements(experiment, Wanted(Cells()), say=silent)


def test_a_second_time_nothing_is_made(experiment: Experiment, plan: Plan) -> None:
    said: list[str] = []
    make_complements(experiment, Wanted(Cells()), say=said.append)
    assert [line for line in said if " made" in line] == []


ROLES = '''
from tests.toy_encoder import Params, ToyEncoder


def identity(params):
    return {"roles": 1}


class Roles(ToyEncoder):
    def prepare(self, item):
        vector_D = super().prepare(item)
        return vector_D[::-1] if item.role == "query" else vector_D


def build(params, device, precision):
    return Roles(params)
'''


@pytest.mark.parametrize("rule, module, reused", [
    ("none", "tests.toy_encoder", "2 of 2"), ("none", "roles_lab.roles", "0 of "),
    ("hashed", "tests.toy_encoder", "0 of ")])
def test_vectors_are_used_again_only_where_they_are_equal(
        small_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, module: str,
        reused: str) -> None:
    """The toy encoder adds 0.01 to every dimension, so an image and a prompt together are not the sum of both."""
    (tmp_path / "roles_lab").mkdir()
    (tmp_path / "roles_lab" / "roles.py").write_text(ROLES)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["run", "quickstart", f"work_dir={tmp_path}/work", *small_arguments, f"encoders=[{module}]",
                 "tasks=[scenes_task0, scenes_task3]", "pools=[union]", f"embed.instruction={rule}"]
    assert main(arguments) == 0
    said: list[str] = []
    make_complements(load("quickstart", arguments[2:]), Wanted(Cells()), say=said.append)
    counted = next(line for line in said if line.startswith("reuse"))
    assert f"in {reused}" in counted, counted


def files(directory: Path) -> dict[str, bytes]:
    kept = [*directory.glob("artifacts/**/*"), *directory.glob("experiments/*/retrieval_results/complements/*")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(kept)
            if path.is_file() and not path.name.startswith(".") and path.name != "made.json"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("reuse", ["measured", pytest.param("never", marks=pytest.mark.slow)])
def test_killed_and_resumed_gives_the_same_bytes(quick_run: Experiment, small_arguments: list[str], tmp_path: Path,
                                                 reuse: str) -> None:
    whole, killed, chance = tmp_path / "whole", tmp_path / "killed", random.Random(3)
    for directory in (whole, killed):
        shutil.copytree(quick_run.work_dir, directory)
    command = ["complements", "quickstart", *ARGUMENTS, *small_arguments, "--reuse", reuse]
    before, kills = set(files(killed)), 0
    with fork_server() as forks:
        forks.finish([*command, f"work_dir={whole}"])
        for attempt in range(12):
            target = len(files(killed)) + chance.randint(1, 6)
            groups = [forks.start([*command, f"work_dir={killed}", "--worker", f"{number}/2"])
                      for number in range(1 + attempt % 2)]
            while len(files(killed)) < target and any(map(alive, groups)):
                time.sleep(0.002)
            kills += any(map(alive, groups))
            for group in groups:
                kill(group)
        forks.finish([*command, f"work_dir={killed}"])
    expected, found = files(whole), files(killed)
    assert kills > 3 and len(expected) > len(before) + 20
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_names_and_pools_are_checked(experiment: Experiment) -> None:
    for wanted, message in ((Wanted(Cells(), partners="elsewhere"), "elsewhere"),
                            (Wanted(Cells(), prompts=["scenes_task9"]), "scenes_task9"),
                            (Wanted(Cells(), prompts=["quiz_task6"]), "quiz_task6"),
                            (Wanted(Cells(tasks=["digits_task3"])), "digits_task3"),
                            (Wanted(Cells(), depth=1000), "depth 1000")):
        with pytest.raises(UserError, match=message):
            make_complements(experiment, wanted, say=silent)


@pytest.fixture
def searched_locally(small_arguments: list[str], tmp_path: Path) -> list[str]:
    """The union was not searched; its pools are embedded when partners are sought there."""
    arguments = [f"work_dir={tmp_path}", *small_arguments, "encoders=[tests.toy_encoder]", "tasks=[scenes_task0]",
                 "pools=[local]"]
    assert main(["run", "quickstart", *arguments]) == 0
    assert main(["complements", "quickstart", *arguments, "--depth", "3"]) == 0
    return arguments


def test_gc_keeps_what_complements_are_made_with(searched_locally: list[str], tmp_path: Path) -> None:
    experiment, said = load("quickstart", searched_locally), list[str]()
    assert collect_garbage([experiment], delete=True) == ["0 B freed"]
    make_complements(experiment, Wanted(Cells(), depth=3), say=said.append)
    assert len(said) > 5 and [line for line in said if " made" in line] == []
    path, = (tmp_path / "experiments/quickstart/retrieval_results/complements").iterdir()
    path.unlink()
    unused = "\n".join(collect_garbage([experiment], delete=True))
    for stage in ("collect", "embed", "retrieve"):
        assert f"/{stage}/tests_toy_encoder.scenes_task0.local.flat.image_to_text-" in unused
    assert "/embed/tests_toy_encoder.pool." in unused and "/index/tests_toy_encoder.pool." in unused
    assert collect_garbage([experiment], delete=True) == ["0 B freed"]


def test_local_searches_find_partners_in_the_union(searched_locally: list[str], tmp_path: Path) -> None:
    arguments = searched_locally
    path, = (tmp_path / "experiments/quickstart/retrieval_results/complements").iterdir()
    assert path.name == "tests_toy_encoder.scenes_task0.local.k3.jsonl"
    assert all(partner["modality"] == "text" for row in lines(path) for partner in row["complements"])
    assert main(["complements", "quickstart", *arguments, "--depth", "3", "--partners", "same"]) == 0
    assert {json.dumps(partner) for row in lines(path) for partner in row["complements"]} == {"null"}
