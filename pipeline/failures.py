"""Errors of libraries that have a remedy: said in one line; and what training needs in memory."""

from __future__ import annotations

import re

import torch
from torch import nn

from pipeline.gpt import GPTConfig
from pipeline.sharding import local

GIB = 2**30
_OPTIMIZER_BYTES = 12  # a trained parameter: its gradient and AdamW's two moments, in float32
_VECTORS = 16  # of n_embd that a block keeps for the backward pass, for every token
_WORKER = re.compile(r"DataLoader worker .*(exited unexpectedly|is killed by signal)")


def explain(
    error: BaseException, *, max_tokens: int, needed_gib: float, free_gib: float
) -> str | None:
    """What happened and what to do, for known errors of libraries; None for any other.

    Args:
        error: the error that was raised.
        max_tokens: the limit of a micro-batch.
        needed_gib: see `estimate_gib`.
        free_gib: at the time.
    """
    if is_out_of_memory(error):
        return (
            f"out of memory ({_first_line(error)}). Training needs about {needed_gib:.1f} GiB, "
            f"{free_gib:.1f} GiB are free: lower data.max_tokens (it is {max_tokens}, and "
            "changes no result), set model.gradient_checkpointing, train adapters (model.lora), or "
            "take a smaller model."
        )
    if _WORKER.search(str(error)):
        return (
            f"a data worker was killed ({_first_line(error)}), often for too little memory: lower "
            "data.num_workers; the same command goes on from the last checkpoint."
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused; on a CPU, torch has no class of its own for it."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "DefaultCPUAllocator" in str(error)


def estimate_gib(model: nn.Module, config: GPTConfig, max_tokens: int, *, half: bool) -> float:
    """What a training step keeps in memory: weights, gradients, optimizer, one micro-batch.

    Coarse, by counting; `check` measures it.

    Args:
        model: with the gradients that it needs.
        config: configuration of its transformer.
        max_tokens: the limit of a micro-batch.
        half: whether it computes in two bytes a number.
    """
    parameters = [local(p) for p in model.parameters()]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad) * _OPTIMIZER_BYTES
    size = 2 if half else 4
    kept = config.n_layer * (_VECTORS * config.n_embd + 3 * config.mlp_hidden) * size
    logits = (config.vocab_size or 0) * (size + 8)  # and in float32, and their gradient
    return (weights + trained + max_tokens * (kept + logits)) / GIB


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
