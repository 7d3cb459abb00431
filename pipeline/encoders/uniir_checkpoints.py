"""UniIR's training checkpoints in and out: inference weights as safetensors with their configuration, and back.

Promises: nothing from a checkpoint is run; what is written fits its architecture name by name, every number as it
was; no file is replaced by another. The trade: optimiser, scheduler and scaler are left behind (they are two thirds
of a file), so UniIR's own trainer cannot go on from what is written back; it can evaluate it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.artifacts import atomic_path, file_sha256
from pipeline.encoders import blip_towers, uniir_blip, uniir_clip
from pipeline.encoders.checkpoints import (
    find_file, load_state, read_torch, save_safetensors, separate, source_identity, weights_hash,
)
from pipeline.encoders.uniir_clip import FUSION_LAYERS, PREFIX
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Params = uniir_clip.Params | uniir_blip.Params

STOCK = ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu")
WEIGHTS = "weights.safetensors"
TRAINING_ONLY = re.compile(r"[^.]+_m(\..+)?|[^.]+_queue")  # momentum twins of towers and heads; queues of vectors
LISTED = 10  # misfits that are spelled out; a wrong architecture has hundreds


class _Family(NamedTuple):
    """One of UniIR's two kinds of towers: its encoder's module, and the architectures that were published."""

    name: str
    module: Any
    stock: tuple[str, ...]

    @property
    def encoder(self) -> str:
        return str(self.module.__name__.rpartition(".")[2])


_CLIP = _Family("CLIP", uniir_clip, STOCK)
_BLIP = _Family("BLIP", uniir_blip, tuple(blip_towers.STOCK))


class Imported(NamedTuple):
    """What an import wrote. fingerprint: `sha256:<64 hex>` of the weights file; dropped: what was left behind."""

    yaml: Path
    weights: Path
    fingerprint: str
    tensors: int
    parameters: int
    dropped: list[str]


def import_checkpoint(source: Path, directory: Path, name: str, architecture: str | None = None) -> Imported:
    """Write `weights.safetensors` and `<name>.yaml` to `directory`: an encoder of UniIR's checkpoint.

    `architecture`: a name or JSON file (copied beside the weights); found from the shapes if it was published.
    The same import again is no mistake. UserError for what is no model of UniIR's, does not fit, or asks for code.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name, re.ASCII):
        raise UserError(f"'{name}' cannot name an encoder", None, "letters, digits, `-` and `_`")
    if directory.exists() and not directory.is_dir():
        raise UserError("this is a file, not a directory", str(directory), "name a directory to import into")
    source = find_file(str(source), "checkpoint")
    found = load_state(source)
    family = _family_of(found)
    state = _inference_weights(found, family)
    fusion = family.module.fusion_of(state) or "score"
    fitting = architecture or _stock_architecture(state, family, fusion, source)
    check_fit(state, family.module.Params(fitting, fusion=fusion), source)
    around, epoch = _around(source)
    fitting = _beside(fitting, directory)
    weights, yaml = directory / WEIGHTS, directory / f"{name}.yaml"
    _write_once(weights, lambda path: save_safetensors(state, path))
    comment = _comment(source, f"{family.name}_{'FF' if fusion == 'feature' else 'SF'}", epoch)
    content = f"encoder: {family.encoder}\narchitecture: {fitting}\nfusion: {fusion}\nweights: ./{WEIGHTS}\n"
    _write_once(yaml, lambda path: path.write_text(comment + content))
    numbers = sum(tensor.numel() for tensor in state.values())
    dropped = around + _summary(name for name in found if name.removeprefix(PREFIX) not in state)
    return Imported(yaml, weights, weights_hash(weights), len(state), numbers, dropped)


def export_checkpoint(params: Params, destination: Path) -> None:
    """Write the encoder's weights under UniIR's names: a file for its evaluation, or flat if `.safetensors`.

    UniIR reads the entry `model`, strictly; so BLIP's has momentum twins and empty queues beside the weights, which
    a flat file has not. CLIP's has no `t5_layers.embed_tokens`, as the release of transformers that UniIR is written
    for makes none. UserError if `destination` exists.
    """
    import torch

    if destination.exists():
        raise UserError("this file exists already", str(destination), "choose another name, or remove it first")
    family = _family(params)
    state = _state_of(params)
    if family is _CLIP:
        state = {name if name.startswith(FUSION_LAYERS) else PREFIX + name: each for name, each in state.items()}
    with atomic_path(destination) as temporary:
        if destination.suffix == ".safetensors":
            save_safetensors(state, temporary)
            return
        model = separate(state)
        if isinstance(params, uniir_blip.Params):
            model = uniir_blip.training_state(model, params)
        config = {"encoder": family.encoder, "architecture": params.architecture, "fusion": params.fusion}
        torch.save({"model": model, "config": config, "epoch": 0}, temporary)


