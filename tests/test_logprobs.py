"""Log-probabilities are the model's own for every token, whatever else is generated."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.tokenizer import ENDOFTEXT, Tokenizer
from pipeline.decoding import logprobs
from pipeline.decoding.generate import Batch, Row
from pipeline.decoding.logprobs import TokenLogprob
from pipeline.decoding.packed import pack
from pipeline.decoding.prefix_cache import PrefixCache
from pipeline.decoding.sampling import Sampling
from pipeline.gpt import GPT
from pipeline.serving.engine import Piece
from pipeline.serving.logprob_formats import TokenText, TokenTexts, chat_form, text_form
from pipeline.serving.protocol import CompletionRequest
from pipeline.serving.writer import ChoiceText, Writer
from tests.exporting import loaded, vocabulary
from tests.sentencepieces import of_others, sentencepiece

MakeGPT = Callable[..., GPT]
PROMPTS = [[5, 6, 7, 11, 3, 9, 2], [5, 6, 7, 30], [40, 5]]
N_NEW, N_VOCAB = 5, 60


@pytest.fixture(params=["gpt2", "llama", "packed"])
def model(request: pytest.FixtureRequest, tiny_gpt: MakeGPT) -> GPT:
    packed = request.param == "packed"
    model = pack(tiny_gpt("llama")) if packed else tiny_gpt(request.param)
    model.n_tokens = N_VOCAB
    return model


@torch.inference_mode()
def expected(model: GPT, ids: list[int]) -> Tensor:
    """Log-probabilities (T - 1, V) of what may follow each token but the last."""
    logits = model.head(model(torch.tensor([ids[:-1]])))[0].float()
    return logits[:, :N_VOCAB].log_softmax(dim=-1)


def check(model: GPT, ids: list[int], found: list[TokenLogprob], n_likeliest: int) -> None:
    """Of the last tokens of ids."""
    every = expected(model, ids)[-len(found) :]
    assert [one.token for one in found] == ids[-len(found) :]
    for one, row in zip(found, every, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-5)
        best = row.topk(n_likeliest)
        assert [token for token, _ in one.likeliest] == best.indices.tolist()
        likeliest = [value for _, value in one.likeliest]
        assert likeliest == pytest.approx(best.values.tolist(), abs=1e-5)


def written(batch: Batch, rows: list[Row]) -> list[list[TokenLogprob]]:
    """All that is reported of rows until they end."""
    found = [[*row.logprobs] for row in rows]
    while batch.rows:
        for row in batch.step():
            if row in rows:
                found[rows.index(row)] += row.logprobs
    return found


def test_of_what_is_written(model: GPT) -> None:
    """Of the model's distribution, however tokens are drawn from it."""
    settings = [
        Sampling(N_NEW, n_likeliest=3),
        Sampling(N_NEW, temperature=1.5, top_k=9, seed=4, n_likeliest=0),
        Sampling(N_NEW),
    ]
    batch = Batch(model)
    rows = batch.join(PROMPTS, settings)
    found = written(batch, rows)
    check(model, rows[0].ids, found[0], 3)
    check(model, rows[1].ids, found[1], 0)
    assert [len(of_row) for of_row in found] == [N_NEW, N_NEW, 0]


