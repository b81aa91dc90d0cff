"""Cross-entropy that keeps logits in their own dtype, and no copies of all of them in float32.

Autograd holds three such copies at once, just when all else that is kept for the backward pass is
in memory. Here they are made for a few rows at a time, in as much time.

Shapes: N positions, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 2**20  # logits at a time; about what the caches of a CPU hold (benchmarks/NOTES.md)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies (N,), float32 nats, of targets (N,) by logits (N, V) of any float dtype."""
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return F.cross_entropy(logits.float(), targets, reduction="none")
    losses: Tensor = _CrossEntropy.apply(logits, targets)
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        chunks = _chunks(logits, targets)
        return torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in chunks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for x, y, g, out in _chunks(logits, targets, grad, grad_logits):
            p = x.softmax(-1, torch.float32)
            p[torch.arange(len(y)), y] -= 1
            torch.mul(p, g[:, None], out=out)
        return grad_logits, None


def _chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    n_rows = max(1, _CHUNK // logits.shape[1])
    return zip(*(tensor.split(n_rows) for tensor in (logits, *others)), strict=True)
