"""Arrays on a real cluster: they compute what one process computes, and mend themselves.

Every test runs Slurm's own daemons (virtual_cluster.py) and skips, with the reason, where they cannot be started.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.cli import main
from tests.slurm.virtual_cluster import VirtualCluster, why_not
from tests.small_mbeir import SmallMbeir
from tests.test_train import Training

pytestmark = [pytest.mark.timeout(400), pytest.mark.skipif(why_not() is not None, reason=f"no Slurm: {why_not()}")]

ROOT = Path(__file__).resolve().parents[2]
SLOW = "encoders.tests_toy_encoder.seconds=1"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    with VirtualCluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


class Lab:
    """A small experiment (eight shards to embed) on the cluster, and the same experiment run in this process."""

    def __init__(self, slurm: VirtualCluster, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.slurm, self.folder, self.capsys = slurm, folder, capsys
        self.small, self.here = SmallMbeir(folder / "there").write(), SmallMbeir(folder / "here")
        os.symlink(self.small.root, folder / "here" / "link")
        text = self.small.experiment.read_text()
        self.here.experiment.write_text(text.replace(f"{folder}/there/work", f"{folder}/here/work"))
        self.work = folder / "there" / "work"

    def cluster(self, **options: Any) -> str:
        """A cluster file; every element takes one core and little memory."""
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump({"cpus": 1, "memory": "300M", "time": "00:10:00", "grace": 10, **options}))
        return f"cluster={path}"

    def __call__(self, command: str, *arguments: str) -> int:
        self.code = main([command, str(self.small.experiment), *arguments])
        self.out, self.err = self.capsys.readouterr()
        return self.code

    def submit(self, cluster: str, *overrides: str) -> dict[str, str]:
        """Submit the run; the id of each stage's job."""
        assert self("run", "--on", "slurm", cluster, "collect.rows_per_shard=1", *overrides) == 0, self.err
        return dict(re.findall(r"submitted  (\w+)\s+job (\d+)", self.out))

    def states(self, job: str) -> list[str]:
        return states(self.slurm, job)

    def ended(self, *jobs: str) -> None:
        ended(self.slurm, jobs)

    def shards(self) -> list[Path]:
        return sorted((self.work / "artifacts" / "embed").rglob("embeddings-*.parquet"))

    def wait_for_shards(self, count: int) -> None:
        self.slurm.wait(lambda: len(self.shards()) >= count, 100)

    def equals_the_run_here(self) -> None:
        assert main(["run", str(self.here.experiment), "collect.rows_per_shard=1"]) == 0
        found, expected = contents(self.work), contents(self.folder / "here" / "work")
        assert len(expected) > 30 and found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []


def states(slurm: VirtualCluster, job: str) -> list[str]:
    """Of every element of a job."""
    rows = slurm.ask("squeue", "-h", "--me", "--states=all", "--array", "--format=%F %T").splitlines()
    return [row.split()[1] for row in rows if row.split()[0] == job]


def ended(slurm: VirtualCluster, jobs: Iterable[str], seconds: float = 300) -> None:
    """Wait until every element of every job has ended (the controller may not answer for a moment)."""
    def have_ended(job: str) -> bool:
        found = states(slurm, job)
        return bool(found) and set(found) <= ENDED

    slurm.wait(lambda: all(map(have_ended, jobs)), seconds)


def contents(work: Path) -> dict[str, bytes]:
    """All that a run leaves but its notes of when and how: artifacts, results and tables."""
    kept = [*(work / "artifacts").rglob("*"), *(work / "experiments").rglob("retrieval_results/**/*"),
            *(work / "experiments").rglob("report/*")]
    return {str(path.relative_to(work)): path.read_bytes() for path in kept
            if path.is_file() and path.name != "made.json"}


