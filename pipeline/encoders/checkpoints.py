"""Weights on disk: which file is meant, what its content is called, which tensors it holds.

Promises: reading a checkpoint never runs code from it; what is loaded fits the model name by name; a file is
known by the sha256 of its bytes, never by its path or time. The hash of a large file takes seconds, so it is
kept in the user's cache under the file's path, size and times. The trade: a file whose bytes are changed
without changing any of those would be believed; files written in the last two seconds are therefore hashed
anew each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.support.cache import user_cache
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SETTLED_NS = 2_000_000_000  # coarse file systems stamp times in steps of up to two seconds


def find_file(name: str, kind: str) -> Path:
    """An existing file: `name` as given (`~` allowed), else below the repository's configs/."""
    path = Path(name).expanduser()
    for candidate in (path, CONFIGS / path):
        if candidate.is_file():
            if not os.access(candidate, os.R_OK):
                raise UserError(f"{kind} may not be read", str(candidate), "ask for read permission")
            return candidate
    if path.is_dir():
        raise UserError(f"{kind} is a directory, not a file", str(path), "name the file inside it")
    below = "" if path.is_absolute() else f" (nor below {CONFIGS})"
    raise UserError(f"{kind} not found{below}", str(path), "check the path, or download the file first")


def weights_hash(path: Path, cache_dir: Path | None = None) -> str:
    """`sha256:<64 hex>` of the file's bytes, remembered in `cache_dir` (default: the user's own cache)."""
    path = find_file(str(path), "weights file").resolve()
    folder = cache_dir if cache_dir is not None else user_cache("weights")
    note = folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    stamp = _stamp(path)
    known = _read_note(note)
    if known.get("stamp") == stamp and isinstance(known.get("hash"), str):
        return str(known["hash"])
    with path.open("rb") as file:
        digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    if stamp == _stamp(path) and time.time_ns() - max(stamp[2:]) > SETTLED_NS:
        _write_note(note, {"path": str(path), "stamp": stamp, "hash": digest})
    return digest


def _stamp(path: Path) -> list[int]:
    """Inode, size, and the times of the last change of content and of the file itself (ns)."""
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read_note(note: Path) -> dict[str, Any]:
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # absent or damaged: the hash is computed again
    return known if isinstance(known, dict) else {}


def _write_note(note: Path, content: dict[str, Any]) -> None:
    """Whole or not at all. A cache that cannot be written (read-only home, full disk) costs only time."""
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=note.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file)
            os.replace(temporary, note)
        except OSError:
            os.unlink(temporary)
            raise


def source_identity(weights: str | None, seed: int | None) -> dict[str, Any]:
    """What the fingerprint sees of a weights file, or of random weights (which depend on who draws them)."""
    if (weights is None) == (seed is None):
        raise UserError("an encoder needs `weights` or `seed`, exactly one of the two", None,
                        "weights: <file> for a trained model, seed: 0 for random weights")
    if weights is None:
        return {"seed": seed, "torch": version("torch"), "open_clip": version("open_clip_torch")}
    return {"weights": weights_hash(find_file(weights, "weights file"))}


def load_state(path: Path) -> dict[str, Tensor]:
    """Name -> tensor (on the CPU) of a safetensors file or of a torch.save file of plain tensors.

    A training checkpoint is unwrapped: its `model` or `state_dict` entry is taken, a `module.` prefix (from
    DistributedDataParallel) removed. UserError if the file is missing, damaged, no checkpoint, or wants code.
    """
    path = find_file(str(path), "weights file")
    payload = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    state = _tensors(payload)
    if not state:
        raise UserError("no model weights in the file", str(path),
                        "expected names with tensors, at the top or under `model` or `state_dict`")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"not a whole safetensors file: {error}", str(path), "copy or download it again") \
            from error


def save_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write name -> tensor to a file that others may read as far as the user's umask says."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # some releases of safetensors make the file private
    save_file(separate(state), path, {"format": "pt"})
    path.chmod(mode)


def separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with memory of its own: a view would drag along all that it is a part of."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage()
        is_whole = tensor.is_contiguous() and memory.nbytes() == tensor.nbytes and memory.data_ptr() not in seen
        seen.add(memory.data_ptr())
        separate[name] = tensor.detach() if is_whole else tensor.detach().contiguous().clone()
    return separate


def read_torch(path: Path) -> Any:
    import torch

    # Mapped, not read: two thirds of a training checkpoint are optimizer state that nobody touches here.
    mapped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(_plain_types()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load has no error type of its own, the bytes decide
        raise _unreadable(path, str(error)) from error


def _plain_types() -> list[Any]:
    """What a published checkpoint may hold beside tensors: an OmegaConf config of plain values.

    Safe because none of these runs or imports anything when it is built: they only store what they are given
    (an interpolation inside a config is resolved when read, and nobody reads it).
    """
    from omegaconf import DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode

    return [DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode, Any, defaultdict, dict, list, int]


def _unreadable(path: Path, reason: str) -> UserError:
    convert = ("if you trust its source, load it in a throw-away environment and save its tensors with\n"
               "safetensors.torch.save_file: the .safetensors file loads here")
    if "TorchScript" in reason:
        return UserError("a TorchScript archive is a program, not a file of weights", str(path), convert)
    refused = re.search(r"GLOBAL (\S+)", reason)
    if refused:
        return UserError(f"refused: it asks for '{refused[1]}', which is not plain data", str(path), convert)
    return UserError("not a readable checkpoint (cut short, damaged, or another format)", str(path),
                     "copy or download it again, and compare its size with the source")


def _tensors(payload: Any) -> dict[str, Tensor]:
    """The innermost mapping of names to tensors; empty if there is none."""
    from torch import Tensor

    if not isinstance(payload, Mapping):
        return {}
    for wrapper in ("model", "state_dict"):
        if isinstance(payload.get(wrapper), Mapping):
            return _tensors(payload[wrapper])
    whole = all(isinstance(name, str) and isinstance(value, Tensor) for name, value in payload.items())
    return dict(payload) if whole else {}


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy `state` into `model`; UserError naming the first name or shape in which the two differ."""
    wanted = model.state_dict()
    names = [*wanted, *(name for name in state if name not in wanted)]
    differences = [line for line in (_difference(name, wanted, state) for name in names) if line]
    if differences:
        raise UserError(f"the weights do not fit the architecture: {differences[0]}\n"
                        f"       ({len(differences)} of {len(names)} names differ)", str(path),
                        "choose the architecture that these weights were trained with")
    model.load_state_dict(state)


def _difference(name: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    if name not in found:
        return f"'{name}' is missing"
    if name not in wanted:
        return f"'{name}' is not part of the architecture"
    if found[name].shape != wanted[name].shape:
        return f"'{name}' has shape {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
    return None
