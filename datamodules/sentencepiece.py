"""SentencePiece's BPE, as Llama 2, TinyLlama and Mistral 7B have it, which `tokenizers` runs.

Characters are merged, not bytes, and one without a token is spelled by its bytes. A blank is
written ▁ (U+2581) and belongs to the word after it; a text begins with one more, none of its own.
Decoding gives every text back, but for ▁ itself, which comes back as a blank, and for what
`SentencePiece.prefix` says. Source: github.com/google/sentencepiece; Kudo and Richardson 2018.
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
_WORDS = f"{BLANK}*[^{BLANK}]+|{BLANK}+"  # much faster than one piece, and of the same ids ...
_WORD = re.compile(f"{BLANK}*[^{BLANK}]*")  # ... where every token is like this
_ONE_PIECE = r"(?s:.+)"


@dataclass(frozen=True)
class SentencePiece:
    """What decides ids beside the tokens.

    Attributes:
        merges: pairs of ids, in their order.
        byte_ids: ids of the 256 bytes.
        prefix: where a text is given a blank: `prepend` at its start and after every special token,
            as SentencePiece and llama.cpp do; or as Metaspace of `tokenizers` does, which leaves
            out what begins with a blank already (so the first blank of a text is lost): there
            (`always`), at its start alone (`first`), or nowhere (`never`).
    """

    merges: list[tuple[int, int]] = field(repr=False)
    byte_ids: list[int] = field(repr=False)
    prefix: Prefix


class CharacterLevel:
    """Merges of characters; a blank before a text depends on what stands before it."""

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
        """Whether what follows these ids is given a blank."""
        if self._prefix == "never" or not before:
            return self._prefix != "never"
        return self._prefix != "first" and before[-1] in self._special


def spell(tokens: Sequence[bytes], byte_ids: Sequence[int]) -> dict[int, str]:
    """Every ordinary token as tokenizer.json and GGUF hold it, by its id."""
    texts = {i: token.decode(errors="replace") for i, token in enumerate(tokens) if token}
    spelled = {i: text.replace(" ", BLANK) for i, text in texts.items()}
    return spelled | dict(zip(byte_ids, BYTES, strict=True))


def pattern_of(tokens: Sequence[str]) -> str:
    """The pieces that merges stay within: words, where no token reaches into a second one."""
    return _WORDS if all(map(_WORD.fullmatch, tokens)) else _ONE_PIECE
