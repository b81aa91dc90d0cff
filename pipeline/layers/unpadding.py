"""Rows without their padding: only attention has to know which token is where.

Shapes: B rows, T tokens, N tokens kept of all B T, C width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLE, ROW_MULTIPLE = 32, 8  # that N, and T, are rounded up to


class Unpadding:
    """Rows without their padding, and with the beginning that all of them share only once.

    In a causal model shared tokens have the same states in every row, so all but attention works on
    N tokens instead of B T. An instruction's preamble is a third of it. N is rounded up, so that a
    run has few shapes: oneDNN generates code for each, and keeps it.

    Args:
        input_ids: (B, T).
        mask: (B, T) bool, true where a token is real.
        shares_beginning: whether a beginning that all rows share has the same states in all.
    """

    def __init__(self, input_ids: Tensor, mask: Tensor, *, shares_beginning: bool) -> None:
        shared = (mask & (input_ids == input_ids[:1])).all(0).cumprod(0).bool()  # (T,)
        shared &= shares_beginning
        is_first = torch.arange(len(mask), device=mask.device)[:, None] == 0  # (B, 1)
        kept = mask & (is_first | ~shared)
        places = kept.flatten().cumsum(0).sub(1).clamp_(min=0).view_as(mask)  # among the kept
        indices = kept.flatten().nonzero().squeeze(1)
        filler = indices.new_zeros(-len(indices) % MULTIPLE)  # computed, never read
        self.shape, self.kept = mask.shape, torch.cat((indices, filler))  # (N,)
        self.sources = torch.where(shared, places[:1], places).flatten()  # (B T,)

    def drop(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        return x.flatten(0, 1).index_select(0, self.kept)[None]

    def drop_rotation(self, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines that broadcast to (B, T, H, D) -> (1, N, 1, D) each; None for None."""
        if rotation is None:
            return None
        cos, sin = (self.drop(table.expand(*self.shape, -1, -1)) for table in rotation)
        return cos, sin

    def restore(self, x: Tensor) -> Tensor:
        """(1, N, ...) -> (B, T, ...); a pad gets the state of a real token."""
        return x.squeeze(0).index_select(0, self.sources).unflatten(0, self.shape)


def widened(x: Tensor, limit: int) -> Tensor:
    """(B, T) with zeros to the right, up to one of few widths, for the same reason."""
    n_tokens = x.shape[1]
    return F.pad(x, (0, min(n_tokens + -n_tokens % ROW_MULTIPLE, limit) - n_tokens))
