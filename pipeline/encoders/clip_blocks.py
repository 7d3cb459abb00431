"""The transformer of an open_clip tower, run for its vectors only: the same weights and sums, in less time.

Nine tenths of a tower are products with weights. On a CPU oneDNN makes them faster than torch.nn.functional.linear
does, and adds GELU or the residual in the same pass. Behind its attention the last block works only where the tower is
read, so the result is the same up to rounding.

The trade: half precision keeps one copy of the blocks' weights (autocast would make it at every call); fp32 none.
"""

# Shapes: B items, L positions, W width of the tower, H heads, V = W / H numbers of a head.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def fits(tower: Any) -> bool:
    """Whether `tower` is a transformer of open_clip's that is made of its plain blocks only."""
    from open_clip.transformer import Transformer

    return type(tower) is Transformer and all(map(_is_plain, tower.resblocks))


def _is_plain(block: Any) -> bool:
    from open_clip.transformer import ResidualAttentionBlock
    from torch import nn

    if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
        return False
    attention, steps = block.attn, dict(block.mlp.named_children())
    is_plain_attention = (type(attention) is nn.MultiheadAttention and attention.in_proj_weight is not None
                          and attention.in_proj_bias is not None and attention.bias_k is None
                          and not attention.add_zero_attn and (not attention.dropout or not attention.training))
    return is_plain_attention and list(steps) == ["c_fc", "gelu", "c_proj"] and all(
        isinstance(steps[name], nn.Linear) and steps[name].bias is not None for name in ("c_fc", "c_proj"))


class Blocks:
    """The blocks of a tower that `fits`, for use without gradients. Its weights may change between two calls.

    `half`: bfloat16 or float16 for products, under autocast; None: the type of the weights.
    """

    def __init__(self, tower: Any, half: torch.dtype | None):
        assert fits(tower), "such a tower runs as open_clip made it"
        self._blocks = [_Block(block, half) for block in tower.resblocks]

    def __call__(self, hidden_BLW: Tensor, attn_mask: Tensor | None = None, read_at_B: Tensor | None = None) -> Tensor:
        """States [B, L, W] behind the last block; with `read_at_B` those of one position of each item, [B, 1, W].

        attn_mask: what attention adds to its logits, [L, L] or [B * H, L, L], as open_clip's towers make it.
        """
        mask = attn_mask
        if mask is not None:  # as [1, 1, L, L] or [B, H, L, L]
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (len(hidden_BLW), -1))
        for block in self._blocks[:-1]:
            hidden_BLW = block(hidden_BLW, mask)
        return self._blocks[-1](hidden_BLW, mask, read_at_B)


class _Block:

    def __init__(self, block: Any, half: torch.dtype | None):
        self._block, self._heads = block, block.attn.num_heads
        self._inward, self._outward, self._wide, self._narrow = (
            _Linear(weight, bias, half) for weight, bias in (
                (block.attn.in_proj_weight, block.attn.in_proj_bias),
                *((layer.weight, layer.bias) for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj))))

    def __call__(self, hidden_BLW: Tensor, mask: Tensor | None, read_at_B: Tensor | None = None) -> Tensor:
        import torch

        queries, keys, values = self._parts(self._block.ln_1(hidden_BLW))
        seen_BHLV = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=None if mask is None else mask.to(queries.dtype))
        seen_BLW = seen_BHLV.transpose(1, 2).flatten(2)
        if read_at_B is not None:  # not before: of few queries, torch's sums depend on the number of threads
            rows_B = torch.arange(len(hidden_BLW), device=hidden_BLW.device)
            hidden_BLW, seen_BLW = (states[rows_B, read_at_B][:, None] for states in (hidden_BLW, seen_BLW))
        hidden_BLW = self._outward.added(seen_BLW, hidden_BLW, self._block.ls_1)
        return self._narrow.added(self._activated(self._block.ln_2(hidden_BLW)), hidden_BLW, self._block.ls_2)

    def _parts(self, normed_BLW: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values: each [B, H, L, V]."""
        numbers = normed_BLW.shape[-1] // self._heads
        parts = self._inward(normed_BLW).unflatten(-1, (-1, self._heads, numbers))
        return parts.permute(2, 0, 3, 1, 4).unbind()

    def _activated(self, normed_BLW: Tensor) -> Tensor:
        import torch
        from open_clip.transformer import QuickGELU

        activation = self._block.mlp.gelu
        if type(activation) is torch.nn.GELU and activation.approximate == "none":
            return self._wide(normed_BLW, has_gelu=True)
        wide = self._wide(normed_BLW)
        return wide.mul_(torch.mul(wide, 1.702).sigmoid_()) if type(activation) is QuickGELU else activation(wide)


class _Linear:
    """A product with weights: rows [..., in] to [..., out] in `half`, or in the type of the weights."""

    def __init__(self, weight: Tensor, bias: Tensor, half: torch.dtype | None):
        self._originals, self._half = (weight, bias), half
        self._kernel = fused_linear(weight.device.type, half or weight.dtype)
        self._copied_from: Any = None
        self._copies: tuple[Tensor, Tensor] | None = None

    def __call__(self, rows: Tensor, has_gelu: bool = False) -> Tensor:
        from torch.nn.functional import gelu, linear

        weight, bias = self._weights()
        rows = rows.to(weight.dtype)
        if self._kernel is None:
            return gelu(linear(rows, weight, bias)) if has_gelu else linear(rows, weight, bias)
        return self._kernel(rows, weight, bias, *(("gelu", [], "none") if has_gelu else ("none", [], "")))

    def added(self, rows: Tensor, residual: Tensor, scale: Any) -> Tensor:
        """`residual` + `scale` (a module) of the product."""
        from torch.nn import Identity

        weight, bias = self._weights()
        if self._kernel is None or type(scale) is not Identity or residual.dtype != weight.dtype:
            return residual + scale(self(rows))
        return self._kernel.binary(rows.to(weight.dtype), residual, weight, bias, "add")

    def _weights(self) -> tuple[Tensor, Tensor]:
        if self._half is None:
            return self._originals
        state = [(each.data_ptr(), each._version) for each in self._originals]  # training or loading changes it
        if self._copies is None or state != self._copied_from:
            weight, bias = (each.detach().to(self._half) for each in self._originals)
            self._copies, self._copied_from = (weight, bias), state
        return self._copies


def projected(rows_BW: Tensor, weights_WD: Tensor) -> Tensor:
    """rows @ weights, [B, D]: in float32 on a CPU by oneDNN, whose sums do not depend on the number of threads."""
    import torch

    kernel = fused_linear(rows_BW.device.type, rows_BW.dtype)
    if kernel is None or rows_BW.dtype != torch.float32 or torch.is_autocast_enabled(rows_BW.device.type):
        return rows_BW @ weights_WD
    return kernel(rows_BW, weights_WD.t(), None, "none", [], "")


def fused_linear(device: str, kind: torch.dtype) -> Any:
    """oneDNN's product with weights of that type, followed by what can be fused into it; None where it cannot be used.

    Inductor's own operator: a release of torch may do without it.
    """
    import torch

    kernels, can_run = torch.ops.mkldnn, torch.backends.mkldnn.is_available()
    if device != "cpu" or not can_run or not hasattr(kernels, "_linear_pointwise"):
        return None
    is_supported = kind == torch.float32 or (kind == torch.bfloat16 and kernels._is_mkldnn_bf16_supported())
    return kernels._linear_pointwise if is_supported else None
