"""Images for models of transformers: its image processor in two halves, uint8 in between, the same result.

Loader processes resize, crop and cut into tiles; what travels is uint8, a quarter of the bytes. What remains makes of
every value of every colour one float32, so it is a table with 256 columns, which the processor itself fills: the
vectors are those of the undivided processor, bit by bit, on any device. A processor that does something else after
resizing is found out when it is loaded, and is then run whole by the loaders.
"""

# Shapes: N tiles or none of H x W pixels, C = 3 colours.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

PIXELS = "pixel_values"


class ProcessedImages:
    """From an image to what a model of transformers takes: {"pixel_values": ..., perhaps others}."""

    def __init__(self, processor: Any, device: str):
        import torch

        self.processor, self.device = processor, device
        self._table_C256: Tensor | None = None
        if self._can_be_divided():
            self._table_C256 = torch.from_numpy(self._filled_table()).to(device)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width to which images are resized; None where the processor has no such number."""
        size = getattr(self.processor, "size", None) or {}
        if size.get("shortest_edge"):
            return int(size["shortest_edge"]), int(size["shortest_edge"])
        return (int(size["height"]), int(size["width"])) if size.get("height") and size.get("width") else None

    def cut(self, image: Image) -> dict[str, np.ndarray]:
        """One image ready to travel: uint8 [..., C, H, W], or what the whole processor makes of it."""
        return self._processed(image, {} if self._table_C256 is None else self._halved())

    def ready(self, images: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
        """Images [B, ..., C, H, W] on the device, from what `cut` made of each."""
        import numpy as np
        import torch

        stacked = {name: torch.from_numpy(np.stack([image[name] for image in images])) for name in images[0]}
        on_device = {name: values.to(self.device) for name, values in stacked.items()}
        if self._table_C256 is not None:
            on_device[PIXELS] = self._looked_up(on_device[PIXELS], self._table_C256)
        return on_device

    def _looked_up(self, pixels: Tensor, table_C256: Tensor) -> Tensor:
        import torch

        colours = [table_C256[colour].index_select(0, plane.flatten().int()).reshape(plane.shape)
                   for colour, plane in enumerate(pixels.unbind(-3))]
        return torch.stack(colours, dim=-3)

    def _can_be_divided(self) -> bool:
        """Whether a colourful image goes through both halves as through the whole."""
        import numpy as np
        import torch
        from PIL import Image

        probe = Image.fromarray(np.random.RandomState(0).randint(0, 256, (23, 31, 3)).astype(np.uint8))
        try:
            whole, half = self._processed(probe, {}), self._processed(probe, self._halved())
            table_C256 = torch.from_numpy(self._filled_table())
        except (TypeError, ValueError, KeyError, IndexError):
            return False  # a processor without these switches
        pixels = half.get(PIXELS)
        if pixels is None or pixels.dtype != np.uint8 or pixels.ndim < 3 or pixels.shape[-3] != 3:
            return False
        return np.array_equal(self._looked_up(torch.from_numpy(pixels), table_C256).numpy(), whole[PIXELS])

    def _filled_table(self) -> np.ndarray:
        """float32 [C, 256]: what rescaling and normalisation make of each value, by the processor itself."""
        import numpy as np

        processor = self.processor
        every = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (3, 16, 16)).copy()
        if processor.do_rescale:
            every = processor.rescale(every, processor.rescale_factor)
        if processor.do_normalize:
            every = processor.normalize(every, processor.image_mean, processor.image_std)
        return np.ascontiguousarray(np.asarray(every, np.float32).reshape(3, 256))

    def _halved(self) -> dict[str, bool]:
        return {"do_rescale": False, "do_normalize": False}

    def _processed(self, image: Image, switches: Mapping[str, bool]) -> dict[str, np.ndarray]:
        import numpy as np

        made = self.processor([image], return_tensors="np", **switches)
        return {name: np.asarray(values)[0] for name, values in made.items()}
