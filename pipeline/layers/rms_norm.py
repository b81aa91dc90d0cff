"""RMSNorm (Zhang & Sennrich 2019) with a short backward pass for CPUs.

There autograd splits torch's own into some fifteen passes over memory, forward and backward, which
cost more than a small matrix product; a GPU has kernels for both.

Shapes: C width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, with a backward pass of its own when gradients flow through it on a CPU."""

    weight: nn.Parameter
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), of the same dtype, reduced in float32."""
        is_trained = x.requires_grad and torch.is_grad_enabled()
        if x.device.type != "cpu" or not is_trained or torch.compiler.is_compiling():
            return super().forward(x)
        normalised: Tensor = _Normalise.apply(x, self.weight, self.eps)
        return normalised


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()
        scale = (squares / x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        wide, grad = _wide(x), _wide(grad)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            normalised = (wide * scale).mul_(grad)
            grad_weight = normalised.flatten(0, -2).sum(0).to(weight.dtype)
        scaled = (grad * weight).mul_(scale)
        along = (scaled * wide).sum(-1, keepdim=True)  # not vecdot, which autocast would round
        along *= scale.square().div_(x.shape[-1])
        return scaled.addcmul_(wide, along, value=-1).to(x.dtype), grad_weight, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
