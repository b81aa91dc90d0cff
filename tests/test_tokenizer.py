import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from datamodules import tokenizer as trained
from datamodules.sentencepiece import SentencePiece
from datamodules.tokenizer import (
    CHAT_MARKERS,
    ENDOFTEXT,
    Tokenizer,
    Vocabulary,
    train_tokenizer,
)

TEXTS = [
    "the lower the slower, the lowest is the slowest of the low. " * 20,
    "低い 👍 low\r\n\t low",
]
SMALLEST = 256 + 7 + 1
HARD_TEXTS = [
    "",
    "中文分词没有空格，标点也不同。",
    "👩‍👩‍👧 e\u0301 \u200d \ufeff",
    "".join(map(chr, range(0x20))) + "\x7f\x85\u2028",
    "हिन्दी ไทย עברית العربية",
    "\r\n\r\n \t  x   \n",
    ENDOFTEXT + "".join(CHAT_MARKERS),
]


def train(vocab_size: int = 280, min_frequency: int = 2, texts: list[str] = TEXTS) -> Tokenizer:
    return train_tokenizer(texts, vocab_size=vocab_size, min_frequency=min_frequency)


TOKENIZER = train()


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode_bytes(ids) == text.encode()
    assert not set(ids) & set(TOKENIZER.special_ids.values())


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_round_trip_before_and_after_saving(text: str, tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.encode(text) == TOKENIZER.encode(text)


def test_millions_of_blanks_do_not_overflow_the_engine() -> None:
    text = "a" + " " * 2_500_000
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_a_vocabulary_has_all_bytes_then_merges_then_specials() -> None:
    specials = (ENDOFTEXT, *CHAT_MARKERS)
    assert TOKENIZER.n_vocab == 280
    assert [TOKENIZER.decode_bytes([i]) for i in range(256)] == [bytes([i]) for i in range(256)]
    merged = [TOKENIZER.decode_bytes([i]) for i in range(256, 280 - len(specials))]
    assert all(len(token) > 1 for token in merged)
    assert len(set(merged)) == len(merged)
    assert TOKENIZER.special_ids == {name: 273 + i for i, name in enumerate(specials)}
    assert TOKENIZER.eos_id == 273
    for i, token in enumerate(merged):
        parts = {bytes([byte]) for byte in range(256)} | set(merged[:i])
        assert any({token[:cut], token[cut:]} <= parts for cut in range(1, len(token)))
    assert {b" low", b" the"} <= set(merged)


def test_the_most_frequent_pair_is_merged_first() -> None:
    tokenizer = train(SMALLEST, texts=["abab ab cd"])
    assert tokenizer.decode_bytes([256]) == b"ab"
    assert tokenizer.encode("abc") == [256, ord("c")]


def test_rare_pairs_are_not_merged() -> None:
    assert train(300, 2, ["xy qz"]).n_vocab == 256 + 7
    assert train(300, 1, ["xy qz"]).encode("xy")[0] >= 256


def test_a_small_text_gives_a_smaller_vocabulary() -> None:
    tokenizer = train(50_000)
    assert 280 < tokenizer.n_vocab < 300
    assert tokenizer.name == f"bpe-{tokenizer.n_vocab}"


def test_training_is_deterministic() -> None:
    assert train() == TOKENIZER
    assert train().digest == TOKENIZER.digest
    assert train(279).digest != TOKENIZER.digest


def test_a_file_has_the_same_bytes_in_every_version(tmp_path: Path) -> None:
    """A finished run whose tokenizer is another file is done anew."""
    sentencepiece = SentencePiece([], [], "never")
    changes = {"bos": "<|end|>", "chat_template": "x", "template_bos": "<|end|>", "nfc": True}
    changes |= {"more_ends": ("<|end|>",), "shown": ("<|end|>",), "eos": "<|im_end|>"}
    optional = ["eos", "bos", "chat_template", "template_bos", "more_ends"]
    optional += ["sentencepiece", "shown", "nfc"]
    whole = replace(TOKENIZER.vocabulary, sentencepiece=sentencepiece, **changes)  # type: ignore
    required = ["format", "name", "pattern", "special_tokens", "tokens"]
    assert [*whole.content()] == [*required, *optional]
    TOKENIZER.save(tmp_path)
    assert [*json.loads((tmp_path / "tokenizer.json").read_text())] == [*required, "digest"]


@pytest.mark.parametrize(
    ("vocab_size", "min_frequency", "message"),
    [
        (SMALLEST - 1, 2, r"vocab_size is 263.*raise vocab_size to 264"),
        (300, 0, r"min_frequency is 0; give at least 1"),
    ],
)
def test_impossible_training_is_refused(vocab_size: int, min_frequency: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(vocab_size, min_frequency)


def test_lengths_are_those_of_the_bytes() -> None:
    ids = TOKENIZER.encode(TEXTS[1])
    lengths = TOKENIZER.lengths()
    assert [lengths[i] for i in ids] == [len(TOKENIZER.decode_bytes([i])) for i in ids]
    assert lengths[TOKENIZER.eos_id] == 0


def test_a_character_cut_in_two_decodes_to_a_replacement() -> None:
    assert TOKENIZER.decode([0xE4, 0xBD]) == "\ufffd"


def test_an_unknown_id_is_an_error() -> None:
    with pytest.raises(KeyError):
        TOKENIZER.decode([TOKENIZER.n_vocab])


def test_a_file_is_rebuilt_with_the_same_digest(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "own.json")
    assert [path.name for path in tmp_path.iterdir()] == ["own.json"]
    loaded = Tokenizer.load(str(tmp_path / "own.json"))
    assert (loaded.name, loaded.digest) == (TOKENIZER.name, TOKENIZER.digest)
    assert loaded.special_ids == TOKENIZER.special_ids


def test_digests_do_not_change() -> None:
    """Those of files that there are: checkpoints are read, and found equal, by them."""
    vocabulary = Vocabulary("bytes", r"\S+|\s+", [bytes([i]) for i in range(256)], {ENDOFTEXT: 256})
    digest = "053d480f780b88f3d0ec99cb7fc909c397cae8f55cf07a407a74cf803dab0143"
    assert Tokenizer.of(vocabulary).digest == digest
    other = replace(vocabulary, bos="<end>", eos="<end>", special_tokens={"<end>": 256})
    digest = "42bdb821653c2f6c644d3df541c43f64bcb086bfc96530a49c2ddeea55d19be4"
    assert Tokenizer.of(replace(other, chat_template="{{ bos_token }}")).digest == digest


def _swap_tokens(content: dict[str, list[str]]) -> None:
    tokens = content["tokens"]
    tokens[256], tokens[257] = tokens[257], tokens[256]


def _cut_tokens(content: dict[str, list[str]]) -> None:
    content["tokens"].pop()


@pytest.mark.parametrize("damage", [_swap_tokens, _cut_tokens])
def test_a_damaged_file_is_refused(damage: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"type": "BPE"}}', b"\xff"])
def test_another_file_is_refused(content: str | bytes, write: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="no tokenizer of this project"):
        Tokenizer.load(write("tokenizer.json", content))


@pytest.mark.parametrize("source", ["gtp2", "nowhere/tokenizer.json", "."])
def test_a_missing_tokenizer_names_what_there_is(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"does not exist; give .*gpt2"):
        Tokenizer.load(source)


def test_a_vocabulary_that_cannot_be_fetched_names_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    with pytest.raises(ValueError, match=r"'gpt2' is not on this machine.*TIKTOKEN_CACHE_DIR"):
        Tokenizer.load("gpt2")


def test_gpt2_equals_tiktoken(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(real_data / "tiktoken_cache"))
    gpt2, reference = Tokenizer.load("gpt2"), tiktoken.get_encoding("gpt2")
    verdict = (real_data / "pretraining/the-verdict.txt").read_text()
    gpt2.save(tmp_path)
    for tokenizer in (gpt2, Tokenizer.load(tmp_path)):
        assert (tokenizer.n_vocab, tokenizer.eos_id) == (50257, 50256)
        assert tokenizer.special_ids == {ENDOFTEXT: 50256}
        assert tokenizer.digest == gpt2.digest
        assert len(tokenizer.encode(verdict)) == 5145  # as in the book, chapter 2
        for text in [verdict, *HARD_TEXTS]:
            assert tokenizer.encode(text) == reference.encode(text, disallowed_special=())


def test_a_long_text_is_learned_from_in_parts_as_from_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trainer holds hundreds of what it is given, at twenty times its size."""
    line = "def f(x):\r\n    return 'a  b'\n\n \n\tdon't, 2026!\nÜber 我爱\u2003\n...\n"
    text = "".join(line.replace("f", word) for word in ["alpha", "beta", "gamma", "delta"]) * 50
    monkeypatch.setattr(trained, "_TRAINED_AT_ONCE", 40)
    parts = list(trained._lines(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) < 120
    small = train_tokenizer([text], vocab_size=400, min_frequency=1)
    monkeypatch.setattr(trained, "_TRAINED_AT_ONCE", len(text))
    assert small.digest == train_tokenizer([text], vocab_size=400, min_frequency=1).digest
