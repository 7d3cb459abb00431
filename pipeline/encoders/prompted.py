"""What encoders on libraries with prompts of their own share: what they are given, and how mistakes are told.

The trade: text, pixels and prompt stay apart until `encode`, where the library joins them as each model asks; so images
are resized and texts tokenised there, not in loader processes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.encoders import Item
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class Prepared:
    """Text, image (uint8 [H, W, 3], RGB) or both; the prompt (None: none is chosen), and whether it is a query."""

    text: str | None
    image: np.ndarray | None
    prompt: str | None
    role: str

    @property
    def kind(self) -> str:
        return ",".join(name for name in ("image", "text") if getattr(self, name) is not None)

    @classmethod
    def of(cls, item: Item, text: str | None, prompt: str | None) -> Prepared:
        """The item with these words; the text of an item without anything is empty."""
        image = None if item.image is None else np.asarray(item.image, np.uint8)
        return cls(text or ("" if image is None else None), image, prompt, item.role)

    @property
    def picture(self) -> Image:
        from PIL import Image

        assert self.image is not None
        return Image.fromarray(self.image)


def probes() -> dict[str, Item]:
    """An item of each kind."""
    from PIL import Image

    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    return {"text": Item("a probe", None), "image": Item(None, grey), "image,text": Item("a probe", grey)}


def warn_unless_cosine(model: str, similarity: str) -> None:
    if similarity != "cosine":
        log.warning("%s is made for the %s of its vectors; the search takes their cosine", model, similarity)


@contextmanager
def loading(library: str, model: str, do: str) -> Iterator[None]:
    """UserError with what the library says first, whatever it raises: its loaders fail each in its own way."""
    import torch

    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{library} cannot load this model: {what}", model, do) from error
