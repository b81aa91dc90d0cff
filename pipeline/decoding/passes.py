"""Forward passes of decoding: prefill of what is new in prompts, then steps of one token or few.

Shapes: B rows, T tokens, C width, V vocabulary; L, G, N and D as in `kv_cache.py`.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.decoding.kv_cache import KVCache
from pipeline.decoding.packed import PackedLinear
from pipeline.decoding.step_graph import StepGraph
from pipeline.gpt import GPT


def check_prompt(n_tokens: int, block_size: int) -> None:
    """ValueError for a prompt that leaves no room for an answer."""
    if n_tokens == 0:
        raise ValueError("prompt is empty; give at least one character.")
    if n_tokens >= block_size:
        raise ValueError(
            f"prompt has {n_tokens} tokens but model.gpt.block_size is {block_size}, "
            "the context that it must leave room in; shorten it."
        )


def check_finite(logits: Tensor) -> None:
    """ValueError for logits that are not finite, from which no token can be chosen."""
    if not logits.isfinite().all():
        raise ValueError(
            "the model's answer is not made of numbers: some of its weights are not, or are too "
            "large for this precision; take other weights."
        )


class Prefilled(NamedTuple):
    """The result of a prefill."""

    cache: KVCache  # with room for answers
    logits: Tensor  # (B, V) after each prompt
    hidden: Tensor  # (B, T, C) of the tokens that were not known, without meaning at pads


def prefill(
    model: GPT, prompts: Sequence[Sequence[int]], known: Sequence[Tensor | None] = ()
) -> Prefilled:
    """Runs prompts through the model.

    Args:
        model: put into eval mode.
        prompts: token ids, one list per row, of any lengths.
        known: for each, keys and values (L, 2, G, N, D) of the first N tokens, not of all, or None.

    Raises:
        ValueError: for a prompt that is empty or fills the context, and for damaged weights.
    """
    model.eval()
    for prompt in prompts:
        check_prompt(len(prompt), model.config.block_size)
    weight = model.token_embedding.weight
    cache = KVCache(model.config, len(prompts), like=weight)
    starts = [0 if kv is None else kv.shape[3] for kv in known] or [0] * len(prompts)
    if any(starts):
        cache.begin(known)
    new = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
    longest = max(map(len, new))
    padded = [[*ids, *[0] * (longest - len(ids))] for ids in new]
    input_ids = torch.tensor(padded, device=weight.device)  # (B, T), padded on the right
    start = torch.tensor(starts, device=weight.device)[:, None]
    end = torch.tensor(list(map(len, prompts)), device=weight.device)[:, None]
    positions = start + torch.arange(longest, device=weight.device)  # (B, T)
    is_real = positions < end
    # pads take the next token's position, as there may be none beyond it in the context
    positions = positions.minimum(end)
    cache.reserve(int(positions.max()) + 1)
    hidden = model(input_ids, is_real, positions=positions, cache=cache)
    last = is_real.sum(dim=1) - 1
    logits = model.logits(hidden[torch.arange(len(last), device=last.device), last])
    check_finite(logits)
    return Prefilled(cache, logits, hidden)


def decode(
    model: GPT, tokens: Sequence[Sequence[int]], starts: Sequence[int], cache: KVCache
) -> Tensor:
    """Runs T more tokens of every row, from positions (B,) on; returns logits (B, T, V)."""
    cache.reserve(max(starts) + len(tokens[0]))
    step = partial(_step, model)
    if _is_captured(model, cache):
        graphs, n_tokens = cache.graphs, len(tokens[0])
        if n_tokens not in graphs:
            graphs[n_tokens] = StepGraph(step, cache, n_tokens)
        return graphs[n_tokens](tokens, starts)
    device = cache.store.device
    return step(torch.tensor(tokens, device=device), torch.tensor(starts, device=device), cache)


def _is_captured(model: GPT, cache: KVCache) -> bool:
    return cache.store.is_cuda and isinstance(model.head, PackedLinear)  # not trained any more


def _step(model: GPT, input_ids: Tensor, starts: Tensor, cache: KVCache) -> Tensor:
    positions = starts[:, None] + torch.arange(input_ids.shape[1], device=starts.device)  # (B, T)
    return model.logits(model(input_ids, positions=positions, cache=cache))
