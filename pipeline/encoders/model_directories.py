"""Models that are a directory of files, as transformers and sentence-transformers save them: here, or on a hub.

Promises: the fingerprint sees what the files hold, or a commit, never a name or a path; nothing is fetched that is
not pinned; nothing in a directory is run. The trade: a file that cannot matter (a changed comment in a config) still
makes another fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pipeline.encoders.checkpoints import CONFIGS, weights_hash
from pipeline.support.errors import UserError

# what a model is made of; the rest of a directory (pages, pictures, other frameworks' weights) changes no vector
_DESCRIPTIONS = (".json", ".jinja", ".txt", ".model")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_OTHER_FRAMEWORKS = ("onnx", "openvino", "original")
_NOT_FETCHED = ["*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf", *(f"{name}/*" for name in _OTHER_FRAMEWORKS)]


def directory_identity(model: str, revision: str | None, with_weights: bool = True) -> dict[str, Any]:
    """What the fingerprint sees: a sha256 over the files of a directory, or repository and commit. No torch.

    Without weights, those of the directory do not count: only its configuration and its tokenizer are read.
    """
    directory = find_directory(model)
    if directory is not None:
        if revision is not None:
            raise UserError("`revision` goes with a repository, not a directory", None, "remove it")
        return {"model": _content_hash(directory, with_weights)}
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII):
        raise UserError(f"there is no directory '{model}'", None,
                        "name a directory that holds a model, or a repository (`owner/name`) with its `revision`")
    if not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise UserError(f"there is no directory '{model}', and as a repository it needs `revision`", None,
                        "revision: <the 40-digit commit of its Hugging Face repository>,\n"
                        "or download it and name the directory as `model`")
    return {"repository": model, "revision": revision}


def model_directory(model: str, revision: str | None, with_weights: bool = True) -> Path:
    """The directory with the model's files, fetched (or found in the hub's cache) if `model` is a repository."""
    directory_identity(model, revision, with_weights)  # the same mistakes are refused with or without a plan
    return find_directory(model) or _fetch(model, str(revision), with_weights)


def find_directory(name: str) -> Path | None:
    """An existing directory: `name` as given (`~` allowed), else below the repository's configs/."""
    path = Path(name).expanduser()
    return next((found for found in (path, CONFIGS / path) if found.is_dir()), None)


def read_config(directory: Path, name: str = "config.json") -> dict[str, Any]:
    """One of the model's JSON files; UserError if it is missing or damaged."""
    path = directory / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"this directory holds no model: {name} is missing", str(directory),
                        "name the directory that has it, or download the model again") from None
    except ValueError as error:
        raise UserError(f"not JSON: {error}", str(path), "download the model again") from error
    if not isinstance(found, dict):
        raise UserError("not a JSON object", str(path), "download the model again")
    return found


def _content_hash(directory: Path, with_weights: bool) -> str:
    kinds = _DESCRIPTIONS + (_WEIGHTS if with_weights else ())
    files = sorted(path for path in directory.rglob("*")
                   if _matters(path.relative_to(directory), kinds) and path.is_file())
    if not files:
        raise UserError("this directory holds no model", str(directory), "name the directory with its config.json")
    content = {path.relative_to(directory).as_posix(): weights_hash(path) for path in files}
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _matters(path: Path, kinds: tuple[str, ...]) -> bool:
    return (path.suffix in kinds and path.parts[0] not in _OTHER_FRAMEWORKS
            and not any(part.startswith(".") for part in path.parts))


def _fetch(repository: str, revision: str, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    ignored = _NOT_FETCHED + ([] if with_weights else [f"*{kind}" for kind in _WEIGHTS])
    try:
        return Path(snapshot_download(repository, revision=revision, ignore_patterns=ignored))
    except (OSError, ValueError) as error:  # no network, no such commit, no permission: all are one of these
        raise UserError(f"cannot fetch {repository} at {revision}", str(error).splitlines()[0],
                        "run once with network access,\n"
                        "or download it and name the directory as `model`") from error