@pytest.mark.parametrize("places", [2, 64])
def test_of_the_prompt_too(model: GPT, places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces; where others begin alike, or have, and where two ask for the same."""
    monkeypatch.setattr(logprobs, "PLACES_AT_A_TIME", places)
    batch = Batch(model, PrefixCache(4))
    batch.join([PROMPTS[0]], [Sampling(1)])  # is known then
    told, untold = Sampling(N_NEW, n_likeliest=2, echo=True), Sampling(N_NEW)
    going = batch.join([PROMPTS[1]], [untold])
    rows = batch.join([*PROMPTS, PROMPTS[0]], [told, told, untold, told])
    found = written(batch, rows)
    for i in (0, 1, 3):
        first, *others = found[i]
        assert first == TokenLogprob(rows[i].ids[0], None, [])
        assert len(others) == len(rows[i].ids) - 1
        check(model, rows[i].ids, others, 2)
    assert found[2] == []
    assert going[0].ids == rows[1].ids, "with the same settings but for what is told"
    assert [row.n_cached for row in rows[:2]] == [0, 0]


def test_of_a_stop_token(model: GPT) -> None:
    batch = Batch(model)
    (row,) = batch.join([PROMPTS[0]], [Sampling(N_NEW)])
    stops = frozenset({row.ids[-1]})
    (row,) = Batch(model).join([PROMPTS[0]], [Sampling(N_NEW, stop_ids=stops, n_likeliest=1)])
    assert (row.token, row.ended) == (None, "stop")
    check(model, [*PROMPTS[0], *stops], row.logprobs, 1)


def test_no_more_than_there_are(model: GPT) -> None:
    (row,) = Batch(model).join([PROMPTS[0]], [Sampling(1, n_likeliest=1000)])
    assert len(row.logprobs[0].likeliest) == N_VOCAB


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_likeliest": -1}, "n_likeliest is -1; give 0 or more, or null"),
        ({"echo": True}, "echo reports the prompt, but n_likeliest is null"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(1, **settings)


def test_half_characters_have_names_of_their_own() -> None:
    tokenizer = vocabulary()
    ids = [tokenizer.encode("a")[0], *(tokenizer.encode(chr(0x1D11E)))]  # of single bytes
    assert len(ids) == 5
    texts = TokenTexts(tokenizer, ())
    likeliest = [(ids[1], -0.5), (ids[2], -1.5)]
    told = [texts.add(TokenLogprob(token, -1.0, likeliest)) for token in (*ids, ids[0])]
    assert b"".join(one.piece for one in told).decode() == "a\U0001d11ea"
    assert [one.offset for one in told] == [0, 1, 1, 1, 1, 2]
    form = text_form(told)
    assert form["tokens"][:3] == ["a", r"bytes:\xf0", r"bytes:\x9d"]
    assert form["top_logprobs"][0] == {r"bytes:\xf0": -0.5, r"bytes:\x9d": -1.5, "a": -1.0}
    assert form["top_logprobs"][1] == {r"bytes:\xf0": -0.5, r"bytes:\x9d": -1.5}
    said = chat_form(told)["content"]
    assert (said[1]["token"], said[1]["bytes"]) == ("\ufffd", [0xF0])
    assert [other["bytes"] for other in said[0]["top_logprobs"]] == [[0xF0], [0x9D]]
    json.dumps([form, said])


def test_a_texts_first_token_has_none() -> None:
    tokenizer = vocabulary(bos=ENDOFTEXT)
    texts = TokenTexts(tokenizer, ())
    ids = [*tokenizer.bos_ids, *tokenizer.encode("The 3")]
    told = [
        texts.add(TokenLogprob(token, None if i == 0 else -1.0, [])) for i, token in enumerate(ids)
    ]
    assert told[0] == TokenText(ENDOFTEXT.encode(), 0, None, [])
    form = text_form(told)
    assert (form["token_logprobs"][0], form["top_logprobs"][0]) == (None, None)
    assert form["text_offset"][:2] == [0, 0], "BOS is not text"


def test_a_prompt_is_said_again_as_it_was(tmp_path: Path) -> None:
    """Without the BOS and the blank that a tokenizer puts before it; ids may be without BOS."""
    tokenizer = of_others(sentencepiece("prepend"), tmp_path)
    (bos,), ids = tokenizer.bos_ids, tokenizer.encode("the lamb")
    new = tokenizer.encode(" 12", ids)
    for prompt in ([bos, *ids], ids):
        asked = CompletionRequest(model="it", prompt=[prompt], echo=True, logprobs=0)
        text = ChoiceText(tokenizer, prompt, asked)
        told = [TokenLogprob(token, -1.0, []) for token in [*prompt, new[0]]]
        deltas = [text.read(0, Piece(new[0], None, logprobs=told))]
        deltas += [text.read(0, Piece(token, None)) for token in new[1:]]
        assert "".join(delta.text for delta in deltas) == "the lamb 12"
        pieces = [one.piece for one in deltas[0].tokens if one.piece != b"<s>"]
        assert b"".join(pieces) == b"the lamb" + tokenizer.decode_bytes(new[:1], ids)
        assert deltas[0].tokens[-1].offset == len("the lamb")


@pytest.mark.parametrize("form", ["first", "always"])
def test_bos_is_nothing_that_a_text_follows(tmp_path: Path, form: str) -> None:
    """Some put a blank before a text's first token alone."""
    tokenizer = of_others(sentencepiece(form), tmp_path)
    texts, ids = TokenTexts(tokenizer, ()), tokenizer.encode("the lamb")
    told = [texts.add(TokenLogprob(token, -1.0, [])) for token in (*tokenizer.bos_ids, *ids)]
    assert b"".join(one.piece for one in told[1:]) == b"the lamb"
    assert [one.offset for one in told[:2]] == [0, 0]
    bos = texts.add(TokenLogprob(tokenizer.bos_ids[0], -1.0, []))
    after = texts.add(TokenLogprob(ids[0], -1.0, []))
    assert after.offset - bos.offset == len("<s>"), "within a text it is text"


@pytest.fixture
def lacking() -> tuple[Tokenizer, int]:
    """A tokenizer without a byte, and the id that nothing has instead."""
    known = vocabulary().vocabulary
    hole = known.tokens.index(b"\x04")
    tokens = [b"" if i == hole else token for i, token in enumerate(known.tokens)]
    return Tokenizer.of(replace(known, tokens=tokens)), hole


def test_ids_that_are_no_tokens_are_refused(
    tiny_gpt: MakeGPT, lacking: tuple[Tokenizer, int]
) -> None:
    """The model has no row for the first, and what the second stands for nobody knows."""
    tokenizer, hole = lacking
    model = loaded(tiny_gpt("llama", vocab_size=tokenizer.n_vocab), tokenizer)
    writer = Writer(model, None, Sampling(4, 0.0))  # type: ignore[arg-type]
    for ids in ([tokenizer.n_vocab], [5, hole], [5, tokenizer.n_vocab + 9]):
        with pytest.raises(ValueError, match=f"not among the {tokenizer.n_vocab} tokens"):
            writer.prompts(CompletionRequest(model="it", prompt=[ids]))
    last = tokenizer.n_vocab - 1
    assert writer.prompts(CompletionRequest(model="it", prompt=[[5, last]])) == [[5, last]]


def test_an_id_that_is_no_token_may_be_likely(lacking: tuple[Tokenizer, int]) -> None:
    tokenizer, hole = lacking
    told = TokenTexts(tokenizer, ()).add(TokenLogprob(5, -1.0, [(hole, -0.5)]))
    assert told.likeliest == [(b"", -0.5)]
