"""Configurations: merged in order, checked, traced; every mistake named with its place and its nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load
from pipeline.pieces import CONFIGS, available, load_encoder_choice
from pipeline.support.errors import UserError


def test_the_command_line_has_the_last_word_and_origins_are_kept() -> None:
    experiment = load("quickstart", ["embed.precision=bf16", "retrieve.depth=30"])
    assert experiment.settings.embed.precision == "bf16" and experiment.origins["embed.precision"] == "command line"
    assert experiment.origins["embed.storage"].endswith("configs/base.yaml:" + str(1 + next(
        number for number, line in enumerate((CONFIGS / "base.yaml").read_text().splitlines()) if "storage:" in line)))
    assert experiment.name == "quickstart" and load("quickstart", ["name=other"]).name == "other"


@pytest.mark.parametrize("name", available("experiments"))
def test_every_shipped_experiment_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBEIR_DATA_DIR", "/nowhere")
    assert load(name).tasks


def test_every_shipped_encoder_loads() -> None:
    names = available("encoders")
    experiment = load("quickstart", [f"encoders=[{','.join(names)}]"])
    assert [encoder.name for encoder in experiment.encoders] == names


def test_m_beir_has_sixteen_tasks_with_their_pools_and_cutoffs() -> None:
    experiment = load("mbeir_clip_sf")
    by_name = {task.name: task for task in experiment.tasks}
    assert len(by_name) == 16 and len(experiment.benchmark.pools) == 16
    assert by_name["mscoco_task0"].pool == "mscoco_task0_test" and by_name["cirr_task7"].pool == "cirr_task7"
    assert {name for name, task in by_name.items() if task.headline == "hit@10"} == {
        "fashion200k_task0", "fashion200k_task3", "fashioniq_task7"}
    assert by_name["fashioniq_task7"].cutoffs == (10, 20, 50) and by_name["oven_task8"].cutoffs == (1, 5, 10)
    assert load("mbeir_clip_sf", ["benchmark.split=val"]).benchmark.pools[1] == "mscoco_task0_val"


def test_a_union_is_whole_even_if_one_task_is_chosen() -> None:
    experiment = load("mbeir_clip_sf", [
        "tasks=[cirr_task7]", "unions={wiki: [oven_task6, infoseek_task6]}", "pools=[local, union, wiki]"])
    task, = experiment.tasks
    assert experiment.members("local", task) == ("cirr_task7",) and len(experiment.members("union", task)) == 16
    assert experiment.members("wiki", task) == ("oven_task6", "infoseek_task6")


@pytest.mark.parametrize("override, words", [
    ("embed.batchsize=64", ["'batchsize' is not an option of embed", "command line", "nearest: batch_size"]),
    ("embd.batch_size=64", ["'embd' is not", "nearest: embed"]),
    ("embed.batch_size=many", ["embed.batch_size", "many", "command line"]),
    ("embed.batch_size=0", ["embed.batch_size is 0", "at least 1"]),
    ("embed.precision=fp23", ["fp23", "fp32", "nearest"]),
    ("embed.instruction=random", ["none, first, hashed, all"]),
    ("encoders=[quickstart_clp]", ["encoder 'quickstart_clp' is not known", "nearest: quickstart_clip"]),
    ("encoders=[no.such.module]", ["encoder 'no.such.module' is not known"]),
    ("encoders.quickstart_clip.sed=1", ["'sed' is not an option of encoders.quickstart_clip", "nearest: seed"]),
    ("benchmark=mini", ["benchmark 'mini' is not known", "nearest: mini_mbeir"]),
    ("tasks=[scene_task0]", ["no task 'scene_task0'", "nearest: scenes_task0"]),
    ("pools=[unoin]", ["'unoin' is neither", "nearest: union"]),
    ("unions={x: [nope]}", ["there is no pool 'nope'"]),
    ("export.formats=[trek]", ["trek", "nearest: trec"]),
    ("unions={union: [facts_task1]}", ["'union' needs another name"]),
    ("unions={wiki: []}", ["'wiki' needs members"]),
    ("unions={a/b: [facts_task1]}", ["'a/b' cannot be part of a file name"]),
    ("name=../elsewhere", ["'../elsewhere' cannot be part of a file name"]),
    ("encoders=[quickstart_clip, quickstart_clip]", ["two encoders are named 'quickstart_clip'"]),
    ("embed.loaders=-5", ["embed.loaders is -5"]),
    ("retrieve.memory_gb=0", ["retrieve.memory_gb is 0"]),
    ("score.confidence=2", ["score.confidence is 2", "below 1"]),
    ("export.depth=0", ["export.depth is 0"]),
    ("pools=[]", ["`pools` is empty"]),
    ("encoders=[]", ["`encoders` is empty"]),
    ("embed.batch_size", ["not of the form key=value"]),
    ("tasks=[a", ["not valid YAML"]),
])
def test_mistakes_on_the_command_line(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load("quickstart", [override])
    for word in words:
        assert word in str(caught.value)


def test_all_mistakes_are_told_at_once_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("benchmark: mini_mbeir\nencoders: [quickstart_clip]\nembed:\n  precison: fp32\n  batch_size: x\n")
    with pytest.raises(UserError) as caught:
        load(str(path), ["retrive.depth=3"])
    for words in (f"{path}:4", "nearest: precision", f"{path}:5", "nearest: retrieve"):
        assert words in str(caught.value)


@pytest.mark.parametrize("text, words", [
    ("benchmark: [", "mine.yaml:2"), ("- a\n- b\n", "key: value"),
    ("encoders: [quickstart_clip]\n", "names no benchmark"),
    ("benchmark: mini_mbeir\nbenchmark: mbeir\nencoders: [x]\n", "duplicate key")])
def test_broken_experiment_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert words in str(caught.value)


def test_unknown_experiment_and_missing_file() -> None:
    with pytest.raises(UserError, match="nearest: quickstart"):
        load("quickstrat")
    with pytest.raises(UserError, match="there is no file"):
        load("./nope.yaml")


def test_own_pieces_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "encoder: uniir_clip\narchitecture: encoders/architectures/tiny_clip.json\nseed: 7\n")
    experiment = load("quickstart", [f"encoders=[quickstart_clip, {tmp_path}/mine.yaml]"])
    assert [encoder.name for encoder in experiment.encoders] == ["quickstart_clip", "mine"]
    assert experiment.encoders[1].params.seed == 7


def test_a_path_that_begins_with_a_dot_is_beside_the_configuration(tmp_path: Path) -> None:
    """An imported or trained encoder may be moved with its weights."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.yaml").write_text("encoder: uniir_clip\narchitecture: ViT-B-32-quickgelu\n"
                                                "weights: ./weights.safetensors\n")
    experiment = load("quickstart", [f"encoders=[{tmp_path}/mine/own.yaml]"])
    assert experiment.encoders[0].params.weights == str(tmp_path / "mine" / "weights.safetensors")
    alone = load_encoder_choice(f"{tmp_path}/mine/own.yaml")
    assert (alone.params, alone.module) == (experiment.encoders[0].params, "uniir_clip")


def test_one_encoder_by_itself_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("encoder: uniir_clip\narchitecture: ViT-B-32-quickgelu\nwieghts: a\n")
    with pytest.raises(UserError, match="wieghts"):
        load_encoder_choice(f"{tmp_path}/own.yaml")
