"""A model's directory is known by what its files hold; a repository by its commit, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pipeline.encoders.model_directories import directory_identity, model_directory, read_config
from pipeline.support.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "1_Pooling").mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "clip"}')
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "1_Pooling" / "config.json").write_text("{}")
    return directory


def test_the_identity_is_the_content_wherever_it_lies(model: Path, tmp_path: Path) -> None:
    first = directory_identity(str(model), None)
    moved = shutil.copytree(model, tmp_path / "elsewhere" / "other name")
    assert directory_identity(str(moved), None) == first
    assert str(model) not in json.dumps(first)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "1_Pooling/config.json", "new/tokenizer.json"])
def test_any_file_that_may_matter_changes_it(model: Path, name: str) -> None:
    first = directory_identity(str(model), None)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text('{"changed": true}')
    assert directory_identity(str(model), None) != first


def test_a_file_under_another_name_changes_it(model: Path) -> None:
    first = directory_identity(str(model), None)
    (model / "model.safetensors").rename(model / "other.safetensors")
    assert directory_identity(str(model), None) != first


@pytest.mark.parametrize("name", ["README.md", "onnx/config.json", ".cache/huggingface/download.json", "page.html"])
def test_what_is_no_part_of_the_model_does_not(model: Path, name: str) -> None:
    first = directory_identity(str(model), None)
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    (model / name).write_text("anything")
    assert directory_identity(str(model), None) == first


def test_where_weights_are_not_read_they_do_not_count(model: Path) -> None:
    first = directory_identity(str(model), None, with_weights=False)
    (model / "model.safetensors").write_bytes(b"other weights")
    assert directory_identity(str(model), None, with_weights=False) == first
    (model / "config.json").write_text("{}")
    assert directory_identity(str(model), None, with_weights=False) != first


def test_links_of_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    first = directory_identity(str(model), None)
    blob = tmp_path / "blob"
    (model / "model.safetensors").rename(blob)
    os.symlink(blob, model / "model.safetensors")
    assert directory_identity(str(model), None) == first


def test_a_repository_is_known_by_its_commit() -> None:
    assert directory_identity("owner/name", COMMIT) == {"repository": "owner/name", "revision": COMMIT}


@pytest.mark.parametrize("name, revision, what", [
    ("owner/name", None, "needs `revision`"), ("owner/name", "main", "needs `revision`"),
    ("nowhere", COMMIT, "there is no directory 'nowhere'"), ("a/b/c", COMMIT, "there is no directory"),
    ("", None, "holds no model")])
def test_what_is_neither_is_refused(name: str, revision: str | None, what: str, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=what):
        directory_identity(name, revision)
    with pytest.raises(UserError, match=what):
        model_directory(name, revision)


def test_a_directory_takes_no_revision_and_needs_files(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`revision` goes with a repository"):
        directory_identity(str(model), COMMIT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        directory_identity(str(tmp_path / "empty"), None)


def test_exactly_that_commit_is_fetched(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot_download(*names: str, **options: Any) -> str:
        asked.append((*names, options["revision"], "*.safetensors" in options["ignore_patterns"]))
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert model_directory("owner/name", COMMIT) == model
    assert model_directory("owner/name", COMMIT, with_weights=False) == model
    assert asked == [("owner/name", COMMIT, False), ("owner/name", COMMIT, True)]


def test_without_network_the_advice_is_to_download_it() -> None:
    with pytest.raises(UserError, match=f"cannot fetch owner/name at {COMMIT}") as caught:
        model_directory("owner/name", COMMIT)
    assert "name the directory as `model`" in str(caught.value)


@pytest.mark.parametrize("content, what", [
    (None, "config.json is missing"), ("{", "not JSON"), ("[]", "not a JSON object")])
def test_a_damaged_config_is_named(model: Path, content: str | None, what: str) -> None:
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_text(content)
    with pytest.raises(UserError, match=what):
        read_config(model)
