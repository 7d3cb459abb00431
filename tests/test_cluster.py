"""Clusters, what is submitted for an experiment, and what is said of it: all that needs no Slurm."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline import slurm
from pipeline.cli import main
from pipeline.cluster import load_cluster
from pipeline.config import load
from pipeline.pieces import available
from pipeline.queue import states, telling_line
from pipeline.report.jobs import jobs_text, logs_text
from pipeline.slurm import Element
from pipeline.stages import STAGES
from pipeline.submission import Submitted, _note, dry_run, noted, submit, wanted
from pipeline.support.errors import UserError
from pipeline.workers import run_stage
from tests.small_mbeir import SmallMbeir


def cluster_file(folder: Path, text: str) -> str:
    path = folder / "lab.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", available("clusters"))
def test_the_clusters_that_come_with_us_are_sound(name: str) -> None:
    assert set(load_cluster(name)) == {*STAGES, "train"}


def test_a_stage_has_what_stands_at_the_top_unless_it_says_otherwise(tmp_path: Path) -> None:
    text = "cpus: 7\nflags: [--exclusive]\nstages:\n  embed: {gpus: 2, cpus: 9}\n"
    found = load_cluster(cluster_file(tmp_path, text))
    assert (found["index"].cpus, found["index"].gpus) == (7, 0)
    embed = found["embed"]
    assert (embed.cpus, embed.gpus, embed.flags, embed.workers) == (9, 2, ["--exclusive"], 1)


@pytest.mark.parametrize("text, what, line", [
    ("cpu: 4", "'cpu' is not an option of a cluster", 1),
    ("cpus: 1\nstages: {embedd: {cpus: 1}}", "'embedd' is no stage", 2),
    ("stages:\n  embed:\n    gpu: 1", "'gpu' is not an option", 3), ("cpus: many", "'many' does not fit", 1),
    ("workers: 0", "workers is 0; it must be at least 1", 1), ("at_once: 0", "at_once is 0", 1),
    ("time: tomorrow", "time is 'tomorrow'", 1), ("time: '00:01:00'", "no longer than grace, 120 seconds", 1)])
def test_mistakes_in_a_cluster_are_told_with_their_line(tmp_path: Path, text: str, what: str, line: int) -> None:
    with pytest.raises(UserError, match=what) as caught:
        load_cluster(cluster_file(tmp_path, text))
    assert str(caught.value.where).endswith(f"lab.yaml:{line}")


@pytest.mark.parametrize("time, seconds", [
    ("30", 1800), ("5:30", 330), ("04:00:00", 14400), ("1-00", 86400), ("2-01:30", 178200), ("1-00:00:01", 86401)])
def test_times_are_read_as_sbatch_reads_them(tmp_path: Path, time: str, seconds: int) -> None:
    assert load_cluster(cluster_file(tmp_path, f"time: '{time}'"))["embed"].seconds == seconds


@pytest.fixture
def small(tmp_path: Path) -> SmallMbeir:
    return SmallMbeir(tmp_path).write()


def lines_of(small: SmallMbeir, folder: Path, text: str, overrides: Sequence[str] = (),
             limit: int = 1000) -> list[list[str]]:
    experiment = load(str(small.experiment), overrides)
    jobs = wanted(experiment, load_cluster(cluster_file(folder, text)), [str(small.experiment), *overrides], limit)
    return [shlex.split(line) for line in dry_run(experiment, experiment.directory, jobs)]


def test_every_stage_waits_for_the_one_before_it(small: SmallMbeir, tmp_path: Path) -> None:
    lines = lines_of(small, tmp_path, "stages: {embed: {workers: 9, at_once: 3, gpus: 1, partition: big}}",
                     ["embed.precision=bf16"])
    names = [line[line.index(str(small.experiment)) - 1] for line in lines]
    assert names == ["collect", "embed", "index", "retrieve", "run"]
    assert [[word for word in line if word.startswith("--dependency")] for line in lines] == [
        [], *([f"--dependency=afterok:<{stage}>"] for stage in STAGES[:-1])]
    embed = lines[1]
    assert {"--array=0-8%3", "--gres=gpu:1", "--partition=big", "--signal=B:USR1@120", "--requeue"} < set(embed)
    assert embed[-1] == "embed.precision=bf16" and not [word for word in lines[-1] if word.startswith("--array")]


def test_no_more_elements_than_there_is_work_or_than_the_cluster_allows(small: SmallMbeir, tmp_path: Path) -> None:
    overrides = ["collect.rows_per_shard=1"]
    experiment = load(str(small.experiment), overrides)
    run_stage(experiment, "collect")
    for limit, array in ((1000, "--array=0-7"), (3, "--array=0-2")):
        lines = lines_of(small, tmp_path, "workers: 50", overrides, limit)
        assert [word for word in lines[0] if word.startswith("--array")] == [array]
    run_stage(experiment, "embed")
    assert "index" in lines_of(small, tmp_path, "workers: 50", overrides)[0]
    for stage in STAGES[2:]:
        run_stage(experiment, stage)
    assert lines_of(small, tmp_path, "workers: 50", overrides) == []


def test_an_environment_is_activated_or_the_python_named(small: SmallMbeir, tmp_path: Path) -> None:
    lines = lines_of(small, tmp_path, "stages: {embed: {activate: 'module load a,b; . env'}}")
    assert lines[1][lines[1].index("--activate") + 1] == "module load a,b; . env" and "--python" not in lines[1]
    assert "--python" in lines[0]


def test_a_submission_that_breaks_off_can_be_cancelled(small: SmallMbeir, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, numbers = load(str(small.experiment)), iter(["11", "12"])

    def refuse(line: Sequence[str]) -> str:
        try:
            return next(numbers)
        except StopIteration:
            raise UserError("Slurm's `sbatch` refuses: too many jobs") from None

    monkeypatch.setattr(slurm, "submit", refuse)
    monkeypatch.setattr(slurm, "elements_of", lambda jobs: [Element(job, "0", "PENDING", "") for job in jobs])
    jobs = wanted(experiment, load_cluster("example"), [], 1000)
    with pytest.raises(UserError, match="too many jobs"):
        submit(experiment, experiment.directory, jobs)
    assert [job.job for job in noted(experiment.directory)] == ["11", "12"]
    with pytest.raises(UserError, match="jobs 11, 12 of .* are still in the queue"):
        submit(experiment, experiment.directory, jobs)


def test_without_slurm_the_logs_say_how_jobs_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    job = Submitted("embed", "17", 3, str(tmp_path / "logs" / "embed.%A_%a.log"))
    _note(tmp_path, job)
    (tmp_path / "logs").mkdir()
    for task, code in (("0", 0), ("1", 2)):
        job.log_of(task).write_text(f"error: no weights\nplumbline: 2026-11-21 10:00:00 17_{task} ended with {code}\n")
    found = states(tmp_path)
    assert found[0].counts == {"COMPLETED": 1, "FAILED": 1, "UNKNOWN": 1}
    text = jobs_text(found)
    assert "failed     17_1 (failed): error: no weights" in text and str(job.log_of("1")) in text
    assert "error: no weights" in logs_text(found, tmp_path, None, 5)
    assert logs_text(found, tmp_path, "score", 5) == ""


def test_the_line_that_tells_is_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("begins\nerror: this one\n       do that\nplumbline: 1 2 3_4 ended with 2\n")
    assert telling_line(log) == "error: this one"
    assert telling_line(tmp_path / "nowhere") == "(no log)"


def test_without_slurm_or_cluster_the_commands_say_so(small: SmallMbeir, capsys: pytest.CaptureFixture[str],
                                                      monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert main(["run", str(small.experiment), "--on", "slurm"]) == 2
    assert "cluster=NAME of: example" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["run", str(small.experiment), "--on", "slurm", "cluster=example"]) == 2
    assert "`scontrol` is not on this machine" in capsys.readouterr().err
    assert main(["run", str(small.experiment), "--on", "slurm", "cluster=example", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("sbatch --parsable") == 5
    assert main(["cancel", str(small.experiment)]) == 0
    assert "nothing to cancel" in capsys.readouterr().out


def test_a_training_is_one_job_on_its_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny_clip_sf", "--on", "slurm", "cluster=example", "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert {"--nodes=1", "--gres=gpu:4", "--signal=B:USR1@300"} < set(words)
    assert words[-5:] == ["--processes", "4", "train", "tiny_clip_sf", "cluster=example"]
    assert not [word for word in words if word.startswith("--array")]
