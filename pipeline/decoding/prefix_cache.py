"""Prefix caching: what was computed for a text serves others that begin alike.

Shapes: L layers, G key/value heads, N tokens of a text, D head size.
"""

from collections.abc import Sequence

from torch import Tensor


class PrefixCache:
    """Keys and values of the latest texts that have ended, `max_texts` of them.

    A conversation is read again with every turn, and questions to one model begin alike: only what
    is new has to be computed.
    """

    def __init__(self, max_texts: int) -> None:
        self.max_texts = max_texts
        self._texts: dict[tuple[int, ...], Tensor] = {}  # what was used last stands last

    @property
    def n_tokens(self) -> int:
        """Tokens of all texts that are kept."""
        return sum(map(len, self._texts))

    def add(self, ids: Sequence[int], kv: Tensor) -> None:
        """Keeps N tokens of a text, and a copy of their keys, then values, (L, 2, G, N, D).

        Gives up what it begins with, or the text that was longest unused.
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
        """Keys and values (L, 2, G, n, D) of what a text begins with, as far as one here does."""
        newest_first = reversed(self._texts)
        best = max(newest_first, key=lambda text: common_length(ids, text), default=())
        if not (n_tokens := common_length(ids, best)):
            return None
        kv = self._texts[best] = self._texts.pop(best)
        return kv[:, :, :, :n_tokens]

    def shrink(self, n_tokens: int) -> None:
        """Gives up the longest unused until no more than so many tokens are left."""
        while self.n_tokens > max(n_tokens, 0):
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        del self._texts[next(iter(self._texts))]


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
