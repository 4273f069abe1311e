"""Parts of a decoder layer that keep only what went in, and compute the rest again on the way back.

Autograd keeps the result of each step of a norm and of a gated MLP. The steps are cheap beside the matrix products, and what they keep
is most of what a training holds besides weights and moments. The trade-off: each is computed twice, and no second derivative is defined.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, which keeps the two alone; any shape, the same for both."""
    return _Gated.apply(gate, up)  # type: ignore[return-value]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm, weight · x / √(mean x² + ε), over the last dimension, x [..., D], weight [D]; keeps x and the roots (1910.07467)."""
    return _RmsNorm.apply(x, weight, epsilon)  # type: ignore[return-value]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        root = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, root)
        return (x * root).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, root = ctx.saved_tensors
        normed = x * root
        product = gradient * normed
        of_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        share = (product @ weight).unsqueeze_(-1).div_(-x.shape[-1])  # of each vector's gradient along itself
        return torch.addcmul(gradient * weight, normed, share).mul_(root), of_weight, None
