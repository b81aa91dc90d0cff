"""What training needs in memory, foreseen by counting."""

from torch import nn

from pipeline.gpt import GPT
from pipeline.training.flops import lowest_trained_block
from pipeline.training.sharding import local

GIB = 2**30
_OPTIMIZER_BYTES = 12  # a trained parameter: its gradient and AdamW's two moments, in float32
_VECTORS = 16  # of n_embd that a block keeps for the backward pass, for every token


def estimate_gib(model: nn.Module, gpt: GPT, max_tokens: int, *, half: bool) -> float:
    """What training adds to the weights in memory: gradients, optimizer, one micro-batch.

    Coarse, by counting; `check` measures it. A micro-batch has `max_tokens` at most, all of them
    supervised, computed in two bytes a number (`half`) or four.
    """
    n_trained = sum(local(p).numel() for p in model.parameters() if p.requires_grad)
    config, size = gpt.config, 2 if half else 4
    n_blocks = len(gpt.blocks) - lowest_trained_block(gpt)  # frozen ones below keep nothing
    block = (_VECTORS * config.n_embd + 3 * config.mlp_hidden) * size
    kept = n_blocks * block
    if gpt.gradient_checkpointing:  # what goes into each, and one of them at a time
        kept = min(kept, n_blocks * config.n_embd * size + block)
    n_logits = gpt.head.out_features if hasattr(gpt, "head") else 0  # not of a classifier
    logits = n_logits * (size + 8)  # and in float32, and their gradient
    return (n_trained * _OPTIMIZER_BYTES + max_tokens * (kept + logits)) / GIB
