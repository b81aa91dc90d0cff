"""Floating-point operations of training a transformer, counted."""

from torch import nn

from pipeline.gpt import GPT


def flops_per_token(model: GPT, n_context: int) -> int:
    """FLOPs to train on a token, in rows of `n_context` of them, as torch counts unfused products.

    Two per weight of every linear layer, and attention's own, of which the causal half is counted
    (n_context / 2 keys per token on average). The backward pass costs as much as the forward pass
    for gradients of inputs, down to the lowest trained block, and as much again for those of
    trained weights; recomputation is not counted.
    """
    linear, trained = _linear_weights(model), _linear_weights(model, trained_only=True)
    keys = n_context / 2 if model.config.causal else n_context
    config = model.config
    attention = 2 * config.n_head * config.head_size * keys  # per block
    forward = linear + attention * len(model.blocks)
    lowest = lowest_trained_block(model)
    passed = linear - sum(map(_linear_weights, model.blocks[:lowest]))
    attention *= len(model.blocks) - lowest
    return int(2 * (forward + passed + trained + 2 * attention))


def lowest_trained_block(model: GPT) -> int:
    """Index of the lowest block that gradients reach; the number of blocks if they reach none."""
    embeddings = [p for name, p in model.named_parameters() if "embedding" in name]
    parts = (embeddings, *(block.parameters() for block in model.blocks))
    learns = [any(p.requires_grad for p in part) for part in parts]
    return max([*learns, True].index(True) - 1, 0)


def _linear_weights(module: nn.Module, *, trained_only: bool = False) -> int:
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(w.numel() for w in weights if w.requires_grad or not trained_only)
