"""PEFT's LoRA layer, computed in fewer and larger steps: the same numbers, up to rounding.

PEFT computes `W x + scale * B (A x)` operation by operation. On a CPU the passes over wide tensors
that this takes, forward and backward, cost a third of a step of SmolLM2-135M; here the adapter's
product is accumulated into the layer's own result.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor

from pipeline.layers.attention_products import product_dtype


class FusedLinear(Linear):
    """A LoRA layer on a frozen base, without dropout on the adapter's input and without DoRA."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., I) -> (..., O)."""
        if self.merged or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        base = self.get_base_layer()
        return _Adapted.apply(
            x,
            base.weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            product_dtype(x),
        )


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., I)
        weight: Tensor,  # (O, I)
        bias: Tensor | None,  # (O,)
        a: Tensor,  # (R, I)
        b: Tensor,  # (O, R)
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (x.dtype, a.dtype, b.dtype)
        flat, w, a, b = (t.to(dtype) for t in (x.flatten(0, -2), weight, a, b))
        low = flat @ a.T  # (N, R)
        y = F.linear(flat, w, None if bias is None else bias.to(dtype)).addmm_(
            low, b.T, alpha=scale
        )
        ctx.save_for_backward(flat, low, w, a, b)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, w, a, b = ctx.saved_tensors
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        grad = grad.flatten(0, -2).to(flat.dtype)  # (N, O)
        grad_low = (grad @ b).mul_(ctx.scale)  # (N, R)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ w).addmm_(grad_low, a).view(ctx.shape).to(x_dtype)
        grad_a = (grad_low.T @ flat).to(a_dtype)
        grad_b = (grad.T @ low).to(b_dtype).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None, None
