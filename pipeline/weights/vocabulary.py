"""Import and export of byte-level BPE vocabularies, with the same ids for the same text.

tiktoken merges by rank, others by a list of merges. If the list makes tokens in the order of their
ids, both give the same ids; otherwise the vocabulary is refused. Equality with `tokenizers` is
shown in tests/test_weights_tokenizers.py and, for export, where the list is made from the ranks, in
tests/test_export_tokenizers.py.
"""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from tiktoken_ext.openai_public import r50k_pat_str

from datamodules.byte_level import token_bytes, token_spelling
from datamodules.sentencepiece import spell
from datamodules.tokenizer import PATTERN, Tokenizer, Vocabulary

T = TypeVar("T", str, bytes)
Pair = tuple[int, int]  # ids that a merge joins
_MAX_IDS = 1 << 20  # as a list of all ids is allocated

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# as GPT-2's, but digits are split off first: so spaces before a digit stay together, while a word
# takes the last of those before it
_SMOLLM = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def _split(regex: str) -> list[dict[str, Any]]:
    pattern = {"Regex": regex}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(use_regex=False)]


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split into pieces before merging: tiktoken's pattern, tokenizer.json's steps."""

    pattern: str
    steps: list[dict[str, Any]]


# by llama.cpp's names for them (tokenizer.ggml.pre)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(_GPT2, [_byte_level(use_regex=True)]),
    "smollm": PreTokenizer(
        _SMOLLM, [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]
    ),
    "llama-bpe": PreTokenizer(_LLAMA3, _split(_LLAMA3)),
    "qwen2": PreTokenizer(PATTERN, _split(PATTERN)),
}
_BY_PATTERN = {known.pattern: name for name, known in PRE_TOKENIZERS.items()}
_BY_PATTERN[r50k_pat_str] = "gpt-2"  # tiktoken's own way of writing it


def pre_tokenizer_of(vocabulary: Vocabulary) -> str:
    """llama.cpp's name of a vocabulary's pre-tokenizer; ValueError if only tiktoken can run it."""
    if vocabulary.pattern not in _BY_PATTERN:
        raise ValueError(
            f"the tokenizer {vocabulary.name} splits text as none of {', '.join(PRE_TOKENIZERS)} "
            "does, so no other tool could be given it; export a model with one of these."
        )
    return _BY_PATTERN[vocabulary.pattern]


def spelled(vocabulary: Vocabulary) -> dict[str, int]:
    """Id of every token, special ones included, spelled as in tokenizer.json and GGUF."""
    if form := vocabulary.sentencepiece:
        names = spell(vocabulary.tokens, form.byte_ids)
    else:
        names = {i: token_spelling(token) for i, token in enumerate(vocabulary.tokens) if token}
    return {name: i for i, name in names.items()} | vocabulary.special_tokens


class Merges(NamedTuple):
    """A list of merges as tokenizer.json and GGUF hold it."""

    pairs: list[tuple[str, str]]  # in order, bytes in GPT-2's spelling
    # a token that no merge makes, None if merges make all; it only occurs where a piece that is a
    # token is taken whole (`ignore_merges`)
    whole: bytes | None


def merges_of(vocabulary: Vocabulary) -> Merges:
    """The merge that makes each token; if some have none, all pairs that spell any token.

    tiktoken merges any neighbours that spell a token. If merges make every token, these are always
    the same two; otherwise they may vary, and the pairs are in the order of Llama 3's list.
    """
    ranks = {token: rank for rank, token in enumerate(vocabulary.tokens) if token}
    made = {token: _last_merge(token, ranks) for token in ranks if len(token) > 1}
    whole = next((token for token, pair in made.items() if pair is None), None)
    pairs = [pair for pair in made.values() if pair is not None]
    if whole is not None:
        by_first = partial(sorted, key=lambda cut: ranks[cut[0]])
        pairs = [cut for token in made for cut in by_first(cuts(token, ranks))]
    return Merges([(token_spelling(a), token_spelling(b)) for a, b in pairs], whole)


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts to which lower ranks merge a token; None if more parts are left."""
    rank, parts = ranks[token], [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= rank:
            return None
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    left, right = parts
    return (left, right) if left in ranks and right in ranks else None


def cuts(token: T, known: Container[T]) -> list[tuple[T, T]]:
    """All pairs of known tokens that spell a token."""
    pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [(left, right) for left, right in pairs if left in known and right in known]


def name_of_steps(pre_tokenizer: Any) -> str:
    """llama.cpp's name of a tokenizer.json's `pre_tokenizer`; ValueError for an unsupported one."""
    given = pre_tokenizer or {"type": "none"}
    steps = [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in given.get("pretokenizers", [given])
    ]
    for step in steps:
        if step["type"] == "ByteLevel":
            step.setdefault("use_regex", True)
    for name, known in PRE_TOKENIZERS.items():
        if steps == known.steps:
            return name
    described = ", ".join(" ".join(str(value) for value in step.values()) for step in steps)
    raise ValueError(
        f"its pre-tokenizer ({described}) is not supported; supported: {', '.join(PRE_TOKENIZERS)}."
    )


@dataclass(frozen=True)
class Special:
    """A tokenizer's special tokens and chat template, as published."""

    ids: Mapping[str, int]  # of all special tokens, by name
    eos: str | None  # the one that ends a text
    ends: tuple[str, ...]  # all that end generation, with or without `eos`
    bos: str | None  # the one that starts every text, if any
    bos_token: str | None  # the chat template's `bos_token`, whether or not it starts other texts
    chat_template: str | None  # Jinja source
    # those that belong to the text, such as `<think>`; other tools also find them in plain text,
    # here text never becomes one, so they have to be marks in angle brackets
    shown: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """Keyword arguments of `Vocabulary`.

        ValueError if one is not in `ids`, none ends a text, or one of `shown` may be plain text.
        """
        for name in self.shown:
            if not re.fullmatch(r"<\S+>", name):
                raise ValueError(
                    f"its tokenizer has {name!r}, added but neither special nor <a mark>."
                )
        if self.eos is None:
            raise ValueError("it names no token that ends a text (eos_token).")
        # kept only if it decides ids, so that other tokenizers' digests do not change
        is_written = self.bos_token != self.bos and "bos_token" in (self.chat_template or "")
        template_bos = self.bos_token if is_written else None
        for token in filter(None, (self.eos, *self.ends, self.bos, template_bos)):
            if token not in self.ids:
                raise ValueError(f"its token {token!r} is not among its special tokens.")
        return {
            "special_tokens": dict(sorted(self.ids.items(), key=lambda item: item[1])),
            "eos": self.eos,
            "more_ends": tuple(sorted({*self.ends} - {self.eos})),
            "bos": self.bos,
            "chat_template": self.chat_template,
            "template_bos": template_bos,
            "shown": tuple(sorted(self.shown)),
        }


def make_tokenizer(
    *,
    tokens: Mapping[str, int],
    merges: Sequence[str | Sequence[str]],
    special: Special,
    pre: str,
    whole_pieces: bool = False,
    nfc: bool = False,
) -> Tokenizer:
    """A tokenizer from the parts that tokenizer.json and GGUF share.

    Tokens are in GPT-2's spelling of bytes; special ones may be among them. `pre` is llama.cpp's
    name of the pre-tokenizer. With `whole_pieces` a piece that is a token is taken whole, so that
    some tokens need no merge; with `nfc` text is normalised first. ValueError for a vocabulary that
    tiktoken cannot run with the same ids.
    """
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"its pre-tokenizer {pre!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}."
        )
    fields, ordinary = special.fields(), ordinary_tokens(tokens, special)
    check_merges(ordinary, merges, whole_pieces=whole_pieces)
    return Tokenizer.of(
        Vocabulary(
            name=f"{pre}-{1 + max(tokens.values(), default=-1)}",
            pattern=PRE_TOKENIZERS[pre].pattern,
            tokens=by_id(ordinary, _spelled_bytes),
            nfc=nfc,
            **fields,
        )
    )


