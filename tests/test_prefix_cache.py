"""Cached prefixes serve later texts that begin alike, and change none of their outputs."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.decoding.generate import Batch, generate
from pipeline.decoding.packed import pack
from pipeline.decoding.prefix_cache import PrefixCache, common_length
from pipeline.decoding.sampling import Sampling
from pipeline.gpt import GPT
from pipeline.inference import converse, pieces
from tests.exporting import loaded, vocabulary

MakeGPT = Callable[..., GPT]
GREEDY = Sampling(max_new_tokens=6)
DRAWN = Sampling(max_new_tokens=6, temperature=1.0, top_k=40, seed=3)
PREAMBLE = [7, 3, 9, 9, 2, 41, 8, 30, 12, 5]


@pytest.fixture(params=["gpt2", "llama", "packed"])
def model(request: pytest.FixtureRequest, tiny_gpt: MakeGPT) -> GPT:
    return pack(tiny_gpt("llama")) if request.param == "packed" else tiny_gpt(request.param)


@pytest.fixture
def no_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step reads one token."""
    monkeypatch.setattr("pipeline.decoding.generate.guess", lambda *_: [])


@contextmanager
def computed(model: GPT) -> Iterator[list[int]]:
    """Tokens that go through the blocks in every pass, padding and fillers left out."""
    seen: list[int] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = args[1] if len(args) > 1 else None
        seen.append(int(args[0].numel() if mask is None else mask.sum()))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def blocks_fed(model: GPT) -> Iterator[list[torch.Size]]:
    """Shapes that the first block gets."""
    shapes: list[torch.Size] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    try:
        yield shapes
    finally:
        handle.remove()


def alone(model: GPT, prompt: Sequence[int], settings: Sampling = GREEDY) -> list[int]:
    return generate(model, [prompt], settings)[0]


def finish(batch: Batch) -> None:
    while batch.rows:
        batch.step()


@pytest.mark.usefixtures("no_guesses")
def test_a_turn_of_a_conversation_costs_what_is_new(model: GPT) -> None:
    batch = Batch(model, PrefixCache(1))
    prompt, n_known = PREAMBLE, 0
    for turn in range(3):
        expected = alone(model, prompt)
        with computed(model) as passes:
            (row,) = batch.join([prompt], [GREEDY])
            finish(batch)
        assert row.ids == prompt + expected
        assert row.n_cached == n_known
        assert passes == [len(prompt) - n_known, *[1] * 5]
        n_known = len(row.ids) - 1  # the last token was never read
        prompt = [*row.ids, 20 + turn, 4]


def test_who_joins_takes_over_from_those_who_are_written(model: GPT) -> None:
    prompts = [[*PREAMBLE, 1, 2], [*PREAMBLE, 1, 50, 51], [60], [*PREAMBLE[:4], 6]]
    settings = [GREEDY, DRAWN, GREEDY, replace(DRAWN, seed=8)]
    batch = Batch(model)
    (first,) = batch.join(prompts[:1], settings[:1])
    batch.step()
    with computed(model) as passes:
        rows = [first, *batch.join(prompts[1:], settings[1:])]
    assert [row.n_cached for row in rows] == [0, 11, 0, 4]
    assert passes == [2 + 1 + 1]
    finish(batch)
    for row, prompt, own in zip(rows, prompts, settings, strict=True):
        assert row.ids == prompt + alone(model, prompt, own)


def test_the_newest_token_was_not_read(model: GPT) -> None:
    batch = Batch(model)
    (first,) = batch.join([PREAMBLE], [GREEDY])
    prompt = [*first.ids, 33]
    (second,) = batch.join([prompt], [GREEDY])
    assert second.n_cached == len(PREAMBLE) == len(first.ids) - 1
    finish(batch)
    assert second.ids == prompt + alone(model, prompt)


def test_what_new_prompts_begin_with_is_computed_once(model: GPT) -> None:
    """As in training; the rest of them is rounded up to 32."""
    prompts = [[*PREAMBLE * 4, n, n + 1] for n in range(4)]
    firsts = [alone(model, prompt)[0] for prompt in prompts]
    for text, n_tokens, n_cached in (
        ([1], 64, 0),  # 40 tokens and four times 2
        (PREAMBLE, 64, 0),  # 10 of each were known: four times 32 would be more
        (PREAMBLE * 4, 32, 40),
    ):
        batch = Batch(model, PrefixCache(1))
        batch.join([text], [replace(GREEDY, max_new_tokens=2)])
        finish(batch)
        with blocks_fed(model) as passes:
            rows = batch.join(prompts, [GREEDY] * 4)
        assert passes == [(1, n_tokens, 32)]
        assert [row.token for row in rows] == firsts
        assert [row.n_cached for row in rows] == [n_cached] * 4


