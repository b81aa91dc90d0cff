"""One tokenizer for everything: tiktoken runs it, be it named, trained here or of a checkpoint.

Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): every text has an encoding, and decoding
gives it back. Special tokens are never made from text: `<|endoftext|>` typed by a user is encoded
as the characters that it is.
"""

from __future__ import annotations

import base64
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
# GPT-4's split into words (tiktoken's cl100k_base), but combining marks stay in their word, and a
# piece has at most two digits, which suits small vocabularies (nanochat). The regex engines of both
# tiktoken and Hugging Face read it.
_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tiktoken's regex engine overflows its stack on a million blanks in a row: such runs are cut
_BLANKS = re.compile(r"\s{100000}")


@dataclass(frozen=True)
class Tokenizer:
    """A tiktoken encoding with a digest.

    Attributes:
        name: of the encoding; `bpe-<n_vocab>` where it was trained here.
        digest: SHA-256 of its canonical file content; equal digests encode equally.
    """

    name: str
    digest: str
    encoding: tiktoken.Encoding = field(repr=False, compare=False)

    @property
    def n_vocab(self) -> int:
        """Number of ids, special ones included."""
        return self.encoding.n_vocab

    @property
    def special_ids(self) -> dict[str, int]:
        """Declared special tokens and their ids."""
        return dict(self.encoding._special_tokens)

    @property
    def eos_id(self) -> int:
        """Id of `<|endoftext|>`."""
        return self.special_ids[ENDOFTEXT]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, all of it ordinary."""
        return [i for part in _cut_blanks(text) for i in self.encoding.encode_ordinary(part)]

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
        lengths = [0] * self.n_vocab
        for token, rank in self.encoding._mergeable_ranks.items():
            lengths[rank] = len(token)
        return lengths

    def save(self, path: Path) -> None:
        """Writes one self-contained file; in a directory it is called `tokenizer.json`."""
        content = _content(self.encoding)
        path = path / FILE_NAME if path.is_dir() else path
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({**content, "digest": _digest(content)}))

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
    words = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
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
    return _trained([_to_bytes(token) for token in by_id if len(token) > 1])


def _trained(merged: list[bytes]) -> Tokenizer:
    tokens = [bytes([byte]) for byte in range(256)] + merged
    ranks = {token: rank for rank, token in enumerate(tokens)}
    specials = {name: len(tokens) + i for i, name in enumerate((ENDOFTEXT, *CHAT_MARKERS))}
    name = f"bpe-{len(ranks) + len(specials)}"
    return _wrap(
        tiktoken.Encoding(name, pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    )


def _to_bytes(token: str) -> bytes:
    """Undoes GPT-2's spelling of bytes: printable ones are themselves, others U+0100 onwards."""
    return bytes(_BYTE_OF[character] for character in token)


def _spelling() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + i): byte for i, byte in enumerate(others)},
    }


_BYTE_OF = _spelling()


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
    if ENDOFTEXT not in encoding._special_tokens:
        raise ValueError(f"encoding {name!r} has no {ENDOFTEXT}; give another tokenizer.")
    return _wrap(encoding)


def _wrap(encoding: tiktoken.Encoding) -> Tokenizer:
    return Tokenizer(encoding.name, _digest(_content(encoding)), encoding)


def _content(encoding: tiktoken.Encoding) -> dict[str, Any]:
    """Everything that decides ids; a rank that no token has is an empty token."""
    tokens = [b""] * (max(encoding._mergeable_ranks.values()) + 1)
    for token, rank in encoding._mergeable_ranks.items():
        tokens[rank] = token
    return {
        "format": _FORMAT,
        "name": encoding.name,
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "tokens": [base64.b64encode(token).decode() for token in tokens],
    }


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Tokenizer:
    damaged = f"{path} is damaged, or no tokenizer of this project; restore it, or train a new one."
    try:
        content = json.loads(path.read_bytes())
        stored = content.pop("digest")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(damaged) from error
    if content.get("format") != _FORMAT or stored != _digest(content):
        raise ValueError(damaged)
    tokens = [base64.b64decode(token) for token in content["tokens"]]
    encoding = tiktoken.Encoding(
        content["name"],
        pat_str=content["pattern"],
        mergeable_ranks={token: rank for rank, token in enumerate(tokens) if token},
        special_tokens=content["special_tokens"],
    )
    return Tokenizer(encoding.name, stored, encoding)
