"""Which device to compute on: `auto` is the first CUDA device that this process may see, else the CPU."""

from __future__ import annotations

from pipeline.support.errors import UserError


def resolve_device(asked: str) -> str:
    """A device torch understands; UserError if it is not there."""
    import torch
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise UserError(f"'{asked}' is not a device", "device", "auto, cpu, cuda, cuda:1 ...") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no device '{asked}' here ({torch.cuda.device_count()} CUDA devices)", "device",
                        "set embed.device=auto or retrieve.device=auto")
    return asked