def test_what_is_shared_after_different_beginnings_differs(model: GPT) -> None:
    """Their new tokens begin alike, but not what these follow."""
    batch = Batch(model, PrefixCache(4))
    begun = [[1, 2, 3, 4], [5, 6, 7, 8]]
    batch.join(begun, [GREEDY, GREEDY])
    finish(batch)
    prompts = [[*text[:3], 40, 41, 42, 43] for text in begun]
    with computed(model) as passes:
        rows = batch.join(prompts, [GREEDY, GREEDY])
    assert [row.n_cached for row in rows] == [3, 3]
    assert passes == [8]
    finish(batch)
    assert [row.ids for row in rows] == [prompt + alone(model, prompt) for prompt in prompts]


def test_equal_prompts_are_read_once(model: GPT) -> None:
    other = [*PREAMBLE, 2]
    prompts = [PREAMBLE, other, PREAMBLE, PREAMBLE]
    settings = [replace(DRAWN, seed=seed) for seed in range(4)]
    batch = Batch(model)
    with computed(model) as passes:
        rows = batch.join(prompts, settings)
    assert passes == [10 + 11]
    assert [row.n_cached for row in rows] == [0, 0, 9, 9]
    finish(batch)
    for row, prompt, own in zip(rows, prompts, settings, strict=True):
        assert row.ids == prompt + alone(model, prompt, own)
    assert len({tuple(row.ids) for row in rows}) == 4


def test_one_token_at_least_is_read(model: GPT) -> None:
    """The logits after it are what the answer begins with."""
    batch = Batch(model, PrefixCache(1))
    for n_cached in (0, 9, 9):
        (row,) = batch.join([PREAMBLE], [GREEDY])
        finish(batch)
        assert row.n_cached == n_cached
        assert row.ids == PREAMBLE + alone(model, PREAMBLE)


def test_a_prompt_may_be_read_ahead_in_pieces(model: GPT) -> None:
    prompt, alone = [*PREAMBLE, *PREAMBLE, 3], generate(model, [[*PREAMBLE, *PREAMBLE, 3]], GREEDY)
    batch = Batch(model, PrefixCache(2))
    assert batch.n_unread(prompt) == 21
    with computed(model) as seen:
        for n_tokens, n_unread in ((8, 13), (5, 8)):
            batch.read(prompt, n_tokens)
            assert batch.n_unread(prompt) == n_unread
        (row,) = batch.join([prompt], [GREEDY])
    assert seen == [8, 5, 8]
    assert (row.n_cached, batch.prefixes.n_tokens) == (13, 13)
    while batch.rows:
        batch.step()
    assert row.ids[21:] == alone[0]


def test_at_the_end_of_the_context(model: GPT) -> None:
    """A short row beside one whose new part is long has no place for as much padding."""
    batch = Batch(model, PrefixCache(2))
    long = [index % 50 for index in range(61)]
    batch.join([long], [GREEDY])
    finish(batch)
    prompts = [[*long[:60], 3], [60 + index % 30 for index in range(50)]]
    rows = batch.join(prompts, [GREEDY, GREEDY])
    assert [row.n_cached for row in rows] == [60, 0]
    finish(batch)
    assert [len(row.ids) for row in rows] == [64, 56]
    assert [row.ids for row in rows] == [prompt + alone(model, prompt) for prompt in prompts]


def test_who_leaves_is_kept_as_far_as_it_came(model: GPT) -> None:
    batch = Batch(model, PrefixCache(2))
    stay, leave = batch.join([[3, 4], PREAMBLE], [GREEDY, GREEDY])
    batch.step()
    batch.leave(leave)
    (again,) = batch.join([[*leave.ids, 33]], [GREEDY])
    assert again.n_cached == len(leave.ids) - 1
    finish(batch)
    assert again.ids == [*leave.ids, 33, *alone(model, [*leave.ids, 33])]
    assert stay.ids == [3, 4, *alone(model, [3, 4])]


