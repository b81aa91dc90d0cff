"""Prefix caching: keys and values of a text are reused for others with the same beginning.

Shapes: L layers, G key/value heads, N tokens of a text, D head size.
"""

from collections.abc import Sequence

from torch import Tensor


class PrefixCache:
    """Keys and values of the most recently used texts, at most `max_texts`.

    A conversation is sent again with every turn, and prompts to one model share beginnings: only
    what is new has to be computed.
    """

    def __init__(self, max_texts: int) -> None:
        self.max_texts = max_texts
        self._texts: dict[tuple[int, ...], Tensor] = {}  # least recently used first

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all texts."""
        return sum(map(len, self._texts))

    def add(self, ids: Sequence[int], kv: Tensor) -> None:
        """Keeps N tokens of a text, and a copy of their keys, then values, (L, 2, G, N, D).

        Drops texts that are its prefixes, and the least recently used one if there are too many.
        """
        text = tuple(ids)
        if not self.max_texts or any(kept[: len(text)] == text for kept in self._texts):
            return
        for kept in [kept for kept in self._texts if text[: len(kept)] == kept]:
            del self._texts[kept]
        self._texts[text] = kv.clone()
        if len(self._texts) > self.max_texts:
            self._drop_oldest()

    def find(self, ids: Sequence[int]) -> Tensor | None:
        """Keys and values (L, 2, G, n, D) of the longest cached prefix of a text, or None."""
        newest_first = reversed(self._texts)
        best = max(newest_first, key=lambda text: common_length(ids, text), default=())
        if not (n_tokens := common_length(ids, best)):
            return None
        kv = self._texts[best] = self._texts.pop(best)
        return kv[:, :, :, :n_tokens]

    def shrink(self, n_tokens: int) -> None:
        """Drops the least recently used texts until at most `n_tokens` are left."""
        while self.n_tokens > max(n_tokens, 0):
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        del self._texts[next(iter(self._texts))]


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two texts, in tokens."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
