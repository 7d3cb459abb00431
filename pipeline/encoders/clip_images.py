"""Images for CLIP towers: open_clip's transform in two halves, with the same pixels in between and the same result.

Loader processes resize and crop; what travels is uint8, a quarter of the bytes. The device that encodes divides,
subtracts and divides again: single operations in float32, so the bits are those of the whole transform anywhere.
"""

# Shapes: B images of H x W pixels, C = 3 colours.

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor


class ImageInput:
    """From an image to what a tower of `size` (height, width) takes.

    `preprocess`: what differs from open_clip's default transform (mean, std, ...). `transform` is open_clip's own.
    """

    def __init__(self, size: tuple[int, int], preprocess: Mapping[str, Any] | None, device: str):
        import torch
        from open_clip.transform import (MaybeConvertMode, MaybeToTensor, PreprocessCfg, image_transform_v2,
                                         merge_preprocess_dict)
        from torchvision.transforms import Compose, Normalize

        sized = {**(preprocess or {}), "size": size}
        self.size, self.device = size, device
        self.transform = image_transform_v2(PreprocessCfg(**merge_preprocess_dict({}, sized)), is_train=False)
        *cuts, to_tensor, normalise = self.transform.transforms
        assert isinstance(cuts[-1], MaybeConvertMode) and isinstance(to_tensor, MaybeToTensor)
        assert isinstance(normalise, Normalize)
        self._cut = Compose(cuts)
        # tensors on the device: a plain number to divide by becomes a product with its reciprocal on CUDA
        self._white, self._mean_C11, self._std_C11 = (
            torch.as_tensor(numbers, dtype=torch.float32).reshape(-1, 1, 1).to(device)
            for numbers in (255.0, normalise.mean, normalise.std))

    def cut(self, image: Image) -> np.ndarray:
        """Resized and cropped: uint8 [H, W, C]."""
        import numpy as np

        return np.array(self._cut(image))

    def normalised(self, pixels_BHWC: Tensor) -> Tensor:
        """float32 [B, C, H, W] on the device, of uint8 in main memory."""
        import torch

        if torch.device(self.device).type == "cuda":
            pixels_BHWC = pixels_BHWC.pin_memory()
        on_device = pixels_BHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        pixels_BCHW = on_device.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels_BCHW.div_(self._white).sub_(self._mean_C11).div_(self._std_C11)
