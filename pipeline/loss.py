"""The next-token loss: the only place that shifts labels.

Shapes: B rows, T tokens, C n_embd, V vocabulary, N supervised positions.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from pipeline.layers.cross_entropy import cross_entropy

IGNORE = -100

CrossEntropies = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropies(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies (N,), float32 nats, of targets (N,) by hidden states (N, C), head (V, C)."""
    return cross_entropy(F.linear(hidden, head), targets)


def next_token_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, each: CrossEntropies = cross_entropies
) -> tuple[Tensor, int]:
    """Sum of next-token cross-entropies over supervised positions, in nats, and how many there are.

    Position t is scored against labels[:, t + 1]; callers never shift, and divide by the count of
    the whole optimizer step, over all micro-batches and ranks. Logits exist at supervised positions
    only.

    Args:
        hidden: (B, T, C) final hidden states, any float dtype; reduced in float32.
        head: (V, C) output embedding.
        labels: (B, T) int64; -100 carries no loss.
        each: `cross_entropies`, or the same compiled.

    Returns:
        Scalar float32 sum (0 where nothing is supervised), and the number of supervised positions.
    """
    losses = next_token_losses(hidden, head, labels, each)
    return losses.sum(), len(losses)


def next_token_losses(
    hidden: Tensor, head: Tensor, labels: Tensor, each: CrossEntropies = cross_entropies
) -> Tensor:
    """`next_token_loss` before the sum: (N,) float32 nats of supervised positions, row by row."""
    targets = labels[:, 1:]
    supervised = targets != IGNORE  # (B, T-1)
    return each(hidden[:, :-1][supervised], head, targets[supervised])


def count_supervised(labels: Tensor) -> int:
    """Number of positions of labels (B, T) that carry a next-token loss."""
    return int((labels[:, 1:] != IGNORE).sum())
