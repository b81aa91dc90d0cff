"""Log-probabilities in OpenAI's two formats: tokens as pieces of a text, and where each begins."""

import codecs
from collections.abc import Sequence
from typing import Any, NamedTuple

from datamodules.tokenizer import Tokenizer
from pipeline.decoding.logprobs import TokenLogprob


class Told(NamedTuple):
    """A token of a text, with its log-probability."""

    piece: bytes  # which may be part of a character
    offset: int  # number of characters of the text before it
    logprob: float | None  # in nats; None for a text's first token
    likeliest: list[tuple[bytes, float]]  # at its position, with their log-probabilities


class Teller:
    """Turns tokens, one after the other, into pieces of a text; the first one follows `before`."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._tokenizer, self._before = tokenizer, before
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset, self._is_first = 0, True

    def tell(self, token: TokenLogprob) -> Told:
        """The next token as a piece; BOS at the start does not count as text."""
        piece = self._tokenizer.piece(token.token, self._before)
        likeliest = [
            (self._tokenizer.piece(other, self._before), logprob)
            for other, logprob in token.likeliest
        ]
        told = Told(piece, self._offset, token.logprob, likeliest)
        if not (self._is_first and token.token in self._tokenizer.bos_ids):
            self._offset += len(self._decoder.decode(piece))
            self._before = [token.token]
        self._is_first = False
        return told


def chat_form(tokens: Sequence[Told]) -> dict[str, Any]:
    """The `logprobs` of a chat completion's choice."""
    content = [
        {
            **_chat_piece(told.piece, told.logprob),
            "top_logprobs": [_chat_piece(*other) for other in told.likeliest],
        }
        for told in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_piece(piece: bytes, logprob: float | None) -> dict[str, Any]:
    text = piece.decode("utf-8", errors="replace")
    return {"token": text, "logprob": logprob, "bytes": list(piece)}


def text_form(tokens: Sequence[Told]) -> dict[str, Any]:
    """The `logprobs` of a text completion's choice."""
    return {
        "tokens": [_named(told.piece) for told in tokens],
        "token_logprobs": [told.logprob for told in tokens],
        "top_logprobs": [_by_name(told) for told in tokens],
        "text_offset": [told.offset for told in tokens],
    }


def _by_name(told: Told) -> dict[str, float] | None:
    """Log-probabilities of the likeliest tokens and the token itself; None for a text's first."""
    if told.logprob is None:
        return None
    found: dict[str, float] = {}
    for piece, logprob in [*told.likeliest, (told.piece, told.logprob)]:
        found.setdefault(_named(piece), logprob)
    return found


def _named(piece: bytes) -> str:
    """The piece as text, or as bytes in OpenAI's spelling, so that no two pieces share a name."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