def _spelled_bytes(token: str) -> bytes:
    try:
        return token_bytes(token)
    except KeyError as error:
        raise ValueError(f"its token {token!r} is not a byte-level BPE token.") from error


def by_id(ordinary: Mapping[str, int], as_bytes: Callable[[str], bytes]) -> list[bytes]:
    """The bytes of tokens, indexed by id; empty for an id without a token."""
    tokens = [b""] * (1 + max(ordinary.values(), default=-1))
    for token, i in ordinary.items():
        tokens[i] = as_bytes(token)
    return tokens


def ordinary_tokens(tokens: Mapping[str, int], special: Special) -> dict[str, int]:
    """The tokens that are not special; ValueError if two share an id, or an id is out of range."""
    ordinary = {token: i for token, i in tokens.items() if token not in special.ids}
    ids = [*ordinary.values(), *special.ids.values()]
    if len(set(ids)) < len(ids):
        raise ValueError("its tokenizer gives an id to two tokens.")
    if ids and not 0 <= min(ids) <= max(ids) < _MAX_IDS:
        raise ValueError(f"its tokenizer has ids from {min(ids)} to {max(ids)}.")
    return ordinary


def check_merges(
    tokens: Mapping[str, int], merges: Sequence[str | Sequence[str]], *, whole_pieces: bool
) -> None:
    """Raises ValueError unless tiktoken, merging any pair that spells a token, gives the same ids.

    It does if ids rise along the list, and every token is what the list makes of its own text: the
    neighbours that tiktoken would merge into a token are then the pair that the list has for it.
    The same holds for the scores of a GGUF file, with ids in the order of scores.
    """
    made: dict[Pair, int] = {}
    halves: dict[int, Pair] = {}  # of every token that the list makes of its own text
    last = -1
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not {left, right, left + right} <= tokens.keys():
            raise ValueError(f"its merge of {left!r} and {right!r} has parts without an id.")
        pair, token = (tokens[left], tokens[right]), tokens[left + right]
        if token < last:
            raise ValueError("its merges are not in the order of its ids; tiktoken needs that.")
        last = made[pair] = token
        if token not in halves and _meet(*pair, token, made, halves):
            halves[token] = pair
    for text, i in tokens.items():
        is_made = len(text) == 1 or i in halves
        if not is_made and not (whole_pieces and _is_split(text, tokens, made)):
            raise ValueError(
                f"its token {text!r} is not what its merges make of that text, so tiktoken would "
                "give other ids."
            )


def _meet(
    left: int, right: int, limit: int, made: Mapping[Pair, int], halves: Mapping[int, Pair]
) -> bool:
    """Whether two tokens can become neighbours: no merge before `limit` crosses their border.

    The merges that made both are undone, the latest first, as in github.com/github/rust-gems, bpe.
    """
    while True:
        if made.get((left, right), limit) < limit:
            return False
        if left not in halves and right not in halves:
            return True
        if right not in halves or (left in halves and left > right):
            left, limit = halves[left][1], left
        else:  # of two equal tokens the left one is made first
            right, limit = halves[right][0], right + 1


def _is_split(token: str, tokens: Mapping[str, int], made: Mapping[Pair, int]) -> bool:
    """Whether all pairs of tokens that spell a token are merges, as tiktoken may use any one."""
    return all((tokens[a], tokens[b]) in made for a, b in cuts(token, tokens))
