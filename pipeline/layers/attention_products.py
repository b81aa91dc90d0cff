"""Attention as two batched products, where those are faster than the fused kernel.

Shapes: B rows, T tokens, S keys, C width, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.gpt import GPTConfig

MAX_NEW_TOKENS = 5  # per row, in a decoding step


def additive_mask(x: Tensor, mask: Tensor | None, config: GPTConfig) -> Tensor | None:
    """The mask to add to attention scores, where two products are faster than the fused kernel.

    On a CPU the backward pass of fused bf16 attention takes 3 to 5 times as long as theirs, and so
    does its forward pass for one new token per row (on a GPU, a little longer). Tokens guessed
    after that one go through the same products, so that they are rounded as they would be alone.

    Args:
        x: (B, T, C) input of the first block.
        mask: (B, 1, T, S) what may be attended to in a cache; None for causal attention.
        config: configuration of the model.

    Returns:
        0 or -inf, broadcast to (B G, H/G T, S); None where the fused kernel is to be used.
    """
    if not config.causal:
        return None
    per_group = config.n_head // config.n_kv_head
    if mask is not None and x.shape[1] <= MAX_NEW_TOKENS:
        seen = mask[:, 0].repeat_interleave(config.n_kv_head, dim=0)  # (B G, T, S)
        additive = x.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        return additive if x.shape[1] == 1 else additive.repeat(1, per_group, 1)
    is_trained = mask is None and torch.is_grad_enabled()
    if x.device.type == "cpu" and is_trained and product_dtype(x) == torch.bfloat16:
        future = x.new_full((x.shape[1], x.shape[1]), -torch.inf, dtype=torch.bfloat16).triu_(1)
        return future.repeat(per_group, 1)  # (H/G T, T)
    return None


def attention_products(q: Tensor, k: Tensor, v: Tensor, additive: Tensor, dropout: float) -> Tensor:
    """Attention as two batched products: q (B, H, T, D), k and v (B, G, S, D) -> as q.

    `additive` comes from `additive_mask`. The rows of a group's H / G query heads are stacked, so
    that keys and values are not repeated.
    """
    n_rows, n_head, n_tokens, size = q.shape
    per_group = n_head // k.shape[1]
    queries = (q * size**-0.5).reshape(-1, per_group * n_tokens, size)  # (B G, H/G T, D)
    keys, values = k.flatten(0, 1), v.flatten(0, 1)  # (B G, S, D)
    scores = torch.bmm(queries, keys.transpose(1, 2)).add_(additive)  # (B G, H/G T, S)
    weights = scores.softmax(dim=-1)
    weights = F.dropout(weights, dropout) if dropout else weights  # a call costs 8 us
    return torch.bmm(weights, values).view(n_rows, n_head, n_tokens, size)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of x are computed in, autocast included."""
    is_autocast = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if is_autocast else x.dtype
