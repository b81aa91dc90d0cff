"""Muon with matrices of a shape batched on a GPU, and in float32 on CPUs without bf16 products.

torch 2.13 orthogonalises in bf16 whatever the hardware; on a CPU without bf16 products that made a
step of a small model ten times slower. And it takes matrices one by one, some thirty operations
each; on a GPU that took longer than the step's forward and backward pass. tests/test_optim.py shows
that they agree.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.hardware import multiplies_bf16


class Muon(torch.optim.Muon):
    """Momentum, orthogonalised by a Newton-Schulz iteration (Jordan et al. 2024).

    On a GPU all matrices of a shape at a time, in bf16 where it multiplies that; on a CPU one by
    one, in float32. The update is scaled to AdamW's usual size, as
    `adjust_lr_fn="match_rms_adamw"` does.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step over all matrices that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for alike in _alike(p for p in group["params"] if p.grad is not None):
                self._update(alike, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        states = [self.state[p] for p in parameters]
        for state, gradient in zip(states, gradients, strict=True):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
        momenta = [state["momentum_buffer"] for state in states]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov
        directions = orthogonalize_all(updates, group["ns_coefficients"], group["ns_steps"])
        scale = 0.2 * math.sqrt(max(parameters[0].shape)) * group["lr"]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, directions, alpha=-scale)


def _alike(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Matrices of one shape on a GPU, whole ones; others alone."""
    groups: dict[object, list[Tensor]] = defaultdict(list)
    for i, p in enumerate(parameters):
        is_whole = type(p) is nn.Parameter  # not a share of FSDP2's
        groups[p.shape if p.is_cuda and is_whole else i].append(p)
    return list(groups.values())


def orthogonalize_all(
    matrices: Sequence[Tensor], coefficients: tuple[float, float, float], n_steps: int
) -> list[Tensor]:
    """`orthogonalize` of matrices of one shape, in bf16 where they are on a GPU that has it."""
    single = partial(orthogonalize, coefficients=coefficients, n_steps=n_steps)
    if len(matrices) == 1 and not matrices[0].is_cuda:
        return [single(matrices[0])]
    stacked = torch.stack(list(matrices))
    in_bf16 = stacked.is_cuda and multiplies_bf16(stacked.device)
    every = torch.vmap(single)(stacked.bfloat16() if in_bf16 else stacked)
    return list(every.to(stacked.dtype).unbind())


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], n_steps: int) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values end between 0.7 and 1.2.

    Args:
        matrix: (M, N).
        coefficients: a, b, c of the quintic x -> a x + b x^3 + c x^5, applied to singular values.
        n_steps: how often.
    """
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)  # largest singular value at most 1
    if x.shape[1] >= 2 * x.shape[0] and x.dtype != torch.bfloat16:
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