@pytest.fixture
def lab(slurm: VirtualCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Lab(slurm, tmp_path, capsys)


def element_process(lab: Lab, worker: str) -> int | None:
    """The Python process of an element that is embedding."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[-2:-1] == [worker] and {"embed", str(lab.small.experiment)} < set(words) and "python" in words[0]:
            return int(path.parent.name)
    return None


def test_a_chain_of_arrays_equals_a_run_here(lab: Lab) -> None:
    own = f"export PATH={Path(sys.executable).parent}:$PATH MARK=; echo activated for index"
    jobs = lab.submit(lab.cluster(stages={"embed": {"workers": 4, "at_once": 2}, "index": {"activate": own},
                                          "retrieve": {"workers": 2}}), SLOW)
    assert list(jobs) == ["collect", "embed", "index", "retrieve", "score"]
    waits = f"job {jobs['embed']}, 4 elements: 4 pending  (Dependency: waits for the stage before it)"
    lab.slurm.wait(lambda: lab("status", "collect.rows_per_shard=1", SLOW) == 3 and waits in lab.out)
    most = 0
    while not (set(lab.states(jobs["embed"])) or {"?"}) <= ENDED:
        most = max(most, lab.states(jobs["embed"]).count("RUNNING"))
        time.sleep(0.2)
    assert most == 2, "at_once"
    lab.ended(*jobs.values())
    assert lab("status", "collect.rows_per_shard=1", SLOW) == 0, lab.out
    assert f"job {jobs['embed']}, 4 elements: 4 completed" in lab.out
    assert lab("logs", "--stage", "index") == 0 and "activated for index" in lab.out, lab.out
    assert lab("logs", "--stage", "score") == 0 and "hit@1" in lab.out, lab.out
    lab.equals_the_run_here()
    assert lab("run", "--on", "slurm", lab.cluster(), "collect.rows_per_shard=1") == 0
    assert "nothing to do" in lab.out


def test_a_killed_worker_goes_back_into_the_queue_and_the_result_is_the_same(lab: Lab) -> None:
    jobs = lab.submit(lab.cluster(stages={"embed": {"workers": 2}}), SLOW)
    lab.wait_for_shards(1)
    lab.slurm.wait(lambda: element_process(lab, "1/2") is not None)
    process = element_process(lab, "1/2")
    assert process is not None
    os.kill(process, signal.SIGKILL)
    lab.ended(*jobs.values())
    assert set(lab.states(jobs["embed"])) == {"COMPLETED"}
    logs = "".join(path.read_text() for path in lab.work.rglob(f"logs/slurm/embed.{jobs['embed']}_1.log"))
    assert "killed: back into the queue" in logs and "restart 1" in logs and logs.count("ended with 0") == 1
    lab.equals_the_run_here()


def test_cancel_ends_what_was_submitted_and_nothing_else_and_any_number_of_workers_goes_on(lab: Lab) -> None:
    other = lab.slurm.ask("sbatch", "--parsable", "--wrap", "sleep 300", "--output=/dev/null", "--mem=10M").strip()
    jobs = lab.submit(lab.cluster(stages={"embed": {"workers": 3}}), SLOW)
    lab.wait_for_shards(2)
    assert lab("run", "--on", "slurm", lab.cluster(), "collect.rows_per_shard=1") == 2
    assert "are still in the queue" in lab.err
    assert lab("cancel") == 0 and jobs["embed"] in lab.out and other not in lab.out
    lab.ended(*jobs.values())
    assert lab.states(other) == ["RUNNING"]
    subprocess.run(["scancel", other], check=True)
    assert lab("cancel") == 0 and "nothing to cancel" in lab.out
    done = {path: path.stat().st_mtime_ns for path in lab.shards()}
    assert 2 <= len(done) < 8
    again = lab.submit(lab.cluster(stages={"embed": {"workers": 2}}), SLOW)
    assert list(again) == ["embed", "index", "retrieve", "score"]  # collect is there
    lab.ended(*again.values())
    assert {path: path.stat().st_mtime_ns for path in done} == done
    lab.equals_the_run_here()


def test_a_failing_stage_stops_its_successors_and_status_says_why(lab: Lab) -> None:
    lab.small.image("blue").write_text("not an image")
    jobs = lab.submit(lab.cluster(stages={"embed": {"workers": 2}}))
    lab.ended(*jobs.values())
    assert set(lab.states(jobs["embed"])) == {"FAILED"} and lab.states(jobs["retrieve"]) == ["CANCELLED"]
    assert lab("status", "collect.rows_per_shard=1") == 3
    assert "error: 1 items have a broken image, 0 tolerated" in lab.out
    assert f"embed.{jobs['embed']}_0.log" in lab.out and f"failed     {jobs['embed']}_1" in lab.out
    assert lab("logs", "--lines", "40") == 0 and "7:3: undecodable_image" in lab.out
    assert lab("status", "--json", "collect.rows_per_shard=1") == 3
    failures = [job["failures"] for job in json.loads(lab.out)["jobs"] if job["stage"] == "embed"]
    assert [failure["state"] for failure in failures[0]] == ["FAILED", "FAILED"]


def test_what_slurm_refuses_is_told_in_its_words(lab: Lab) -> None:
    assert lab("run", "--on", "slurm", lab.cluster(partition="nowhere")) == 2
    assert "invalid partition specified: nowhere" in lab.err


def test_no_array_is_larger_than_the_cluster_allows(lab: Lab) -> None:
    assert lab("run", "--on", "slurm", lab.cluster(workers=500), "collect.rows_per_shard=1") == 0, lab.err
    sizes = dict(re.findall(r"submitted  (\w+)\s+job \d+, (\d+) elements", lab.out))
    assert sizes["embed"] == sizes["retrieve"] == "64"  # MaxArraySize of the virtual cluster
    assert lab("cancel") == 0


@pytest.mark.slow
def test_the_chain_by_hand_does_the_same(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORKERS", "2"), ("PYTHON", sys.executable), ("SBATCH_MEM_PER_NODE", "300M"),
                        ("SBATCH_TIMELIMIT", "10")):
        monkeypatch.setenv(name, value)
    script = lab.folder / "repository" / "slurm"
    script.mkdir(parents=True)
    for name in ("submit.sh", "stage.sbatch"):
        (script / name).write_bytes((ROOT / "slurm" / name).read_bytes())
    said = subprocess.run(["bash", str(script / "submit.sh"), str(lab.small.experiment), "collect.rows_per_shard=1"],
                          check=True, capture_output=True, text=True).stdout
    ended(lab.slurm, re.findall(r" (\d+)(?:,|$| \()", said.splitlines()[0]))
    assert len(list((script.parent / "slurm-logs").glob("embed.*_?.log"))) == 2
    lab.equals_the_run_here()


@pytest.mark.slow
def test_a_node_that_dies_costs_its_shard_and_nothing_else(lab: Lab) -> None:
    cluster = lab.cluster(cpus=3, stages={"embed": {"workers": 2}})  # one element on each node
    jobs = lab.submit(cluster, SLOW)
    lab.wait_for_shards(2)
    lab.slurm.kill_node("n2")
    subprocess.run(["scontrol", "update", "nodename=n2", "state=down", "reason=test"], check=True)
    try:
        lab.ended(*jobs.values())
    finally:
        lab.slurm.start_node("n2")
        subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], check=False)
    assert set(lab.states(jobs["embed"])) == {"COMPLETED"}
    assert any("restart 1" in path.read_text() for path in lab.work.rglob(f"logs/slurm/embed.{jobs['embed']}_*.log"))
    lab.equals_the_run_here()


@pytest.mark.slow
def test_at_its_time_limit_an_element_stops_and_goes_on_later(lab: Lab) -> None:
    slow = "encoders.tests_toy_encoder.seconds=5"
    jobs = lab.submit(lab.cluster(stages={"embed": {"time": "00:01:00", "grace": 30}}), slow)
    lab.ended(*jobs.values())
    log = next(lab.work.rglob(f"logs/slurm/embed.{jobs['embed']}_0.log")).read_text()
    assert "the time is nearly up: back into the queue" in log and "restart 1" in log
    assert set(lab.states(jobs["embed"])) == {"COMPLETED"}
    lab.equals_the_run_here()


@pytest.mark.slow
def test_the_quick_start_through_slurm_equals_the_quick_start_here(
        slurm: VirtualCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cluster = tmp_path / "lab.yaml"
    cluster.write_text(yaml.safe_dump({"cpus": 2, "memory": "1500M", "time": "00:20:00",
                                       "stages": {"embed": {"workers": 3}, "retrieve": {"workers": 2}}}))
    options = [f"benchmark.root={tmp_path / 'data'}", "benchmark.options.scale=0.1", "score.resamples=20"]
    there, here = ([*options, f"work_dir={tmp_path / name}"] for name in ("there", "here"))
    assert main(["run", "quickstart", "--on", "slurm", f"cluster={cluster}", *there]) == 0
    jobs = re.findall(r"submitted  \w+\s+job (\d+)", capsys.readouterr().out)
    ended(slurm, jobs)
    with capsys.disabled():
        main(["status", "quickstart", *there])
    assert main(["run", "quickstart", *here]) == 0
    found, expected = contents(tmp_path / "there"), contents(tmp_path / "here")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.slow
def test_a_training_runs_on_two_nodes_and_goes_on_after_a_requeue(
        slurm: VirtualCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    training = Training(tmp_path, tmp_path / "data")
    cluster = tmp_path / "lab.yaml"
    options = {"cpus": 2, "memory": "2G", "time": "00:20:00", "stages": {"train": {"nodes": 2}}}
    cluster.write_text(yaml.safe_dump(options))
    assert main([*training.command(), "--on", "slurm", f"cluster={cluster}"]) == 0
    job = re.findall(r"submitted  train\s+job (\d+)", capsys.readouterr().out)[0]
    slurm.wait(lambda: training.directory.joinpath("log.jsonl").exists() and len(training.losses()) > 5, 200)
    subprocess.run(["scontrol", "requeue", job], check=True)
    slurm.wait(lambda: states(slurm, job) == ["RUNNING"])
    ended(slurm, [job])
    log = next((training.directory / "logs" / "slurm").glob("train.*.log")).read_text()
    assert states(slurm, job) == ["COMPLETED"], log[-2000:]
    assert "restart 1" in log
    alone = Training(tmp_path / "alone", tmp_path / "data")
    assert main(alone.command()) == 0
    assert len(training.losses()) >= len(alone.losses())
    assert np.allclose(training.losses()[-1], alone.losses()[-1], rtol=1e-4)
