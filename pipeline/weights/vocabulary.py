"""Byte-level BPE of others as a tokenizer of ours, with the same ids for the same text.

tiktoken merges by rank, others by a list of merges: where the list makes tokens in the order of
their ids both give the same ids, and where it does not the vocabulary is refused. Equality with
`tokenizers` is shown in tests/test_weights_tokenizers.py; of the way out, where the list is made
from the ranks, in tests/test_export_tokenizers.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tiktoken_ext.openai_public import r50k_pat_str

from datamodules.tokenizer import PATTERN, Tokenizer, Vocabulary, token_bytes, token_spelling

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# as GPT-2's, but digits are cut out first: so blanks before a digit stay together, unlike before
# a word, which takes the last of them
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
    """How text is cut into pieces before merges: tiktoken's pattern, and tokenizer.json's steps."""

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
    """llama.cpp's name of a vocabulary's pre-tokenizer.

    Raises:
        ValueError: where it is one that only tiktoken can run.
    """
    if vocabulary.pattern not in _BY_PATTERN:
        raise ValueError(
            f"the tokenizer {vocabulary.name} splits text as none of {', '.join(PRE_TOKENIZERS)} "
            "does, so no other tool could be given it; export a model with one of these."
        )
    return _BY_PATTERN[vocabulary.pattern]


def spelled(vocabulary: Vocabulary) -> dict[str, int]:
    """Id of every token that has one, special ones included, in GPT-2's spelling of bytes."""
    ordinary = {token_spelling(token): i for i, token in enumerate(vocabulary.tokens) if token}
    return ordinary | vocabulary.special_tokens


def merges_of(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges that make each token, in order: what is left of it without its own rank.

    Raises:
        ValueError: for a token that merges cannot make.
    """
    ranks = {token: rank for rank, token in enumerate(vocabulary.tokens) if token}
    merges = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            lowest = min(pairs)
            if lowest >= rank:
                raise ValueError(
                    f"the tokenizer {vocabulary.name} has a token {token!r} that no merge makes, "
                    "so other tools would give other ids."
                )
            i = pairs.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((token_spelling(parts[0]), token_spelling(parts[1])))
    return merges


def name_of_steps(pre_tokenizer: Any) -> str:
    """llama.cpp's name of what stands under `pre_tokenizer` in a tokenizer.json.

    Raises:
        ValueError: naming the steps that are not supported.
    """
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
        f"its pre-tokenizer ({described}) is not supported; there are {', '.join(PRE_TOKENIZERS)}."
    )


def make_tokenizer(
    *,
    tokens: Mapping[str, int],
    merges: Sequence[str] | Sequence[Sequence[str]],
    special_tokens: Mapping[str, int],
    pre: str,
    eos: str | None,
    bos: str | None,
    chat_template: str | None,
) -> Tokenizer:
    """A tokenizer from the parts that tokenizer.json and GGUF both have.

    Args:
        tokens: id of every token, in GPT-2's spelling of bytes; special ones may be among them.
        merges: pairs, in their order.
        special_tokens: id of each.
        pre: llama.cpp's name of the pre-tokenizer.
        eos: special token that ends a text.
        bos: special token that stands before every text, if any.
        chat_template: Jinja source.

    Raises:
        ValueError: for a vocabulary that tiktoken cannot run with the same ids.
    """
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"its pre-tokenizer {pre!r} is not supported; there are {', '.join(PRE_TOKENIZERS)}."
        )
    for token in filter(None, (eos, bos)):
        if token not in special_tokens:
            raise ValueError(f"its token {token!r} is not among its special tokens.")
    if eos is None:
        raise ValueError("it names no token that ends a text (eos_token).")
    ordinary = {token: i for token, i in tokens.items() if token not in special_tokens}
    _check_merges(ordinary, merges)
    by_id = [b""] * (1 + max(ordinary.values()))
    for token, i in ordinary.items():
        try:
            by_id[i] = token_bytes(token)
        except KeyError as error:
            raise ValueError(f"its token {token!r} is no byte-level BPE token.") from error
    return Tokenizer.of(
        Vocabulary(
            name=f"{pre}-{1 + max(tokens.values())}",
            pattern=PRE_TOKENIZERS[pre].pattern,
            tokens=by_id,
            special_tokens=dict(sorted(special_tokens.items(), key=lambda item: item[1])),
            eos=eos,
            bos=bos,
            chat_template=chat_template,
        )
    )


def _check_merges(
    tokens: Mapping[str, int], merges: Sequence[str] | Sequence[Sequence[str]]
) -> None:
    """ValueError unless the merges make every token of more than a byte, in the order of ids."""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    made = ["".join(pair) for pair in pairs]
    known = [tokens[token] for token in made if token in tokens]
    if len(known) < len(made):
        unknown = next(token for token in made if token not in tokens)
        raise ValueError(f"its merges make {unknown!r}, which has no id.")
    if known != sorted(set(known)):
        raise ValueError("its merges are not in the order of its ids, so tiktoken cannot run it.")
    unmade = {token for token in tokens if len(token) > 1} - set(made)
    if unmade:
        raise ValueError(
            f"{len(unmade)} of its tokens, such as {min(unmade)!r}, are made by no merge, so "
            "tiktoken would give other ids."
        )