def check_fit(state: Mapping[str, Tensor], params: Params, where: Path) -> None:
    """UserError that lists what differs in name, shape or kind from the model of these parameters."""
    misfits = _misfits(state, expected_shapes(params))
    if misfits:
        raise _unfit(f"the weights do not fit {params.architecture} with {params.fusion} fusion", misfits, where,
                     "name the architecture that these weights were trained with")


def expected_shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's weights. No memory is taken for them."""
    import torch

    module = _family(params).module
    architecture = module.checked_architecture(params)
    with torch.device("meta"):
        model = module.new_uniir_model(architecture, params.fusion)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _family(params: Any) -> _Family:
    found = next((family for family in (_CLIP, _BLIP) if isinstance(params, family.module.Params)), None)
    if found is None:
        raise UserError("only UniIR's encoders have checkpoints of UniIR's", type(params).__module__,
                        "name an encoder whose configuration says `encoder: uniir_clip` or `encoder: uniir_blip`")
    return found


def _family_of(names: Iterable[str]) -> _Family:
    return _BLIP if any(name.startswith(("visual_encoder.", "text_encoder.")) for name in names) else _CLIP


def _stock_architecture(state: Mapping[str, Tensor], family: _Family, fusion: str, source: Path) -> str:
    found = {name: _misfits(state, expected_shapes(family.module.Params(name, fusion=fusion)))
             for name in family.stock}
    closest = min(found, key=lambda name: len(found[name]))
    if found[closest]:
        other = "a JSON file" if family is _BLIP else "a name of open_clip's or a JSON file"
        raise _unfit(f"the weights fit none of {', '.join(found)}; {closest} is closest", found[closest], source,
                     f"if they are of another architecture, name it ({other})")
    return closest


def _misfits(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    lines = [f"'{name}' is missing" for name in expected if name not in state]
    for name, tensor in state.items():
        if name not in expected:
            lines.append(f"'{name}' is not part of it")
        elif tuple(tensor.shape) != expected[name]:
            lines.append(f"'{name}' has shape {tuple(tensor.shape)}, not {expected[name]}")
        elif not tensor.is_floating_point():
            lines.append(f"'{name}' holds {tensor.dtype}, not floating point numbers")
    return lines


def _unfit(what: str, misfits: list[str], where: Path, do: str) -> UserError:
    more = [f"and {len(misfits) - LISTED} more"] if len(misfits) > LISTED else []
    return UserError(what, str(where), "\n".join([*misfits[:LISTED], *more, do]))


def _inference_weights(found: Mapping[str, Tensor], family: _Family) -> dict[str, Tensor]:
    own = family.module.own_names(found)
    return {name: tensor for name, tensor in own.items() if not TRAINING_ONLY.fullmatch(name)}


def _summary(names: Iterable[str]) -> list[str]:
    """Names in order; a tower's momentum twin, which has hundreds, in one word."""
    return sorted({re.sub(r"^([^.]+_m)\..+", r"\1.*", name) for name in names})


def _around(source: Path) -> tuple[list[str], int | None]:
    """What stands beside the weights in a training checkpoint, and its epoch."""
    payload = {} if source.suffix == ".safetensors" else read_torch(source)
    wrapper = next((key for key in ("model", "state_dict") if isinstance(payload.get(key), Mapping)), None)
    if wrapper is None:
        return [], None
    epoch = payload.get("epoch")
    return sorted(str(key) for key in payload if key not in (wrapper, "epoch")), epoch if type(epoch) is int else None


def _beside(architecture: str, directory: Path) -> str:
    """The architecture as the configuration names it: a JSON file is copied, so that the directory is complete."""
    if not architecture.endswith(".json"):
        return architecture
    path = find_file(architecture, "architecture")
    _write_once(directory / "architecture.json", lambda copy: shutil.copyfile(path, copy))
    return "./architecture.json"


def _write_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Whole, and never over other content: a configuration may name the file that is there."""
    with atomic_path(path) as temporary:
        write(temporary)
        if path.exists() and file_sha256(path) != file_sha256(temporary):
            raise UserError("this file exists already, with other content", str(path),
                            "import into another directory, or remove it first")


def _comment(source: Path, kind: str, epoch: int | None) -> str:
    trained = "" if epoch is None else f", epoch {epoch}"
    # ascii() keeps a name with a line break in it inside the comment
    return f"# UniIR {kind}, imported from {ascii(source.name)}{trained}.\n# {weights_hash(source)}\n"


def _state_of(params: Params) -> dict[str, Tensor]:
    """The weights under our names: as they are in the file, or random ones of the seed."""
    source_identity(params.weights, params.seed)  # refuses both, and neither
    module = _family(params).module
    if params.weights is None:
        model = module.new_uniir_model(module.checked_architecture(params), params.fusion, params.seed)
        return dict(model.state_dict())
    path = find_file(params.weights, "weights file")
    state: dict[str, Tensor] = module.own_names(load_state(path))
    check_fit(state, params, path)
    return state
