"""One tokenizer class for all: named ones, those trained here and those of checkpoints.

Byte-level BPE, or SentencePiece's if an imported checkpoint has that: every text has an encoding,
and decoding restores it (in NFC, where the vocabulary normalises to that first). Text never becomes
special tokens: `<|endoftext|>` typed by a user is encoded as the characters that it consists of.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tiktoken

from datamodules.byte_level import ByteLevel, token_bytes
from datamodules.files import MALFORMED, digest, expanded, replacing
from datamodules.sentencepiece import CharacterLevel, SentencePiece

ENDOFTEXT = "<|endoftext|>"
CHAT_MARKERS = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
FILE_NAME = "tokenizer.json"

_FORMAT = "gpt-pipeline tokenizer 1"
# Qwen2's pre-tokenisation: GPT-4's, but with single digits, which suits small vocabularies.
# tiktoken, Hugging Face and llama.cpp know it, so that models trained here run there.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TRAINED_AT_ONCE = 1 << 16  # characters, and the rest of the line
_BYTES = [bytes([value]) for value in range(256)]
_LINE_END = re.compile(r"\n(?=\S)")


@dataclass(frozen=True)
class Vocabulary:
    """Everything that decides ids, and the chat template that comes with them.

    Attributes:
        name: name of the encoding; `bpe-<size>` if it was trained here.
        pattern: regular expression of the pieces that merges stay within.
        tokens: bytes of every id (without `sentencepiece` in the order of merges); empty for an id
            that no text is encoded with.
        special_tokens: name -> id; text never becomes one.
        eos: the special token that ends a text, or an answer.
        more_ends: further special tokens that end generation.
        bos: the special token that starts every text, if any.
        chat_template: Jinja source of the published chat template, if any.
        template_bos: the special token that the template calls `bos_token`, if it is not `bos`.
        sentencepiece: what else decides ids if characters are merged; None at byte level.
        shown: special tokens that belong to the text and are shown with it, such as `<think>`.
        nfc: whether text is first normalised to Unicode's NFC, at byte level.
    """

    name: str
    pattern: str
    tokens: list[bytes] = field(repr=False)
    special_tokens: dict[str, int]
    eos: str = ENDOFTEXT
    bos: str | None = None
    chat_template: str | None = None
    template_bos: str | None = None
    more_ends: tuple[str, ...] = ()
    sentencepiece: SentencePiece | None = None
    shown: tuple[str, ...] = ()
    nfc: bool = False

    @property
    def bos_token(self) -> str | None:
        """The chat template's `bos_token`, whether or not it starts other texts."""
        return self.template_bos or self.bos

    @property
    def size(self) -> int:
        """Number of ids, special ones included."""
        return max(len(self.tokens), 1 + max(self.special_tokens.values()))

    @property
    def missing_bytes(self) -> list[bytes]:
        """Bytes that have no token; vocabularies made elsewhere may lack rare ones."""
        known = set(self.tokens)
        return [byte for byte in _BYTES if byte not in known]

    def content(self) -> dict[str, Any]:
        """The vocabulary in primitives, without fields that have their default."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        content = {name: value for name, (value, default) in values.items() if value != default}
        content["tokens"] = [base64.b64encode(token).decode() for token in self.tokens]
        if self.sentencepiece:
            content["sentencepiece"] = vars(self.sentencepiece)
        # in the order of existing files, which runs identify by their bytes
        order = dict.fromkeys(("format", "name", "pattern", "special_tokens", "tokens"))
        return {**order, "format": _FORMAT, **content}


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its encoder and digest.

    `digest` is the SHA-256 of the canonical file content; equal digests encode equally.
    """

    vocabulary: Vocabulary = field(repr=False, compare=False)
    digest: str
    encoder: ByteLevel | CharacterLevel = field(repr=False, compare=False)

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Tokenizer:
        """The tokenizer of a vocabulary; ValueError where its `eos` is no special token."""
        if vocabulary.eos not in vocabulary.special_tokens:
            raise ValueError(f"encoding {vocabulary.name!r} has no {vocabulary.eos}.")
        form = vocabulary.sentencepiece
        encoder = CharacterLevel(vocabulary, form) if form else ByteLevel(vocabulary)
        return cls(vocabulary, digest(vocabulary.content()), encoder)

    def is_like(self, other: Tokenizer) -> bool:
        """Whether it equals another up to the name: an export is read back under a new one."""
        renamed = replace(self.vocabulary, name=other.name)
        return renamed.content() == other.vocabulary.content()

    @property
    def name(self) -> str:
        """Name of the encoding."""
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
        """Id of the token that ends a text: `<|endoftext|>`, unless the vocabulary has another."""
        return self.special_ids[self.vocabulary.eos]

    @property
    def bos_ids(self) -> list[int]:
        """Ids that start every text: the BOS id, or none if the vocabulary has no BOS."""
        return [self.special_ids[self.vocabulary.bos]] if self.vocabulary.bos else []

    def encode(self, text: str, before: Sequence[int] = ()) -> list[int]:
        """Ids of a text, never special ones; bytes that the vocabulary cannot spell are dropped.

        Vocabularies made here spell every byte. `before` are the preceding ids: some vocabularies
        encode the start of a text differently from its continuation.
        """
        return self.encoder.encode(text, before)

    def decode(self, ids: Iterable[int], before: Sequence[int] = ()) -> str:
        """Text of ids, see `decode_bytes`; what is not UTF-8 (half a character) becomes U+FFFD."""
        return self.decode_bytes(ids, before).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], before: Sequence[int] = ()) -> bytes:
        """Exact bytes of ids that follow `before`, without a space that `encode` puts there.

        Raises:
            KeyError: for an id that the vocabulary does not have.
        """
        return self.encoder.decode(list(ids), before)

    def piece(self, token: int, before: Sequence[int] = ()) -> bytes:
        """Bytes of an id that a model chose; empty if the vocabulary does not have it."""
        try:
            return self.decode_bytes([token], before)
        except KeyError:
            return b""

    def lengths(self) -> list[int]:
        """Number of bytes of every id; 0 for special tokens.

        For a text's first id this includes the space that `encode` may put there.
        """
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
        """The tokenizer with a name (`gpt2`), in a file, or in a directory (a checkpoint).

        Raises:
            ValueError: if there is none, it cannot be fetched, or its file is damaged.
        """
        if str(source) in tiktoken.list_encoding_names():
            return _named(str(source))
        path = expanded(source)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"tokenizer {str(source)!r} does not exist; give a file of `tokenizer train`, "
                f"a checkpoint directory, or one of {', '.join(tiktoken.list_encoding_names())}."
            )
        if path.suffix == ".model":
            raise ValueError(
                f"{path} is SentencePiece's own form, which is not read; convert it with "
                "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...), and give "
                "a checkpoint that `import` makes of that model."
            )
        return _read(path)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, min_frequency: int) -> Tokenizer:
    """Trains a byte-level BPE vocabulary; the same texts in the same order give the same one.

    It declares `<|endoftext|>` and the chat markers. If there is too little text for the size asked
    for, the vocabulary is simply smaller: see `n_vocab`.

    Args:
        texts: consumed once.
        vocab_size: maximum number of ids: 256 bytes, merged tokens and special tokens.
        min_frequency: pairs that occur less often are not merged.

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
    bpe.train_from_iterator((part for text in texts for part in _lines(text)), trainer)
    ids = bpe.get_vocab()
    merged = [token_bytes(token) for token in sorted(ids, key=ids.__getitem__) if len(token) > 1]
    tokens = [*_BYTES, *merged]
    specials = {name: len(tokens) + i for i, name in enumerate((ENDOFTEXT, *CHAT_MARKERS))}
    name = f"bpe-{len(tokens) + len(specials)}"
    return Tokenizer.of(Vocabulary(name, PATTERN, tokens, specials))


def _lines(text: str) -> Iterator[str]:
    """Cuts a text at lines that start without white space, where PATTERN ends a piece anyway.

    The trainer holds 256 of the parts that it is given, each at twenty times its size.
    """
    start = 0
    while end := _LINE_END.search(text, start + _TRAINED_AT_ONCE):
        yield text[start : end.end()]
        start = end.end()
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


def _read(path: Path) -> Tokenizer:
    damaged = f"{path} is damaged, or no tokenizer of this project; restore it, or train a new one."
    try:
        content = json.loads(path.read_bytes())
        stored = content.pop("digest")
    except MALFORMED as error:
        raise ValueError(damaged) from error
    if content.get("format") != _FORMAT or stored != digest(content):
        raise ValueError(damaged)
    del content["format"]
    content["tokens"] = [base64.b64decode(token) for token in content["tokens"]]
    for key in ("more_ends", "shown"):
        content[key] = tuple(content.get(key, ()))
    if form := content.pop("sentencepiece", None):
        merges = [(left, right) for left, right in form.pop("merges")]
        content["sentencepiece"] = SentencePiece(merges, **form)
    return Tokenizer.of(Vocabulary(**content))
