"""Encoders: one file per model family. The file name is the registry.

An encoder is a module (its top level free of torch, so that planning stays instant) with

    Params                               frozen dataclass: all that may change the vectors
    identity(params) -> dict             what the fingerprint sees: content hashes, never names or paths
    build(params, device, precision)     -> an Encoder
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from pipeline.support.plugins import load_plugin

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor, nn


@dataclass(frozen=True)
class Item:
    """What is encoded into one vector. `text` is the final text, its instruction included.

    `instruction` and `bare_text` are the same text in two parts, for encoders with a template of their own; `role` is
    for those that encode what is asked otherwise than what is found; `id` is the query_id or candidate_id, for those
    that declare `needs_ids`: of equal items, which share a vector, any one's.
    """

    text: str | None
    image: Image | None
    instruction: str | None = None
    bare_text: str | None = None
    role: Literal["query", "candidate"] = "candidate"
    id: str | None = None


class Encoder(Protocol):
    """Items in, one vector per item out, one space for all modalities.

    What one may have beside, each for an option of `embed` that asks for it:

        image_size: tuple[int, int]    decoding=draft: height and width below which an image must not be scaled
        compile() -> None              compile=true: let torch compile the model; vectors differ by rounding only

    And of its own accord:

        needs_ids: bool                True: a vector belongs to an id, not to a content: equal items are not shared,
                                       and no image is opened (`item.image` is None)
        uses_device: bool              False: it computes elsewhere, or nothing: batch_size=auto tries nothing out

    Memory that does not suffice is no mistake: where `encode` raises torch.OutOfMemoryError, it is called with less.
    """

    dimension: int
    modalities: frozenset[str]

    def prepare(self, item: Item) -> Any:
        """Decode, resize, tokenise: runs in loader processes; the result is picklable."""

    def encode(self, batch: Sequence[Any]) -> np.ndarray:
        """float32 [B, D], one row per prepared item in order, not normalised."""


class TrainableEncoder(Encoder, Protocol):
    """What `train` needs beside: weights that can be learned, under the names by which the module loads them.

    Its module also defines

        with_weights(params, weights: str) -> Params    the same encoder with the weights of this file
    """

    model: nn.Module  # all parameters, `logit_scale` (a scalar, the logarithm) among them
    device: str

    def embed(self, batch: Sequence[Any]) -> Tensor:
        """float32 [B, D] on the device, not normalised, with gradients."""


class EncoderModule(Protocol):
    Params: type[Any]

    def identity(self, params: Any) -> dict[str, Any]: ...
    def build(self, params: Any, device: str, precision: str) -> Encoder: ...


REQUIRES = ("Params", "identity", "build")


def load_encoder(name: str) -> EncoderModule:
    """The module `pipeline/encoders/<name>.py`, or a user's own module under a dotted path."""
    return cast(EncoderModule, load_plugin("encoder", "pipeline.encoders", name, REQUIRES))
