"""The gated activation of SwiGLU (Shazeer 2020), which keeps less for its backward pass.

Autograd keeps `silu(gate)` beside `gate` and `up`: a third of what an MLP with a frozen base keeps.
Here it is computed again, one pass over memory; the same bits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, of the shape of both."""
    if torch.compiler.is_compiling():  # which decides itself what it keeps
        return F.silu(gate) * up
    activated: Tensor = _SwiGLU.apply(gate, up)
    return activated


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = grad * up, F.silu(gate).mul_(grad)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up
