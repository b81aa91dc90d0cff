"""Guesses of the next tokens: what followed the newest two tokens earlier in the text.

A decoding step takes little longer for five tokens than for one, so guesses are checked in the
step that is due anyway (prompt lookup decoding, Saxena 2023). Apart from rounding they change no
text: logits after a guess are used only if that token was then chosen, greedily or by sampling.
"""

from collections.abc import Sequence

from pipeline.layers.attention_products import MAX_NEW_TOKENS

MAX_GUESSES = MAX_NEW_TOKENS - 1  # for a match of two tokens; as measured (benchmarks/NOTES.md)


def guess(ids: Sequence[int], max_tokens: int) -> list[int]:
    """At most `max_tokens` guesses; none where the newest two tokens did not occur before."""
    n_tokens = min(MAX_GUESSES, max_tokens)
    if len(ids) < 2 or n_tokens < 1:
        return []
    before, newest = ids[-2:]
    for i in range(len(ids) - 2, 0, -1):
        if ids[i] == newest and ids[i - 1] == before:
            return list(ids[i + 1 : i + 1 + n_tokens])
    return []
