"""Log-probabilities in OpenAI's two formats: tokens as pieces of a text, and where each begins."""

import codecs
from collections.abc import Sequence
from typing import Any, NamedTuple

from datamodules.tokenizer import Tokenizer
from pipeline.decoding.logprobs import TokenLogprob


class TokenText(NamedTuple):
    """A token as a piece of text, with its log-probability."""

    piece: bytes  # which may be part of a character
    offset: int  # number of characters of the text before it
    logprob: float | None  # in nats; None for a text's first token
    likeliest: list[tuple[bytes, float]]  # at its position, with their log-probabilities


class TokenTexts:
    """Turns tokens, one after the other, into pieces of a text; the first one follows `before`."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._tokenizer, self._before = tokenizer, before
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset, self._is_first = 0, True

    def add(self, new: TokenLogprob) -> TokenText:
        """The next token as a piece of text; BOS at the start does not count as text."""
        piece = self._tokenizer.piece(new.token, self._before)
        likeliest = [
            (self._tokenizer.piece(other, self._before), logprob)
            for other, logprob in new.likeliest
        ]
        token = TokenText(piece, self._offset, new.logprob, likeliest)
        if not (self._is_first and new.token in self._tokenizer.bos_ids):
            self._offset += len(self._decoder.decode(piece))
            self._before = [new.token]
        self._is_first = False
        return token


def chat_form(tokens: Sequence[TokenText]) -> dict[str, Any]:
    """The `logprobs` of a chat completion's choice."""
    content = [
        {
            **_chat_piece(token.piece, token.logprob),
            "top_logprobs": [_chat_piece(*other) for other in token.likeliest],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_piece(piece: bytes, logprob: float | None) -> dict[str, Any]:
    text = piece.decode("utf-8", errors="replace")
    return {"token": text, "logprob": logprob, "bytes": list(piece)}


def text_form(tokens: Sequence[TokenText]) -> dict[str, Any]:
    """The `logprobs` of a text completion's choice."""
    return {
        "tokens": [_named(token.piece) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_by_name(token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _by_name(token: TokenText) -> dict[str, float] | None:
    """Log-probabilities of the likeliest tokens and the token itself; None for a text's first."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for piece, logprob in [*token.likeliest, (token.piece, token.logprob)]:
        found.setdefault(_named(piece), logprob)
    return found


def _named(piece: bytes) -> str:
    """The piece as text, or as bytes in OpenAI's spelling, so that no two pieces share a name."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
