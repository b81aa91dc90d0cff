"""What a model that writes has seen: keys and values, so that a new token costs one token.

Shapes: B rows, T new tokens, S tokens that there is room for, G key/value heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.gpt import GPTConfig

CACHE_GROWTH = 64  # tokens


class KVCache:
    """Keys and values of the tokens seen so far; every row has a place of its own.

    It grows by CACHE_GROWTH tokens at a time and is read whole: products of slices would copy it.

    Args:
        config: configuration of a causal model.
        n_rows: B.
        like: a tensor of the device and dtype wanted.

    Raises:
        ValueError: where the model is not causal: what it has seen changes with every token.
    """

    def __init__(self, config: GPTConfig, n_rows: int, like: Tensor) -> None:
        if not config.causal:
            raise ValueError("model.gpt.causal is false; only a causal model can write text.")
        shape = (config.n_layer, n_rows, config.n_kv_head, 0, config.head_size)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def seek(self, positions: Tensor) -> Tensor:
        """Goes to positions (B, T); what may be seen from there, (B, 1, T, S) bool."""
        self.rows = torch.arange(len(positions), device=positions.device)[:, None]  # (B, 1)
        self.positions = positions
        missing = int(positions.max()) + 1 - self.keys.shape[3]
        if missing > 0:
            growth = (0, 0, 0, missing + -missing % CACHE_GROWTH)
            self.keys, self.values = F.pad(self.keys, growth), F.pad(self.values, growth)
        places = torch.arange(self.keys.shape[3], device=positions.device)
        return places <= positions[:, None, :, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, G, T, D) where `seek` went; all keys and values so far, (B, G, S, D)."""
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            new = new.transpose(1, 2).to(store.dtype)  # (B, T, G, D)
            store[self.rows, :, self.positions] = new
        return self.keys[layer], self.values[layer]

    def keep(self, rows: Tensor, n_tokens: int | None = None) -> None:
        """Drops or repeats rows, for finished sequences and for beams.

        Args:
            rows: (B',) int64 indices.
            n_tokens: what the longest of them needs; room for more is given up. None keeps it.
        """
        room = None if n_tokens is None else n_tokens + -n_tokens % CACHE_GROWTH
        self.keys = self.keys[:, rows, :, :room]
        self.values = self.values[:, rows, :, :room]

    def append(self, other: KVCache) -> None:
        """Adds the rows of another cache below these."""
        n_tokens = max(self.keys.shape[3], other.keys.shape[3])
        for cache in (self, other):
            growth = (0, 0, 0, n_tokens - cache.keys.shape[3])
            cache.keys, cache.values = F.pad(cache.keys, growth), F.pad(cache.values, growth)
        self.keys = torch.cat((self.keys, other.keys), dim=1)
        self.values = torch.cat((self.values, other.values), dim=1)
