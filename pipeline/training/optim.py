"""Optimizers and schedules: which parameters decay, which go to Muon, how the rate moves."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from pipeline.gpt import Attention
from pipeline.training.muon import Muon

MUON_STEPS = 4  # of Newton-Schulz; a fifth costs 6 % of a small model's step and gains nothing
OptimizerName = Literal["adamw", "muon"]


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated.

    Args:
        name: adamw for everything, or muon for the blocks' matrices and adamw for the rest.
        lr: peak learning rate.
        final_lr_fraction: fraction of lr that is left at the end of the cosine decay.
        warmup_steps: optimizer steps of linear warm-up.
        weight_decay: weight decay of matrices and embeddings; biases and norms have none.
        betas: AdamW's decay rates for the averages of gradients and of their squares.
        max_grad_norm: gradients with a larger Euclidean norm are scaled down to this one.
    """

    name: OptimizerName
    lr: float
    final_lr_fraction: float
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float]
    max_grad_norm: float

    def __post_init__(self) -> None:
        for key, ok, wanted in (
            ("name", self.name in get_args(OptimizerName), "adamw or muon"),
            ("lr", self.lr > 0, "a positive number"),
            ("final_lr_fraction", 0 <= self.final_lr_fraction <= 1, "a fraction in [0, 1]"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            ("max_grad_norm", self.max_grad_norm > 0, "a positive number"),
        ):
            if not ok:
                raise ValueError(f"model.optimizer.{key} is {getattr(self, key)}; give {wanted}.")


def check_warmup(warmup_steps: int, total_steps: int) -> None:
    """ValueError if the warm-up takes the whole run or more."""
    if 0 <= total_steps <= warmup_steps:
        raise ValueError(
            f"model.optimizer.warmup_steps is {warmup_steps} but the run has only {total_steps} "
            "steps (trainer.max_steps, trainer.max_epochs); lower it or train longer."
        )


def learning_rate_factor(step: int, *, warmup_steps: int, total_steps: int, final: float) -> float:
    """Factor of the peak learning rate: linear warm-up, then a cosine down to `final`.

    `step` is the number of optimizer steps so far; the first already has a rate above 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(
    module: nn.Module, config: OptimizerConfig, *, is_scaled: bool = False
) -> torch.optim.Optimizer:
    """AdamW for all that is trainable, or Muon for the blocks' matrices and AdamW for the rest.

    With scaled gradients, as in 16-mixed, AdamW is not fused: fused AdamW unscales gradients
    itself, after they were clipped.

    Raises:
        ValueError: nothing is trainable, or nothing that Muon can take.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("nothing is trainable; check model.trainable and model.lora.")
    if config.name == "adamw":
        return _adamw(list(trainable.values()), config, is_fused=not is_scaled)
    matrices = {n: p for n, p in trainable.items() if p.dim() == 2 and "blocks." in n}
    if not matrices:
        raise ValueError(
            "model.optimizer.name is muon, but no matrix of a block is trainable; use adamw."
        )
    muon = Muon(
        _by_head(module, matrices),
        lr=config.lr,
        weight_decay=config.weight_decay,
        ns_steps=MUON_STEPS,
    )
    rest = [p for name, p in trainable.items() if name not in matrices]
    return Chained([_adamw(rest, config, is_fused=not is_scaled), muon]) if rest else muon


def _by_head(module: nn.Module, matrices: dict[str, nn.Parameter]) -> list[dict]:
    """Muon's parameter groups: queries and keys, to be treated head by head, and others."""
    sizes = {
        layer.weight: attention.config.head_size
        for attention in module.modules()
        if isinstance(attention, Attention)
        for layer in (attention.q, attention.k)
    }
    groups: dict[int | None, list[nn.Parameter]] = {}
    for matrix in matrices.values():
        groups.setdefault(sizes.get(matrix), []).append(matrix)
    return [{"params": group, "head_size": size} for size, group in groups.items()]


def _adamw(
    parameters: list[nn.Parameter], config: OptimizerConfig, *, is_fused: bool
) -> torch.optim.Optimizer:
    decayed = [p for p in parameters if p.dim() >= 2]
    others = [p for p in parameters if p.dim() < 2]
    decays = ((decayed, config.weight_decay), (others, 0.0))
    groups = [{"params": group, "weight_decay": decay} for group, decay in decays if group]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=is_fused)


class Chained(torch.optim.Optimizer):
    """Several optimizers that step as one, which Lightning counts as one step."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self.defaults: dict = {}

    @property
    def param_groups(self) -> list[dict]:  # type: ignore[override]
        """All groups of all optimizers, not copies: a rate that is set here takes effect there."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict:  # type: ignore[override]
        """State of every parameter."""
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each optimizer, after the closure."""
        loss = closure() if closure is not None else None
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """State dicts, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores what `state_dict` returned."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
