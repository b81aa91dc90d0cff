"""Import and export of SentencePiece's BPE: tokenizer.json and GGUF.

A tokenizer.json has a list of merges. GGUF has a score per token, and any neighbours that spell a
token are merged, the best score first. Equality with `tokenizers`, transformers and llama.cpp is
shown in tests/test_sentencepiece.py.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from datamodules.sentencepiece import BLANK, BYTES, Prefix, SentencePiece, pattern_of
from datamodules.tokenizer import Tokenizer, Vocabulary
from pipeline.weights.vocabulary import Special, by_id, check_merges, cuts, ordinary_tokens, spelled

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
_PREPEND = {"type": "Prepend", "prepend": BLANK}
_METASPACE = {"type": "Metaspace", "replacement": BLANK, "split": False}
# normalizer and pre-tokenizer of a tokenizer.json
_STEPS: dict[Prefix, tuple[Any, Any]] = {
    "prepend": ({"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}, None),
    "always": (None, {**_METASPACE, "prepend_scheme": "always"}),
    "first": (None, {**_METASPACE, "prepend_scheme": "first"}),
    "never": (None, {**_METASPACE, "prepend_scheme": "never"}),
}


def prefix_of(content: Mapping[str, Any]) -> Prefix:
    """Where a tokenizer.json puts a space before text; ValueError for unsupported steps."""
    steps = (content.get("normalizer"), content.get("pre_tokenizer"))
    for prefix, known in _STEPS.items():
        if steps == known:
            normalised = [t["content"] for t in content["added_tokens"] if t.get("normalized")]
            if normalised and prefix == "prepend":
                raise ValueError(f"its special token {normalised[0]!r} is normalised as text is.")
            return prefix
    described = " and ".join(str(step) for step in steps if step) or "none"
    raise ValueError(
        f"its normalizer and pre-tokenizer, beside byte fallback, are not supported ({described}); "
        "supported: Llama 2's (Prepend and Replace), and Metaspace that does not split."
    )


def tokenizer_json_parts(vocabulary: Vocabulary, form: SentencePiece) -> dict[str, Any]:
    """The steps and merges of a tokenizer.json."""
    names = {i: name for name, i in spelled(vocabulary).items()}
    normalizer, pre_tokenizer = _STEPS[form.prefix]
    back = {"type": "Replace", "pattern": {"String": BLANK}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if form.prefix != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "ignore_merges": False,
        "merges": [(names[left], names[right]) for left, right in form.merges],
    }


def make_sentencepiece(
    *,
    tokens: Mapping[str, int],
    merges: Sequence[str | Sequence[str]],
    special: Special,
    prefix: Prefix,
) -> Tokenizer:
    """A tokenizer from the parts of a tokenizer.json; for GGUF's, see `merges_of_scores`.

    Tokens have spaces written as ▁; special ones may be among them. ValueError if a byte has no
    token, or a token or merge cannot be part of text.
    """
    fields, ordinary = special.fields(), ordinary_tokens(tokens, special)
    if missing := [name for name in BYTES if name not in ordinary]:
        raise ValueError(f"its tokenizer has no token {missing[0]}; byte fallback needs them all.")
    if odd := [name for name in ordinary if " " in name or not name]:
        raise ValueError(f"its token {odd[0]!r} is none of SentencePiece's.")
    by_name = {name: bytes([byte]) for byte, name in enumerate(BYTES)}
    texts = {name: i for name, i in ordinary.items() if name not in by_name}
    pairs = []
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not {left, right, left + right} <= texts.keys():
            raise ValueError(f"its merge of {left!r} and {right!r} has parts that are not text.")
        pairs.append((texts[left], texts[right]))
    return Tokenizer.of(
        Vocabulary(
            name=f"sentencepiece-{1 + max(tokens.values())}",
            pattern=pattern_of(list(texts)),
            tokens=by_id(
                ordinary, lambda name: by_name.get(name) or name.replace(BLANK, " ").encode()
            ),
            sentencepiece=SentencePiece(pairs, [ordinary[name] for name in BYTES], prefix),
            **fields,
        )
    )


def merges_of_scores(tokens: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The list of merges that gives the same ids as scores, converted as in transformers 4.

    Of pairs with equal scores the leftmost is merged first, which a list cannot express, except for
    runs of spaces, which share a score in Llama 2 and Mistral: they grow from the left, so that the
    longest pair comes next. ValueError if no list gives the same ids.

    Args:
        tokens: id of every ordinary token, except those of bytes.
        scores: one per id.
    """
    _check_characters(tokens)
    pairs = [pair for token in tokens for pair in cuts(token, tokens)]
    score = {pair: scores[tokens["".join(pair)]] for pair in pairs}
    pairs.sort(key=lambda pair: (-score[pair], _longest_first(pair)))
    for a, b in pairwise(pairs):
        is_one = "".join(a) == "".join(b) or (_is_blank(a) and _is_blank(b))
        if score[a] == score[b] and not is_one:
            raise ValueError(
                f"its tokens {''.join(a)!r} and {''.join(b)!r} have the same score, so that no "
                "list of merges gives llama.cpp's ids; import the model's Hugging Face directory."
            )
    return pairs


def scores_of(vocabulary: Vocabulary, form: SentencePiece) -> dict[str, float]:
    """Score of every token that merges make; ValueError if no scores give the same ids."""
    ids = spelled(vocabulary)
    names = {i: name for name, i in ids.items()}
    merges = [(names[left], names[right]) for left, right in form.merges]
    blanks = [pair for pair in merges if _is_blank(pair)]
    are_one = blanks == sorted(blanks, key=_longest_first)  # see `merges_of_scores`
    scored = {m: BLANK if are_one and _is_blank(m) else "".join(m) for m in merges}
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(scored.values()))}
    rank = {pair: ranks[token] for pair, token in scored.items()}
    by_token = sorted(merges, key=lambda pair: (rank[pair], len("".join(pair))))
    place = {token: i for i, token in enumerate(dict.fromkeys(map("".join, by_token)))}
    try:
        if sorted(merges, key=rank.__getitem__) != merges:
            raise ValueError("its merges of one token have merges of another between them.")
        _check_characters({name: i for name, i in ids.items() if name not in BYTES})
        known = {name: place.get(name, -1 - i) for name, i in ids.items()}
        check_merges(known, by_token, whole_pieces=True)
    except ValueError as error:
        raise ValueError(
            f"the tokenizer {vocabulary.name} has merges that no scores stand for, so that "
            "llama.cpp would give other ids; export it with --format huggingface."
        ) from error
    return {"".join(pair): -float(rank[pair]) for pair in merges}


def _longest_first(pair: tuple[str, str]) -> tuple[int, int]:
    return -len(pair[0]), -len(pair[1])


def _is_blank(pair: tuple[str, str]) -> bool:
    return not "".join(pair).strip(BLANK)


def _check_characters(tokens: Mapping[str, int]) -> None:
    """Raises ValueError for a token that no list of merges can make, though scores can."""
    for token in tokens:
        if not set(token) <= tokens.keys():
            raise ValueError(f"its token {token!r} has a character that is not a token.")
