"""SentencePiece's BPE, as in Llama 2, TinyLlama and Mistral 7B, run by `tokenizers`.

It merges characters, not bytes; a character without a token is spelled by its bytes. A space is
written ▁ (U+2581) and belongs to the word after it; an extra one is put before a text. Decoding
restores every text, except that ▁ itself becomes a space, and for what `SentencePiece.prefix`
says. Source: github.com/google/sentencepiece; Kudo and Richardson 2018.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from datamodules.byte_level import whole_characters

if TYPE_CHECKING:
    from datamodules.tokenizer import Vocabulary

BLANK = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # names of the tokens of bytes
Prefix = Literal["prepend", "always", "first", "never"]
_WORDS = f"{BLANK}*[^{BLANK}]+|{BLANK}+"  # much faster than one piece, with the same ids ...
_WORD = re.compile(f"{BLANK}*[^{BLANK}]*")  # ... if every token matches this
_ONE_PIECE = r"(?s:.+)"


@dataclass(frozen=True)
class SentencePiece:
    """What decides ids besides the tokens.

    Attributes:
        merges: pairs of ids, in the order of merging.
        byte_ids: ids of the 256 bytes.
        prefix: where a space is put before text: `prepend` at its start and after special tokens,
            as in SentencePiece and llama.cpp; the others are Metaspace's of `tokenizers`, which
            adds none before a space (so a text's first space is lost in decoding): `always` in the
            same places, `first` at the start alone, `never` nowhere.
    """

    merges: list[tuple[int, int]] = field(repr=False)
    byte_ids: list[int] = field(repr=False)
    prefix: Prefix


class CharacterLevel:
    """Merges characters; whether a space is put before a text depends on the ids before it."""

    def __init__(self, vocabulary: Vocabulary, form: SentencePiece) -> None:
        from tokenizers import models

        spelled = spell(vocabulary.tokens, form.byte_ids)
        merges = [(spelled[left], spelled[right]) for left, right in form.merges]
        ids = {token: i for i, token in spelled.items()}
        self._bpe = models.BPE(ids, merges, byte_fallback=True)
        self._pieces = re.compile(vocabulary.pattern)
        self._prefix = form.prefix
        self._special = {i: name.encode() for name, i in vocabulary.special_tokens.items()}
        ordinary = {i: token for i, token in enumerate(vocabulary.tokens) if token}
        self._bytes = ordinary | self._special

    def encode(self, text: str, before: Sequence[int]) -> list[int]:
        """See `Tokenizer.encode`."""
        written = whole_characters(text).replace(" ", BLANK)
        has_blank = self._prefix != "prepend" and written.startswith(BLANK)
        if written and self._begins(before) and not has_blank:
            written = BLANK + written
        pieces = self._pieces.findall(written)
        return [token.id for piece in pieces for token in self._bpe.tokenize(piece)]

    def decode(self, ids: Sequence[int], before: Sequence[int]) -> bytes:
        """See `Tokenizer.decode_bytes`."""
        text = b"".join(self._bytes[i] for i in ids)
        return text.removeprefix(b" ") if self._begins(before) else text

    def _begins(self, before: Sequence[int]) -> bool:
        """Whether a space is put before text that follows these ids."""
        if self._prefix == "never" or not before:
            return self._prefix != "never"
        return self._prefix != "first" and before[-1] in self._special


def spell(tokens: Sequence[bytes], byte_ids: Sequence[int]) -> dict[int, str]:
    """Ordinary tokens by id, spelled as in tokenizer.json and GGUF."""
    texts = {i: token.decode(errors="replace") for i, token in enumerate(tokens) if token}
    spelled = {i: text.replace(" ", BLANK) for i, text in texts.items()}
    return spelled | dict(zip(byte_ids, BYTES, strict=True))


def pattern_of(tokens: Sequence[str]) -> str:
    """Regex of the pieces that merges stay within: words, unless some token spans two of them."""
    return _WORDS if all(map(_WORD.fullmatch, tokens)) else _ONE_PIECE
