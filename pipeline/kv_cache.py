"""What a model that writes has seen: keys and values, so that a new token costs one token.

Shapes: B rows, T new tokens, S tokens that there is room for, L layers, G key/value heads, D head
size, N tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        shape = (config.n_layer, 2, n_rows, config.n_kv_head, 0, config.head_size)
        self._hold(like.new_zeros(shape))  # of every layer keys, then values

    def _hold(self, store: Tensor) -> None:
        self.store, size = store, store.shape[-1]
        self.layers = [(layer.view(-1, size), *layer) for layer in store]  # views made once

    @property
    def is_empty(self) -> bool:
        """Whether nothing was seen yet."""
        return self.store.shape[4] == 0

    def begin(self, texts: Sequence[Tensor | None]) -> None:
        """Takes over what was seen of some rows' beginnings: (L, 2, G, N, D) each, or none."""
        longest = max((kv.shape[3] for kv in texts if kv is not None), default=0)
        self._hold(F.pad(self.store, (0, 0, 0, longest + -longest % CACHE_GROWTH)))
        for row, kv in enumerate(texts):
            if kv is not None:
                self.store[:, :, row, :, : kv.shape[3]] = kv

    def text(self, row: int, n_tokens: int) -> Tensor:
        """What was seen of a row's first tokens: a view (L, 2, G, N, D)."""
        return self.store[:, :, row, :, :n_tokens]

    def seek(self, positions: Tensor) -> Tensor:
        """Goes to positions (B, T); what may be seen from there, (B, 1, T, S) bool."""
        missing = int(positions.max()) + 1 - self.store.shape[4]
        if missing > 0:
            growth = (0, 0, 0, missing + -missing % CACHE_GROWTH)
            self._hold(F.pad(self.store, growth))
        n_rows, n_heads, n_places = self.store.shape[2:5]
        seen = torch.arange(n_places, device=positions.device) <= positions[:, None, :, None]
        starts = torch.arange(0, 2 * n_rows * n_heads * n_places, n_places, device=seen.device)
        starts = starts.view(2, n_rows, n_heads).transpose(0, 1).flatten(1)  # (B, 2 G)
        self.places = starts[:, :, None] + positions[:, None]  # (B, 2 G, T), of a layer's 2 B G S
        return seen

    def update(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Writes heads of keys, then values, where `seek` went; what is there so far of both.

        Args:
            layer: index of the block.
            kv: (B, 2 G, T, D).

        Returns:
            Keys and values, (B, G, S, D) each.
        """
        flat, keys, values = self.layers[layer]  # (2 B G S, D), then twice (B, G, S, D)
        flat[self.places] = kv.to(flat.dtype)
        return keys, values

    def keep(self, rows: Tensor, n_tokens: int | None = None) -> None:
        """Drops or repeats rows, for finished sequences and for beams.

        Args:
            rows: (B',) int64 indices.
            n_tokens: what the longest of them needs; room for more is given up. None keeps it.
        """
        room = None if n_tokens is None else n_tokens + -n_tokens % CACHE_GROWTH
        self._hold(self.store[:, :, :, :, :room].index_select(2, rows))

    def append(self, other: KVCache) -> None:
        """Adds the rows of another cache below these."""
        stores = self.store, other.store
        room = max(store.shape[4] for store in stores)
        padded = [F.pad(store, (0, 0, 0, room - store.shape[4])) for store in stores]
        self._hold(torch.cat(padded, dim=2))
