"""Log-probabilities of tokens, beside those of the likeliest ones at their positions.

Shapes: N positions, T tokens, C channels, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.gpt import GPT

PLACES_AT_A_TIME = 64  # their logits: 12 MB with a vocabulary of 50,000


class TokenLogprob(NamedTuple):
    """The model's log-probability of a token, in nats, before temperature, top-k and top-p."""

    token: int
    logprob: float | None  # None for a first token
    likeliest: list[tuple[int, float]]  # at its position, best first, as many as were asked for


def token_logprobs(logits: Tensor, tokens: Sequence[int], n_likeliest: int) -> list[TokenLogprob]:
    """Log-probabilities of tokens, each under its own row of logits (N, V)."""
    every = logits.log_softmax(dim=-1)
    own = every.gather(1, torch.tensor(tokens, device=every.device)[:, None])[:, 0]
    best = every.topk(min(n_likeliest, every.shape[1]))
    likeliest = (
        list(zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    return [TokenLogprob(*found) for found in zip(tokens, own.tolist(), likeliest, strict=True)]


def prompt_logprobs(
    model: GPT, hidden: Tensor, ids: Sequence[int], n_likeliest: int
) -> list[TokenLogprob]:
    """Log-probabilities of a prompt's tokens, from hidden states (T, C); the first has none."""
    found = [TokenLogprob(ids[0], None, [])]
    for start in range(0, len(ids) - 1, PLACES_AT_A_TIME):
        following = ids[start + 1 : start + 1 + PLACES_AT_A_TIME]
        logits = model.logits(hidden[start : start + len(following)])
        found += token_logprobs(logits, following, n_likeliest)
    return found
