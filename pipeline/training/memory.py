"""The memory that training needs, estimated by counting."""

from torch import nn

from pipeline.gpt import GPT
from pipeline.training.flops import lowest_trained_block
from pipeline.training.sharding import local

GIB = 2**30
_OPTIMIZER_BYTES = 12  # per trained parameter: gradient and AdamW's two moments, float32
_VECTORS = 16  # of n_embd numbers that a block keeps for backward, per token


def estimate_gib(model: nn.Module, gpt: GPT, max_tokens: int, *, half: bool) -> float:
    """Memory that a training step adds to the weights, in GiB: gradients, optimizer, micro-batch.

    A coarse count; `check` measures it. A micro-batch has at most `max_tokens` tokens, all of them
    supervised, computed in two bytes per number (`half`) or four.
    """
    n_trained = sum(local(p).numel() for p in model.parameters() if p.requires_grad)
    config, size = gpt.config, 2 if half else 4
    n_blocks = len(gpt.blocks) - lowest_trained_block(gpt)  # frozen ones below keep nothing
    block = (_VECTORS * config.n_embd + 3 * config.mlp_hidden) * size
    kept = n_blocks * block
    if gpt.gradient_checkpointing:  # the inputs of all, and all of one at a time
        kept = min(kept, n_blocks * config.n_embd * size + block)
    n_logits = gpt.head.out_features if hasattr(gpt, "head") else 0  # a classifier has none
    on_cpu = next(gpt.parameters()).device.type == "cpu"
    logits = n_logits * (2 * size if on_cpu else size + 8)  # the gradient; elsewhere a float32 copy
    return (n_trained * _OPTIMIZER_BYTES + max_tokens * (kept + logits)) / GIB
