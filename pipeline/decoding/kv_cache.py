"""The KV cache: keys and values of earlier tokens, so that a step computes new tokens alone.

Shapes: B rows, R places for rows, T new tokens, S tokens that there is room for, L layers, G
key/value heads, D head size, N tokens of a text.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.gpt import GPTConfig

CACHE_GROWTH = 64  # tokens


class KVCache:
    """Keys and values of the tokens seen so far; every row has a place of its own.

    It grows by CACHE_GROWTH tokens at a time and is read whole: products of slices would copy it.
    Rows join and leave in place; only the last row is ever moved, to fill a gap. Device and dtype
    are those of `like`. ValueError for a model that is not causal, whose keys and values change
    with every token.
    """

    def __init__(self, config: GPTConfig, n_rows: int, like: Tensor) -> None:
        if not config.causal:
            raise ValueError("model.gpt.causal is false; only a causal model can write text.")
        shape = (config.n_layer, 2, n_rows, config.n_kv_head, 0, config.head_size)
        self.is_empty = True
        self._hold(like.new_zeros(shape), n_rows)  # of every layer keys, then values

    def _hold(self, store: Tensor, n_rows: int) -> None:
        if store is not getattr(self, "store", None):
            self.graphs: dict[int, Any] = {}
        self.store, self.n_rows, size = store, n_rows, store.shape[-1]
        pairs = zip(store, store[:, :, :n_rows], strict=True)
        self.layers = [(layer.view(-1, size), *live) for layer, live in pairs]  # views made once

    @property
    def n_tokens(self) -> int:
        """Tokens that there is memory for, over all rows."""
        return self.store.shape[2] * self.store.shape[4]

    def begin(self, texts: Sequence[Tensor | None]) -> None:
        """Copies known keys and values of rows' beginnings, (L, 2, G, N, D) each, or None."""
        self.is_empty = False
        self._resize(self.n_rows, max(kv.shape[3] for kv in texts if kv is not None))
        for row, kv in enumerate(texts):
            if kv is not None:
                self.text(row, kv.shape[3]).copy_(kv)

    def text(self, row: int, n_tokens: int) -> Tensor:
        """Keys and values of a row's first tokens: a view (L, 2, G, N, D)."""
        return self.store[:, :, row, :, :n_tokens]

    def reserve(self, n_tokens: int) -> None:
        """Makes room for `n_tokens` tokens in every row."""
        if n_tokens > self.store.shape[4]:
            self._resize(self.n_rows, n_tokens)

    def seek(self, positions: Tensor) -> Tensor:
        """Selects positions (B, T) for `update`; returns the mask of what they see (B, 1, T, S)."""
        self.is_empty = False
        n_places, n_heads, n_tokens = self.store.shape[2:5]
        seen = torch.arange(n_tokens, device=positions.device) <= positions[:, None, :, None]
        starts = torch.arange(0, 2 * n_places * n_heads * n_tokens, n_tokens, device=seen.device)
        starts = starts.view(2, n_places, n_heads)[:, : self.n_rows].transpose(0, 1).flatten(1)
        self.places = starts[:, :, None] + positions[:, None]  # (B, 2 G, T), of a layer's 2 R G S
        return seen

    def update(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Writes heads of keys, then of values, (B, 2 G, T, D) at the positions of `seek`.

        Returns all keys and values, (B, G, S, D) each.
        """
        flat, keys, values = self.layers[layer]  # (2 R G S, D), then twice (B, G, S, D)
        flat[self.places] = kv.to(flat.dtype)
        return keys, values

    def whole(self) -> KVCache:
        """A cache on the same store that has a row in every place."""
        other = copy.copy(self)
        other.graphs = {}
        other._hold(self.store, self.store.shape[2])
        return other

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (B',) int64, some perhaps repeated, as beam search does."""
        self._hold(self.store.index_select(2, rows), len(rows))

    def drop(self, row: int) -> None:
        """Drops a row; the last one takes its place."""
        last = self.n_rows - 1
        if row != last:
            self.store[:, :, row] = self.store[:, :, last]
        self._hold(self.store, last)

    def fit(self, n_tokens: int) -> None:
        """Frees memory: of tokens beyond `n_tokens`, of rows once half of the places are empty."""
        n_places, _, room = self.store.shape[2:5]
        if _rounded(n_tokens) < room or 2 * self.n_rows <= n_places:
            self._resize(self.n_rows, n_tokens)

    def append(self, other: KVCache) -> None:
        """Adds the rows of another cache below these."""
        n_before, n_rows = self.n_rows, self.n_rows + other.n_rows
        places, room, seen = self.store.shape[2], self.store.shape[4], other.store.shape[4]
        if n_rows > places or seen > room:
            self._resize(n_rows, max(room, seen))
        new = self.store[:, :, n_before:n_rows]
        new[:, :, :, :, :seen] = other.store[:, :, : other.n_rows]
        new[:, :, :, :, seen:] = 0.0  # left by a dropped row
        self._hold(self.store, n_rows)

    def _resize(self, n_places: int, n_tokens: int) -> None:
        """Moves to a store of `n_places` rows and of `n_tokens` tokens, rounded up."""
        shape = list(self.store.shape)
        shape[2], shape[4] = n_places, _rounded(n_tokens)
        store, room = self.store.new_zeros(shape), min(shape[4], self.store.shape[4])
        store[:, :, : self.n_rows, :, :room] = self.store[:, :, : self.n_rows, :, :room]
        self._hold(store, self.n_rows)


def _rounded(n_tokens: int) -> int:
    return n_tokens + -n_tokens % CACHE_GROWTH
