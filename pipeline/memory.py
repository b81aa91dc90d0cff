"""What training needs in memory, foreseen by counting."""

from torch import nn

from pipeline.gpt import GPTConfig
from pipeline.sharding import local

GIB = 2**30
_OPTIMIZER_BYTES = 12  # a trained parameter: its gradient and AdamW's two moments, in float32
_VECTORS = 16  # of n_embd that a block keeps for the backward pass, for every token


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
