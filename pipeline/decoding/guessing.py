"""Tokens guessed ahead: what followed the newest two where the text had them before.

A step of decoding takes little longer for five tokens than for one, so guesses are checked in the
step that is due anyway (prompt lookup decoding, Saxena 2023). They change no text but for rounding:
logits after a guess are used if that very token was chosen, by whatever way tokens are chosen.
"""

from collections.abc import Sequence

from pipeline.layers.attention_products import MAX_NEW_TOKENS

MAX_GUESSES = MAX_NEW_TOKENS - 1  # with two tokens to go by; as measured (benchmarks/NOTES.md)


def guess(ids: Sequence[int], max_tokens: int) -> list[int]:
    """At most so many tokens that may come next; none where nothing like it came before."""
    n_tokens = min(MAX_GUESSES, max_tokens)
    if len(ids) < 2 or n_tokens < 1:
        return []
    before, newest = ids[-2:]
    for i in range(len(ids) - 2, 0, -1):
        if ids[i] == newest and ids[i - 1] == before:
            return list(ids[i + 1 : i + 1 + n_tokens])
    return []
