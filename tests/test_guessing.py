"""Guessed tokens save decoding steps and change no text."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from pipeline.decoding.generate import Batch, generate
from pipeline.decoding.guessing import MAX_GUESSES, guess
from pipeline.decoding.logprobs import TokenLogprob
from pipeline.decoding.packed import pack
from pipeline.decoding.prefix_cache import PrefixCache
from pipeline.decoding.sampling import Sampling
from pipeline.gpt import GPT
from tests.machine import needs_bf16_of_one_kernel, needs_f16_products
from tests.test_prefix_cache import computed

MakeGPT = Callable[..., GPT]
GUESS = "pipeline.decoding.generate.guess"
PROMPT = [5, 6, 7, 5, 6]
GREEDY = Sampling(max_new_tokens=40)
DRAWN = replace(GREEDY, temperature=1.5, top_k=30, seed=3)
TOLD = replace(DRAWN, n_likeliest=3)


@pytest.fixture(
    params=[
        "gpt2",
        "llama",
        "packed",
        pytest.param("bf16", marks=needs_bf16_of_one_kernel),
        pytest.param("f16", marks=needs_f16_products),
    ]
)
def model(request: pytest.FixtureRequest, tiny_gpt: MakeGPT) -> GPT:
    family = request.param if request.param in ("gpt2", "llama") else "llama"
    gpt = tiny_gpt(family, block_size=96)
    if request.param == family:
        return gpt
    return pack(gpt.bfloat16() if request.param == "bf16" else gpt, in_f16=request.param == "f16")


class Oracle:
    """Guesses what will come, or what will not, at random.

    Args:
        texts: whole texts, of which `guess` sees beginnings.
    """

    def __init__(self, texts: Sequence[Sequence[int]], share_right: float = 0.8) -> None:
        self.texts, self.share_right, self.draw = texts, share_right, random.Random(0)

    def __call__(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        assert max_tokens >= 0
        n = self.draw.randint(0, min(max_tokens, MAX_GUESSES))
        (text,) = {tuple(text) for text in self.texts if [*text[: len(ids)]] == [*ids]}
        assert len(ids) + max_tokens < len(text), "a guess that nothing can come of"
        right = [*text[len(ids) : len(ids) + n]]
        return [t if self.draw.random() < self.share_right else t ^ 1 for t in right]


def written(
    model: GPT, prompt: Sequence[int], settings: Sampling
) -> tuple[list[int], list[list[TokenLogprob]]]:
    """A whole text, and what is told of each of its new tokens."""
    batch = Batch(model)
    (row,) = batch.join([prompt], [settings])
    told = [row.logprobs]
    while batch.rows:
        batch.step()
        told.append(row.logprobs)
    return row.ids, told


def plain(
    monkeypatch: pytest.MonkeyPatch, model: GPT, prompt: Sequence[int], settings: Sampling
) -> tuple[list[int], list[list[TokenLogprob]]]:
    """The same without guesses."""
    with monkeypatch.context() as without:
        without.setattr(GUESS, lambda *_: [])
        return written(model, prompt, settings)


def test_a_guess_is_what_came_last_time() -> None:
    assert guess([1, 2, 3, 4, 1, 2], 9) == [3, 4, 1, 2]
    assert guess([1, 2, 3, 1, 2, 4, 1, 2], 2) == [4, 1]
    assert (
        guess([1, 2, 3, 4, 5, 6, 7, 1, 2], 9) == [3, 4, 5, 6] == guess([1, 2, 3, 4, 5, 6, 1, 2], 9)
    )
    assert guess([7, 7, 7], 9) == [7]
    assert guess([2, 1, 2, 3], 9) == guess([3, 1, 2, 1, 1], 9) == guess([1, 1], 9) == []
    assert guess([], 9) == guess([1], 9) == guess([1, 2, 3, 1, 2], 0) == []
    assert guess([1, 2, 3, 1, 2], -1) == []


@pytest.mark.parametrize("settings", [GREEDY, DRAWN, TOLD])
def test_guesses_change_no_text(
    model: GPT, settings: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, expected_told = plain(monkeypatch, model, PROMPT, settings)
    assert len(expected) == len(PROMPT) + 40
    for share_right in (1.0, 0.7, 0.0):
        monkeypatch.setattr(GUESS, Oracle([expected], share_right))
        with computed(model) as passes:
            ids, told = written(model, PROMPT, settings)
        assert ids == expected
        n_steps = len(passes) - 1
        assert n_steps <= 20 if share_right == 1.0 else n_steps <= 39
        assert (n_steps == 39) == (share_right == 0.0)
        for one, other in zip(told, expected_told, strict=True):
            assert [t.token for t in one] == [t.token for t in other]
            assert [t.logprob for t in one] == pytest.approx([t.logprob for t in other], abs=1e-3)


def test_what_repeats_itself_is_written_in_fewer_steps(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what came before alone: draws of the two likeliest come back to the same."""
    settings = Sampling(max_new_tokens=60, temperature=0.05, top_k=2)
    expected, _ = plain(monkeypatch, model, PROMPT, settings)
    assert len(set(expected)) < len(expected) - 10
    with computed(model) as passes:
        (new,) = generate(model, [PROMPT], settings)
    assert PROMPT + new == expected
    assert len(passes) < len(new)


