"""The arithmetic of an encoder: fp32 exactly, or bf16 and fp16 by autocast over fp32 weights.

Autocast is how these models were trained and how UniIR evaluates. The trade: weights stay fp32 in memory, so that
norms and sums lose no digits; a model of billions of parameters is better held in `weights_dtype`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pipeline.support.errors import UserError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "bf16", "fp16")


def check_precision(precision: str) -> None:
    """UserError unless it is one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise UserError(f"precision '{precision}' is not known", None, f"one of: {', '.join(PRECISIONS)}")


def arithmetic(device: str, precision: str) -> AbstractContextManager[Any]:
    """What the model runs under: autocast, or (fp32) no TF32."""
    import torch

    kind = torch.device(device).type
    if precision != "fp32":
        return torch.autocast(kind, dtype=weights_dtype(precision))
    if kind == "cuda":  # cuDNN would run the patch convolution in TF32, three digits short of fp32
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return nullcontext()


def weights_dtype(precision: str) -> torch.dtype:
    """The torch type of that name."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
