"""Small models and vocabularies to export, and texts to compare tokenizers on."""

import os
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.files import cache_dir
from datamodules.tokenizer import Tokenizer, train_tokenizer
from pipeline.classifier import GPTClassifier
from pipeline.directories import Writers
from pipeline.gpt import GPT
from pipeline.models import Loaded, load
from pipeline.weights.vocabulary import PRE_TOKENIZERS

MakeGPT = Callable[..., GPT]
SMOLLM2 = "smollm2-135m-instruct"
N_ROWS = 384  # of the embedding: more than the vocabulary has
PROSE = (
    "The 3 quick brown foxes, 1024 of them, jumped over 27 dogs.\n\n### Instruction:\nIt's what "
    "they'd do: a_b(c)[12]  +=  0x1F;\n\tif x:\n        return  'yes'\n\n\n"
    "好的，你好。 Ünïcödé! 😀😀\r\n"
)
_TELLING = [b"12", b"123", b"1234", b" 1", b"  ", b"\n\n", b"   ", b".\n", b";\n", b"'S", b"(a"]
_ALPHABETS = (
    "abcdefgh THE the ",
    "0123456789 ",
    " \t\n\r  \u00a0\u3000",
    ".,;:!?'\"()[]{}<>|/\\_-+=*&^%$#@~`",
    "éüßñçøÅ你好世界こんにちは한국어",
    "😀🎉👩‍👩‍👧🏽 \u200b\u200d\x00\x07\x7f",
)


def vocabulary(pre: str = "qwen2", *, bos: str | None = None) -> Tokenizer:
    """A small vocabulary with that pre-tokenizer, its special tokens last.

    Some of its tokens lie within the pieces of one pre-tokenizer and across those of another.
    """
    trained = train_tokenizer([PROSE] * 9, vocab_size=340, min_frequency=2).vocabulary
    tokens = list(dict.fromkeys([*trained.tokens, *_TELLING]))
    specials = {name: len(tokens) + i for i, name in enumerate(trained.special_tokens)}
    pattern = PRE_TOKENIZERS[pre].pattern
    return Tokenizer.of(
        replace(trained, pattern=pattern, tokens=tokens, special_tokens=specials, bos=bos)
    )


def with_whole_pieces(pre: str) -> Tokenizer:
    """The same with words and parts of words among its tokens, most of which no merge makes."""
    known, draw = vocabulary(pre).vocabulary, random.Random(0)
    tokens, words = list(known.tokens), "".join(strings(300)).split()
    for word in draw.sample(words, 120):
        start = draw.randrange(3)
        token = draw.choice(("", " ")).encode() + word[start : start + 5].encode()
        if token.strip() and token not in tokens:
            tokens.insert(draw.randint(256, len(tokens)), token)
    specials = {name: len(tokens) + i for i, name in enumerate(known.special_tokens)}
    return Tokenizer.of(replace(known, tokens=tokens, special_tokens=specials))


def python_named(variable: str, has: str) -> str:
    """The Python that an environment variable names, which has other packages than this one."""
    if variable not in os.environ:
        pytest.skip(f"{variable} names no Python with {has}")
    return os.environ[variable]


def loaded(model: Any, tokenizer: Tokenizer, **meta: Any) -> Loaded:
    """As `models.load` gives it."""
    gpt = getattr(model, "gpt", model)
    facts = {"kind": "language_model", "gpt": asdict(gpt.config), "lora": None, "base": None}
    if isinstance(model, GPTClassifier):
        facts |= {"kind": "classifier", "label_names": ["ham", "spam", "odd"]}
        facts |= {"max_length": 20, "suffix": ""}
    return Loaded(model, tokenizer, {**facts, **meta}, Path("made-up"))


def write(writers: Writers, folder: Path) -> Path:
    """Writes all files into a new folder."""
    folder.mkdir(parents=True)
    for name, writer in writers.items():
        writer(folder / name)
    return folder


def classifier(gpt: GPT) -> GPTClassifier:
    """A head of three labels, where it has a bias one that decides."""
    torch.manual_seed(1)
    model = GPTClassifier(gpt, n_labels=3).eval()
    torch.nn.init.normal_(model.classifier.weight)
    if model.classifier.bias is not None:
        torch.nn.init.normal_(model.classifier.bias, std=3.0)
    return model


def smollm2() -> Loaded:
    """The real thing, from the user's cache; the test is skipped where it is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GPT_PIPELINE_CACHE", raising=False)
        if not any((cache_dir() / "weights" / SMOLLM2).glob("*.gguf")):
            pytest.skip(f"{SMOLLM2} is not in the cache; `import --source {SMOLLM2}` fetches it")
        return load(SMOLLM2)


def rows(n_rows: int = 3, n_tokens: int = 40, n_vocab: int = 300) -> Tensor:
    """Random ids (B, T)."""
    return torch.randint(n_vocab, (n_rows, n_tokens), generator=torch.Generator().manual_seed(0))


def strings(count: int) -> list[str]:
    """Texts of every kind: words, digits, blanks, code, scripts, emoji, control characters."""
    random_state = random.Random(0)
    texts = []
    for _ in range(count):
        pieces = []
        for _ in range(random_state.randint(1, 6)):
            alphabet, start = random_state.choice((None, *_ALPHABETS)), random_state.randint(0, 150)
            letters = random_state.choices(alphabet or " ", k=random_state.randint(1, 7))
            pieces.append("".join(letters) if alphabet else PROSE[start : start + 20])
        texts.append("".join(pieces))
    return texts
