"""Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), run by tiktoken."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import tiktoken

if TYPE_CHECKING:
    from datamodules.tokenizer import Vocabulary

# tiktoken's regex engine overflows its stack on a million blanks in a row: such runs are cut
_BLANKS = re.compile(r"\s{100000}")


class ByteLevel:
    """Merges bytes within pieces; the ids of a text do not depend on what precedes it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        # tiktoken needs an id for every byte: those without get ids beyond the vocabulary
        ranks = {token: rank for rank, token in enumerate(vocabulary.tokens) if token}
        missing = enumerate(vocabulary.missing_bytes, start=vocabulary.size)
        self._encoding = tiktoken.Encoding(
            vocabulary.name,
            pat_str=vocabulary.pattern,
            mergeable_ranks=ranks | {byte: rank for rank, byte in missing},
            special_tokens=vocabulary.special_tokens,
        )

    def encode(self, text: str, before: Sequence[int]) -> list[int]:
        """See `Tokenizer.encode`."""
        if self._vocabulary.nfc:
            text = unicodedata.normalize("NFC", text)
        ids = [i for part in _cut_blanks(text) for i in self._encoding.encode_ordinary(part)]
        spells_all = max(ids, default=0) < self._vocabulary.size
        return ids if spells_all else self._encode_spelled(text)

    def _encode_spelled(self, text: str) -> list[int]:
        """Encodes as `tokenizers` does: drops unknown bytes of a piece, then merges the rest."""
        missing = b"".join(self._vocabulary.missing_bytes)
        pieces = _splitter(self._vocabulary.pattern).pre_tokenize_str(whole_characters(text))
        spelled = (piece.encode().translate(None, missing) for piece, _ in pieces)
        return [i for piece in spelled if piece for i in self._encoding._encode_single_piece(piece)]

    def decode(self, ids: Sequence[int], before: Sequence[int]) -> bytes:
        """See `Tokenizer.decode_bytes`."""
        return self._encoding.decode_bytes(ids)


def whole_characters(text: str) -> str:
    """Replaces every lone surrogate (half a character) with U+FFFD, as tiktoken does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def token_bytes(token: str) -> bytes:
    """Undoes GPT-2's spelling of bytes: printable ones as themselves, others from U+0100 on.

    Raises:
        KeyError: for a character that spells no byte.
    """
    return bytes(_BYTE_OF[character] for character in token)


def token_spelling(token: bytes) -> str:
    """GPT-2's spelling of a token's bytes, as tokenizer.json and GGUF hold it."""
    return "".join(_CHARACTER_OF[byte] for byte in token)


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTER_OF = {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_CHARACTER_OF |= {byte: chr(byte) for byte in _PRINTABLE}
_BYTE_OF = {character: byte for byte, character in _CHARACTER_OF.items()}


@functools.cache
def _splitter(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _cut_blanks(text: str) -> Iterator[str]:
    start = 0
    for run in _BLANKS.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]