@pytest.mark.parametrize("n_new", [1, 2, 3, 7])
def test_guesses_end_where_the_text_does(
    model: GPT, n_new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(GREEDY, max_new_tokens=n_new)
    expected = plain(monkeypatch, model, PROMPT, GREEDY)[0]
    monkeypatch.setattr(GUESS, Oracle([expected[: len(PROMPT) + n_new]], 1.0))
    assert generate(model, [PROMPT], settings) == [expected[5 : 5 + n_new]]
    stop = replace(GREEDY, stop_ids=frozenset({expected[9]}))
    first = expected.index(expected[9], 5)
    monkeypatch.setattr(GUESS, Oracle([expected], 1.0))
    assert generate(model, [PROMPT], stop) == [expected[5:first]]


def test_the_context_is_filled_to_its_end(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Sampling(max_new_tokens=1000)
    expected = plain(monkeypatch, model, PROMPT, settings)[0]
    assert len(expected) == model.config.block_size
    monkeypatch.setattr(GUESS, Oracle([expected], 1.0))
    assert generate(model, [PROMPT], settings) == [expected[5:]]


def test_a_step_of_several_rows_guesses_nothing(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GUESS, lambda *_: pytest.fail("there are two"))
    rows = generate(model, [PROMPT, [11]], replace(GREEDY, max_new_tokens=5))
    assert list(map(len, rows)) == [5, 5]


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_come_and_go_between_guesses(
    model: GPT, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they leave behind for others that begin alike is right too."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(50) for _ in range(draw.randint(1, 9))] for _ in range(5)]
    settings = [
        replace(draw.choice([GREEDY, DRAWN]), max_new_tokens=draw.randint(1, 25), seed=i)
        for i in range(5)
    ]
    expected = [plain(monkeypatch, model, *both)[0] for both in zip(prompts, settings, strict=True)]
    monkeypatch.setattr(GUESS, Oracle(expected))
    batch, rows = Batch(model, PrefixCache(3)), {}
    waiting = [*range(5), *range(5)]
    while waiting or batch.rows:
        if waiting and (not batch.rows or draw.random() < 0.1):
            i = waiting.pop()
            (rows[i],) = batch.join([prompts[i]], [settings[i]])
        elif draw.random() < 0.05:
            gone = draw.choice(batch.rows)
            batch.leave(gone)
            waiting += [i for i, row in rows.items() if row is gone]
        else:
            batch.step()
    assert [rows[i].ids for i in range(5)] == expected
