"""Muon that orthogonalises matrices of equal shape, and the heads of a layer, together.

torch 2.13's takes matrices one by one, some thirty operations each, which on a GPU took longer than
the step's forward and backward pass; and it orthogonalises in bf16 on any hardware, which on a CPU
without bf16 products made a step of a small model ten times slower. tests/test_optim.py shows that
both agree.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pipeline.hardware import multiplies_bf16
from pipeline.training.sharding import share, whole


class Muon(torch.optim.Muon):
    """Momentum, orthogonalised by a Newton-Schulz iteration (Jordan et al. 2024).

    In bf16 where the hardware multiplies it; on a GPU, all matrices of one shape at a time. If a
    parameter group has a `head_size`, every `head_size` rows are a matrix of their own, as heads
    are in attention scores. The update is scaled to AdamW's usual size, so that both share one
    learning rate (Liu et al. 2025): torch's `adjust_lr_fn="match_rms_adamw"`.
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
        stacked = torch.stack([whole(update) for update in updates])  # (B, M, N)
        n_rows = group.get("head_size") or stacked.shape[1]
        matrices = stacked.view(-1, n_rows, stacked.shape[2])  # (B heads, D, N), or (B, M, N)
        in_bf16 = multiplies_bf16(matrices.device)
        orthogonal = orthogonalize(
            matrices.bfloat16() if in_bf16 else matrices,
            group["ns_coefficients"],
            group["ns_steps"],
        )
        directions = orthogonal.to(stacked.dtype).reshape(stacked.shape).unbind()
        scale = 0.2 * math.sqrt(max(matrices.shape[1:])) * group["lr"]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        shares = [share(d, p) for d, p in zip(directions, parameters, strict=True)]
        torch._foreach_add_(parameters, shares, alpha=-scale)


def _alike(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Groups matrices by shape if they are on a GPU and not sharded; others stay alone."""
    groups: dict[object, list[Tensor]] = defaultdict(list)
    for i, p in enumerate(parameters):
        is_whole = type(p) is nn.Parameter  # FSDP2's shards are gathered one at a time
        groups[p.shape if p.is_cuda and is_whole else i].append(p)
    return list(groups.values())


def orthogonalize(
    matrices: Tensor, coefficients: tuple[float, float, float], n_steps: int
) -> Tensor:
    """The nearest semi-orthogonal matrices (B, M, N), roughly: singular values of 0.7 to 1.2.

    The quintic x -> a x + b x^3 + c x^5 (`coefficients`) is applied to them `n_steps` times.
    """
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # largest singular value at most 1
    if x.shape[2] >= 2 * x.shape[1] and x.dtype != torch.bfloat16:
        x = _factor(x @ x.mT, coefficients, n_steps) @ x
    else:
        for _ in range(n_steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _factor(gram: Tensor, coefficients: tuple[float, float, float], n_steps: int) -> Tensor:
    """The factor that all steps together multiply matrices by, from their Gram matrices (B, M, M).

    A step multiplies by a polynomial p of the Gram matrix, which then becomes p gram p: these are
    small where a matrix is wide, 1.8 times as fast for (384, 1536).
    """
    a, b, c = coefficients

    def polynomial(gram: Tensor) -> Tensor:
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        return p

    factor = p = polynomial(gram)
    for _ in range(n_steps - 1):
        gram = p @ gram @ p
        p = polynomial(gram)
        factor = p @ factor
    return factor
