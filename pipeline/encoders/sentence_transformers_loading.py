"""A SentenceTransformer from a directory, whole: what is missing is known, and no code runs that was not trusted.

The library draws weights that a directory lacks at random and only says so in a log. Here they are handed out, so that
a model works without what it never uses (a pooler, another head) and is refused if a missing weight changes a vector.
The trade: while a model loads, transformers' `from_pretrained` is wrapped, which alone is told what was missing.
"""

# Shapes: B items, D dimensions.

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.encoders.model_directories import read_config
from pipeline.encoders.prompted import loading
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_OWN = "sentence_transformers."
_MANY_BYTES = 4 << 30


def load_model(directory: Path, device: str, dtype: Any, is_trusted: bool,
               **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """The model in eval mode with weights of this torch type, and by name those weights that are random.

    UserError if the directory does not say how the model is made up, if it brings code that is not trusted, or if its
    files do not fit together; the first weight of another shape is named.
    """
    _check_modules(directory, is_trusted)
    try:
        import sentence_transformers
    except ImportError as error:
        raise UserError("sentence-transformers is not installed", None,
                        "pip install 'plumbline[sentence-transformers]'") from error
    missing: dict[str, Tensor] = {}
    advice = "download the model again, or read its page for what it needs"
    with loading("sentence-transformers", str(directory), advice), _noting(missing, directory):
        model = sentence_transformers.SentenceTransformer(
            str(directory), device=device, trust_remote_code=is_trusted, local_files_only=True,
            model_kwargs={"torch_dtype": dtype}, **options)
    return model.eval(), missing


def refuse_if_used(missing: Mapping[str, Tensor], probe: Callable[[], np.ndarray], directory: Path) -> None:
    """UserError if the vectors of `probe` change with weights that are missing, and so are random."""
    if not missing:
        return
    import torch

    before_BD, generator = probe(), torch.Generator().manual_seed(0)
    for tensor in missing.values():  # NaN would be simpler, but attention kernels turn it into numbers
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    if not np.allclose(before_BD, probe(), atol=1e-4 * np.abs(before_BD).max()):
        raise UserError(f"{len(missing)} weights are missing, the first: {min(missing)}", str(directory),
                        "download the model again: its files do not belong together")


def has_many_weights(directory: Path) -> bool:
    """More than 4 GiB of them: a model of billions of parameters."""
    files = [*directory.rglob("*.safetensors"), *directory.rglob("*.bin")]
    return sum(path.stat().st_size for path in files) > _MANY_BYTES


def reserved_words(model: Any) -> re.Pattern[str]:
    """What stands for an image, a video or a sound in this model's prompts: a text that spells it out brings none."""
    processor = model.processor if model.supports("image") else None
    words = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
    return re.compile("|".join(re.escape(word) for word in words if word) or "(?!)")  # which matches nowhere


@contextmanager
def _noting(missing: dict[str, Tensor], directory: Path) -> Iterator[None]:
    """Of models that transformers loads inside this context, the weights that no file had are noted."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = original.__get__(None, cls)(*arguments, **options)
        if unfit := sorted(str(entry[0]) for entry in found["mismatched_keys"]):
            raise UserError(f"'{unfit[0]}' has another shape than config.json says", str(directory),
                            "download the model again: its files do not belong together")
        absent = set(found["missing_keys"])
        missing.update({name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())
                        if name in absent})
        return model

    setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    try:
        yield
    finally:
        setattr(PreTrainedModel, "from_pretrained", original)


def _check_modules(directory: Path, is_trusted: bool) -> None:
    """UserError unless the directory says which modules the model is made of, all of them the library's own.

    Without modules.json the library averages tokens, which for many models is wrong. Before 6.0 it also ran any code
    that a local directory names.
    """
    path = directory / "modules.json"
    if not path.is_file():
        raise UserError("modules.json is missing: how this model makes one vector of its tokens is not written down",
                        str(directory), "name another encoder module if there is one for this family; or\n"
                        "SentenceTransformer('<directory>').save('<another>') writes down the library's guess")
    if (directory / "config_sentence_transformers.json").is_file():
        kind = read_config(directory, "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
        if kind != "SentenceTransformer":
            raise UserError(f"this is a {kind}: it makes no dense vector of an item", str(directory),
                            "choose a dense model")
    try:
        modules = [str(module["type"]) for module in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"not a list of modules: {error}", str(path), "download the model again") from error
    foreign = [module for module in modules if not module.startswith(_OWN)]
    if foreign and not is_trusted:
        raise UserError(f"this model brings its own code: {foreign[0]}", str(path),
                        "read that code, then set trust_remote_code: true")