def kv(*numbers: float) -> Tensor:
    """Of one layer and head, one number a token."""
    return torch.tensor(numbers).expand(1, 2, 1, 1, -1).transpose(3, 4)


def found(cache: PrefixCache, *ids: int) -> list[float] | None:
    tensor = cache.find(ids)
    return None if tensor is None else tensor[0, 0, 0, :, 0].tolist()


def test_the_longest_beginning_is_found() -> None:
    cache = PrefixCache(3)
    cache.add([1, 2, 3], kv(10, 20, 30))
    cache.add([1, 2, 4, 5], kv(11, 21, 41, 51))
    assert found(cache, 1, 2, 4, 9) == [11, 21, 41]
    assert found(cache, 1, 2, 3) == [10, 20, 30]
    assert found(cache, 1, 2, 3, 4, 5) == [10, 20, 30]
    assert found(cache, 2) is None
    assert found(cache) is None
    assert found(PrefixCache(3), 1) is None


def test_what_is_kept_is_a_copy() -> None:
    cache, store = PrefixCache(1), kv(1, 2).clone()
    cache.add([5, 6], store)
    store.zero_()
    assert found(cache, 5, 6) == [1, 2]


def test_a_longer_text_replaces_what_it_goes_on_from() -> None:
    cache = PrefixCache(2)
    cache.add([9], kv(9))
    cache.add([1, 2], kv(1, 2))
    cache.add([1, 2, 3], kv(1, 2, 3))
    assert cache.n_tokens == 4
    assert found(cache, 9) == [9]
    cache.add([1, 2], kv(7, 7))  # is there already
    assert found(cache, 1, 2) == [1, 2]
    assert cache.n_tokens == 4


def test_the_longest_unused_is_given_up() -> None:
    cache = PrefixCache(2)
    cache.add([1, 1], kv(1, 1))
    cache.add([2, 2], kv(2, 2))
    assert found(cache, 1, 1) == [1, 1]
    cache.add([3, 3], kv(3, 3))
    assert found(cache, 2) is None
    assert found(cache, 1) == [1]
    cache.shrink(2)
    assert found(cache, 3) is None
    assert cache.n_tokens == 2
    cache.shrink(1)
    assert cache.n_tokens == 0
    cache.shrink(-5)


def test_of_equals_the_newest_is_used() -> None:
    """A beginning that all have does not hold the oldest of them."""
    cache = PrefixCache(2)
    cache.add([1, 2], kv(1, 2))
    cache.add([1, 3], kv(1, 3))
    assert found(cache, 1, 9) == [1]
    cache.add([4], kv(4))
    assert found(cache, 1, 3) == [1, 3]


def test_none_is_kept_where_there_is_no_place() -> None:
    cache = PrefixCache(0)
    cache.add([1], kv(1))
    assert cache.n_tokens == 0


def test_common_length() -> None:
    assert common_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_length([1, 2], (1, 2, 3)) == 2
    assert common_length([], [1]) == 0
    assert common_length([2], [1]) == 0


@pytest.mark.usefixtures("no_guesses")
def test_a_chat_reads_what_is_new(
    tiny_gpt: MakeGPT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = vocabulary()
    gpt = tiny_gpt("llama", vocab_size=tokenizer.n_vocab, block_size=512)
    model = loaded(gpt, tokenizer, prompt_style="chatml")
    monkeypatch.setattr("pipeline.inference.load_language_model", lambda *_: model)
    prompts: list[list[int]] = []

    def noting(loaded: Any, ids: list[int], *rest: Any) -> Iterator[str]:
        prompts.append(ids)
        return pieces(loaded, ids, *rest)

    monkeypatch.setattr("pipeline.inference.pieces", noting)
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\nAnd why is that?\nOh.\n\n"))
    with computed(gpt) as passes:
        converse("", precision="auto", system="Be brief.", max_new_tokens=8)
    assert len(capsys.readouterr().out.splitlines()) >= 3
    reads = [n for n in passes if n > 1]
    assert len(reads) == len(prompts) == 3
    assert reads[0] == len(prompts[0])
    for turn in (1, 2):  # what was written, as it is written in the next prompt, may be other ids
        assert reads[turn] <= len(prompts[turn]) - len(prompts[turn - 1])
