"""One tokenizer for everything: tiktoken runs it, be it named, trained here or of a checkpoint.

Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): every text has an encoding, and decoding
gives it back. Special tokens are never made from text: `<|endoftext|>` typed by a user is encoded
as the characters that it is.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiktoken

from datamodules.files import replacing

ENDOFTEXT = "<|endoftext|>"
CHAT_MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
)
FILE_NAME = "tokenizer.json"

_FORMAT = "gpt-pipeline tokenizer 1"
# Qwen2's split into words: GPT-4's with one digit a piece, which suits small vocabularies.
# tiktoken, Hugging Face and llama.cpp know it, so that what is trained here runs there.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tiktoken's regex engine overflows its stack on a million blanks in a row: such runs are cut
_BLANKS = re.compile(r"\s{100000}")


@dataclass(frozen=True)
class Vocabulary:
    """Everything that decides ids, and how its makers write conversations.

    Attributes:
        name: what the encoding is called; `bpe-<size>` where it was trained here.
        pattern: regular expression of the pieces that merges stay within.
        tokens: bytes of every id in the order of merges; empty for an id that no text has.
        special_tokens: name -> id; never made from text.
        eos: the special token that ends a text, or an answer.
        bos: the special token that its makers put before every text, if any.
        chat_template: Jinja source of its makers' conversations, if any.
        template_bos: the special token that the template calls `bos_token`, where it is not `bos`.
    """

    name: str
    pattern: str
    tokens: list[bytes] = field(repr=False)
    special_tokens: dict[str, int]
    eos: str = ENDOFTEXT
    bos: str | None = None
    chat_template: str | None = None
    template_bos: str | None = None

    @property
    def bos_token(self) -> str | None:
        """What a chat template calls so, whether or not it stands before other texts."""
        return self.template_bos or self.bos

    @property
    def size(self) -> int:
        """Number of ids, special ones included."""
        return max(len(self.tokens), 1 + max(self.special_tokens.values()))

    @property
    def missing_bytes(self) -> list[bytes]:
        """Bytes that have no token; vocabularies made elsewhere may leave out rare ones."""
        known = set(self.tokens)
        return [byte for byte in map(_byte, range(256)) if byte not in known]

    def content(self) -> dict[str, Any]:
        """As primitives; what is at its default is left out."""
        optional = {
            "eos": self.eos,
            "bos": self.bos,
            "chat_template": self.chat_template,
            "template_bos": self.template_bos,
        }
        defaults = {"eos": ENDOFTEXT}
        return {
            "format": _FORMAT,
            "name": self.name,
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "tokens": [base64.b64encode(token).decode() for token in self.tokens],
            **{key: value for key, value in optional.items() if value != defaults.get(key)},
        }


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary that tiktoken runs, with a digest.

    Attributes:
        vocabulary: everything that decides ids.
        digest: SHA-256 of its canonical file content; equal digests encode equally.
    """

    vocabulary: Vocabulary = field(repr=False, compare=False)
    digest: str
    encoding: tiktoken.Encoding = field(repr=False, compare=False)

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Tokenizer:
        """The tokenizer of a vocabulary.

        Raises:
            ValueError: where its end-of-text token is not among its special tokens.
        """
        if vocabulary.eos not in vocabulary.special_tokens:
            raise ValueError(f"encoding {vocabulary.name!r} has no {vocabulary.eos}.")
        # tiktoken needs an id for every byte: those without get ids beyond the vocabulary
        ranks = {token: rank for rank, token in enumerate(vocabulary.tokens) if token}
        missing = enumerate(vocabulary.missing_bytes, start=vocabulary.size)
        encoding = tiktoken.Encoding(
            vocabulary.name,
            pat_str=vocabulary.pattern,
            mergeable_ranks=ranks | {byte: rank for rank, byte in missing},
            special_tokens=vocabulary.special_tokens,
        )
        return cls(vocabulary, _digest(vocabulary.content()), encoding)

    @property
    def name(self) -> str:
        """Of the encoding."""
        return self.vocabulary.name

    @property
    def n_vocab(self) -> int:
        """Number of ids, special ones included."""
        return self.vocabulary.size

    @property
    def special_ids(self) -> dict[str, int]:
        """Declared special tokens and their ids."""
        return self.vocabulary.special_tokens

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a text: `<|endoftext|>`, unless its makers chose another."""
        return self.special_ids[self.vocabulary.eos]

    @property
    def bos_ids(self) -> list[int]:
        """What stands before every text: one id where the vocabulary's makers want it, or none."""
        return [self.special_ids[self.vocabulary.bos]] if self.vocabulary.bos else []

    def encode(self, text: str) -> list[int]:
        """Ids of a text, all of it ordinary; bytes that the vocabulary cannot spell are left out.

        Vocabularies made here spell every byte.
        """
        ids = [i for part in _cut_blanks(text) for i in self.encoding.encode_ordinary(part)]
        spells_all = max(ids, default=0) < self.n_vocab
        return ids if spells_all else self._encode_spelled(text)

    def _encode_spelled(self, text: str) -> list[int]:
        """As `tokenizers`: what stood around a byte left out may be merged, within its piece."""
        missing = b"".join(self.vocabulary.missing_bytes)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken
        pieces = _splitter(self.vocabulary.pattern).pre_tokenize_str(text)
        spelled = (piece.encode().translate(None, missing) for piece, _ in pieces)
        return [i for piece in spelled if piece for i in self.encoding._encode_single_piece(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD.

        Raises:
            KeyError: for an id that the vocabulary does not have.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids, exactly.

        Raises:
            KeyError: for an id that the vocabulary does not have.
        """
        return self.encoding.decode_bytes(list(ids))

    def lengths(self) -> list[int]:
        """Bytes of every id; none for a special token."""
        lengths = list(map(len, self.vocabulary.tokens))
        return lengths + [0] * (self.n_vocab - len(lengths))

    def save(self, path: Path) -> None:
        """Writes one self-contained file; in a directory it is called `tokenizer.json`."""
        path = path / FILE_NAME if path.is_dir() else path
        content = {**self.vocabulary.content(), "digest": self.digest}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content))

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer:
        """The tokenizer of a name (`gpt2`), a file, or a directory (a checkpoint) that holds one.

        Raises:
            ValueError: if there is none, it cannot be fetched, or its file is damaged.
        """
        if str(source) in tiktoken.list_encoding_names():
            return _named(str(source))
        path = Path(os.path.expandvars(source)).expanduser()
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"tokenizer {str(source)!r} does not exist; give a file of `tokenizer train`, "
                f"a checkpoint directory, or one of {', '.join(tiktoken.list_encoding_names())}."
            )
        return _read(path)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, min_frequency: int) -> Tokenizer:
    """Learns a byte-level BPE vocabulary; the same texts in the same order give the same one.

    It declares `<|endoftext|>` and the chat markers. Where the text is too small for the size
    asked, the vocabulary is simply smaller: see `n_vocab`.

    Args:
        texts: consumed once.
        vocab_size: ids at most: 256 bytes, merged tokens and special tokens.
        min_frequency: a pair that occurs less often is not merged.

    Raises:
        ValueError: if the size leaves no room for a single merge, or the frequency is not positive.
    """
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainable

    smallest = 256 + 1 + len(CHAT_MARKERS) + 1
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}, but 256 bytes, {smallest - 257} special tokens and one "
            f"merge need {smallest}; raise vocab_size to {smallest} or more."
        )
    if min_frequency < 1:
        raise ValueError(f"min_frequency is {min_frequency}; give at least 1.")
    bpe = Trainable(models.BPE())
    words = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, spelling])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1 - len(CHAT_MARKERS),
        min_frequency=min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    ids = bpe.get_vocab()
    by_id = sorted(ids, key=ids.__getitem__)
    return _trained([token_bytes(token) for token in by_id if len(token) > 1])


def _trained(merged: list[bytes]) -> Tokenizer:
    tokens = [*map(_byte, range(256)), *merged]
    specials = {name: len(tokens) + i for i, name in enumerate((ENDOFTEXT, *CHAT_MARKERS))}
    name = f"bpe-{len(tokens) + len(specials)}"
    return Tokenizer.of(Vocabulary(name, PATTERN, tokens, specials))


def _byte(value: int) -> bytes:
    return bytes([value])


def token_bytes(token: str) -> bytes:
    """Undoes GPT-2's spelling of bytes: printable ones are themselves, others U+0100 onwards.

    Raises:
        KeyError: for a character that spells no byte.
    """
    return bytes(_BYTE_OF[character] for character in token)


def token_spelling(token: bytes) -> str:
    """GPT-2's spelling of a token's bytes, as tokenizer.json and GGUF hold it."""
    return "".join(_CHARACTER_OF[byte] for byte in token)


def _spelling() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + i): byte for i, byte in enumerate(others)},
    }


_BYTE_OF = _spelling()
_CHARACTER_OF = {byte: character for character, byte in _BYTE_OF.items()}


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


def _named(name: str) -> Tokenizer:
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        raise ValueError(
            f"the vocabulary of {name!r} is not on this machine and could not be downloaded "
            f"({type(error).__name__}); go online once, or set TIKTOKEN_CACHE_DIR to a folder "
            "that holds it."
        ) from error
    tokens = [b""] * (max(encoding._mergeable_ranks.values()) + 1)
    for token, rank in encoding._mergeable_ranks.items():
        tokens[rank] = token
    specials = dict(encoding._special_tokens)
    return Tokenizer.of(Vocabulary(encoding.name, encoding._pat_str, tokens, specials))


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Tokenizer:
    damaged = f"{path} is damaged, or no tokenizer of this project; restore it, or train a new one."
    try:
        content = json.loads(path.read_bytes())
        stored = content.pop("digest")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(damaged) from error
    if content.get("format") != _FORMAT or stored != _digest(content):
        raise ValueError(damaged)
    del content["format"]
    tokens = [base64.b64decode(token) for token in content.pop("tokens")]
    return Tokenizer.of(Vocabulary(tokens=tokens, **content))
