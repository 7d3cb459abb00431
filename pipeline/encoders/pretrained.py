"""What transformers builds from a directory of files: a model, its tokenizer, what prepares its images.

Promises: nothing in the directory is run, nothing is fetched; weights fit name by name and shape by shape or are
refused (transformers would draw the missing ones at random and only warn); a directory without a vocabulary is
refused (transformers would make an empty one). Images are prepared by PIL: torchvision's resize, the default, differs
by one step of 255 in some pixels. The trade: a directory whose parts are good enough for others may be refused here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.encoders.model_directories import read_config
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    import torch

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model",
                "sentencepiece.bpe.model")
ONLY_FOR_TRAINING = ("logit_scale", "logit_bias")  # one number each, that no vector depends on


def load_config(directory: Path) -> Any:
    """The model's configuration as transformers reads it; UserError if it is missing or of no model it knows."""
    from transformers import AutoConfig

    kind = read_config(directory).get("model_type")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of a config transformers raises whatever the first bad value leads to
        raise UserError(f"transformers cannot read this config (model_type {kind!r}): {_first_line(error)}",
                        str(directory), "a model whose code lies beside its weights is not run") from error


def load_weights(kind: Any, config: Any, directory: Path, dtype: torch.dtype, unread: Sequence[str] = ()) -> Any:
    """A `kind` (a class of transformers) in eval mode with the directory's weights, all of them, on the CPU.

    `unread`: beginnings of names that the file may hold and this model does not read.
    """
    with _quietly():
        try:
            model, found = kind.from_pretrained(
                directory, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
                trust_remote_code=False, local_files_only=True)
        except Exception as error:  # damaged files: the reader decides what it raises
            raise UserError(f"cannot load the weights: {_first_line(error)}", str(directory),
                            "copy or download the directory again, and compare its sizes with the source") from error
    _check_names(found, directory, unread)
    return model.eval()


def _check_names(found: Mapping[str, Any], directory: Path, unread: Sequence[str]) -> None:
    differences = [f"'{name}' is missing" for name in sorted(found["missing_keys"])
                   if name not in ONLY_FOR_TRAINING]
    differences += [f"'{name}' has shape {tuple(there)}, not {tuple(wanted)}"
                    for name, there, wanted in sorted(found["mismatched_keys"])]
    differences += [f"'{name}' is not part of the model" for name in sorted(found["unexpected_keys"])
                    if not name.startswith(tuple(unread)) and name not in ONLY_FOR_TRAINING]
    differences += [str(message) for message in found.get("error_msgs", ())]
    if differences:
        raise UserError(f"the weights do not fit the config: {differences[0]}\n"
                        f"       ({len(differences)} names differ)", str(directory),
                        "the config.json must be that of these weights")


def load_tokenizer(directory: Path, config: Any) -> Any:
    """The model's tokenizer; UserError if the directory holds no vocabulary, or one that cannot be read."""
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise UserError("this directory holds no tokenizer", str(directory),
                        f"one of these must be in it: {', '.join(VOCABULARIES)}")
    # Items are tokenised one by one in processes forked from this one, where tokenizers would warn of its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _quietly():
        try:
            return AutoTokenizer.from_pretrained(directory, config=config, trust_remote_code=False,
                                                 local_files_only=True)
        except Exception as error:  # tokenizers has no error type of its own
            raise UserError(f"cannot read the tokenizer: {_first_line(error)}", str(directory),
                            "pip install sentencepiece, if that is what it asks for,\n"
                            "or download the directory again") from error


def load_image_processor(directory: Path, config: Any) -> Any:
    """What resizes and crops the model's images, with PIL; UserError if the directory does not say how."""
    from transformers import AutoImageProcessor

    with _quietly():
        try:
            return AutoImageProcessor.from_pretrained(directory, config=config, backend="pil",
                                                      trust_remote_code=False, local_files_only=True)
        except Exception as error:  # a missing file, a bad value, a class of foreign code: each another type
            raise UserError(f"cannot tell how images are prepared: {_first_line(error)}", str(directory),
                            "the directory needs its preprocessor_config.json") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' bars and warnings: what matters of them is an error here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
