"""Decoding: rows are independent, settings do what they say, beams find the likeliest text."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.decoding.generate import Batch, generate, generate_each
from pipeline.decoding.passes import check_prompt
from pipeline.decoding.sampling import Sampling, choose, probabilities
from pipeline.gpt import GPT

MakeGPT = Callable[..., GPT]
PROMPTS = [[5, 6, 7], [11], list(range(20, 33)), [50, 3]]
GREEDY = Sampling(max_new_tokens=12)
DRAWN = Sampling(max_new_tokens=12, temperature=1.0, top_k=40, top_p=0.95, seed=3)


@pytest.fixture(params=["gpt2", "llama", "qwen3"])
def model(request: pytest.FixtureRequest, tiny_gpt: MakeGPT) -> GPT:
    return tiny_gpt(request.param)


@torch.inference_mode()
def next_logits(model: GPT, ids: list[int]) -> Tensor:
    """Without a cache: the whole text again for every token."""
    return model.head(model(torch.tensor([ids]))[0, -1])


def greedy(model: GPT, prompt: list[int], n_new: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n_new):
        ids.append(int(next_logits(model, ids).argmax()))
    return ids[len(prompt) :]


def test_batched_equals_one_by_one_equals_no_cache(model: GPT) -> None:
    batched = generate(model, PROMPTS, GREEDY)
    assert batched == [generate(model, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert batched == [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert len({token for row in batched for token in row}) > 10, "one token over and over"
    assert generate(model, [], GREEDY) == []


def test_draws_of_a_row_do_not_depend_on_its_neighbours(model: GPT) -> None:
    stops = frozenset({generate(model, PROMPTS, DRAWN)[0][2]})  # row 0 leaves the others early
    batched = generate(model, PROMPTS, replace(DRAWN, stop_ids=stops))
    alone = [
        generate(model, [prompt], replace(DRAWN, seed=3 + row, stop_ids=stops))[0]
        for row, prompt in enumerate(PROMPTS)
    ]
    assert batched == alone
    assert len(batched[0]) < max(map(len, batched))


def test_seeds(model: GPT) -> None:
    first = generate(model, PROMPTS, DRAWN)
    torch.manual_seed(99)  # the global generator is left alone and not used
    state = torch.get_rng_state()
    assert generate(model, PROMPTS, DRAWN) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(model, PROMPTS, replace(DRAWN, seed=4)) != first


def test_stop_ids_end_a_row_and_are_left_out(model: GPT) -> None:
    free = generate(model, PROMPTS, GREEDY)
    stops = frozenset({free[0][4], free[2][0]})
    expected = [list(itertools.takewhile(lambda t: t not in stops, row)) for row in free]
    assert generate(model, PROMPTS, replace(GREEDY, stop_ids=stops)) == expected
    assert expected[2] == []
    assert [] != expected[0] != free[0]


def test_rows_join_and_leave_while_others_are_written(model: GPT) -> None:
    """Whoever comes, goes or draws beside it: a row is what it would be alone."""
    settings = [GREEDY, DRAWN, replace(GREEDY, max_new_tokens=5), replace(DRAWN, seed=9)]
    alone = [
        generate(model, [prompt], own)[0] for prompt, own in zip(PROMPTS, settings, strict=True)
    ]
    batch = Batch(model)
    written: dict[Any, list[int | None]] = {}

    def join(*numbers: int) -> list[Any]:
        rows = batch.join([PROMPTS[i] for i in numbers], [settings[i] for i in numbers])
        written.update({row: [row.token] for row in rows})
        return rows

    def steps(n: int) -> None:
        for _ in range(n):
            for row in batch.step():
                written[row].append(row.token)

    (first,) = join(0)
    steps(3)
    second, third = join(1, 2)
    steps(4)
    assert third.ended == "length"
    assert batch.rows == [first, second]
    (gone,) = join(3)
    steps(2)
    batch.leave(gone)
    while batch.rows:
        steps(1)
    assert [written[row] for row in (first, second, third)] == alone[:3]
    assert written[gone] == alone[3][:3]
    assert gone.ended is None
    (again,) = join(0)  # an empty batch starts anew
    steps(1)
    assert written[again] == alone[0][:2]


def test_the_last_row_takes_the_place_of_one_that_leaves(model: GPT) -> None:
    batch = Batch(model)
    rows = batch.join(PROMPTS, [GREEDY] * 4)
    batch.step()
    batch.leave(rows[1])
    assert batch.rows == [rows[0], rows[3], rows[2]]
    batch.step()
    rows += batch.join([[8, 8, 8]], [GREEDY])  # in the place that is free
    while batch.rows:
        batch.step()
    expected = generate(model, [*PROMPTS, [8, 8, 8]], GREEDY)
    for i in (0, 2, 3, 4):
        assert rows[i].ids == [*PROMPTS, [8, 8, 8]][i] + expected[i]


def test_memory_of_rows_is_given_up_by_halves(model: GPT) -> None:
    batch = Batch(model)
    rows = batch.join([[n] for n in range(10, 18)], [GREEDY] * 8)
    places = []
    for row in rows[:7]:
        batch.leave(row)
        assert batch._cache
        places.append(batch._cache.store.shape[2])
    assert places == [8, 8, 8, 4, 4, 2, 1]
    batch.join([[3, 4]] * 2, [GREEDY] * 2)
    assert batch._cache.store.shape[2] == 3
    while batch.rows:
        batch.step()
    assert rows[7].ids == [17, *generate(model, [[17]], GREEDY)[0]]


def test_room_of_a_long_row_is_given_up_with_it(tiny_gpt: MakeGPT) -> None:
    model = tiny_gpt("llama", block_size=256)
    batch = Batch(model)
    two = replace(GREEDY, max_new_tokens=2)
    short, long = batch.join([[3], [5] * 200], [GREEDY, two])
    written, room = [short.token], [room_of(batch)]
    while batch.rows:
        batch.step()
        written.append(short.token)
        room.append(room_of(batch))
    assert long.ended == "length"
    assert room == [256, *[64] * 10, 0]
    assert written == generate(model, [[3]], GREEDY)[0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rows_of_any_length_join(tiny_gpt: MakeGPT, order: tuple[int, int]) -> None:
    model, prompts = tiny_gpt("llama", block_size=256), [[3], [5, 9] * 80]
    batch = Batch(model)
    written: dict[Any, list[int | None]] = {}
    for number in order:
        (row,) = batch.join([prompts[number]], [GREEDY])
        written[row] = [row.token]
        for moved in batch.step():
            written[moved].append(moved.token)
    while batch.rows:
        for moved in batch.step():
            written[moved].append(moved.token)
    assert list(written.values()) == [generate(model, [prompts[i]], GREEDY)[0] for i in order]


@pytest.mark.parametrize("max_rows", [1, 2, 3, 8])
def test_rows_that_end_make_room_for_others(
    model: GPT, max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = PROMPTS * 3
    expected = generate(model, prompts, DRAWN)
    ends = frozenset({expected[0][3], expected[5][6]})  # of unequal length
    settings = replace(DRAWN, stop_ids=ends)
    alone = generate(model, prompts, settings)
    n_rows: list[int] = []
    step = Batch.step
    monkeypatch.setattr(
        Batch, "step", lambda batch: (n_rows.append(len(batch.rows)), step(batch))[1]
    )
    written = list(generate_each(model, prompts, settings, max_rows=max_rows))
    assert dict(written) == dict(enumerate(alone))
    assert len(written) == len(prompts)
    assert max(n_rows) == max_rows
    assert len(n_rows) < sum(map(len, alone)) / max_rows + 14, "places stay empty"


def room_of(batch: Batch) -> int:
    """Tokens that every row has memory for."""
    return 0 if batch._cache is None else batch._cache.store.shape[4]


def test_the_context_ends_a_row(model: GPT) -> None:
    prompts = [list(range(60)), [7]]
    rows = generate(model, prompts, replace(GREEDY, max_new_tokens=10))
    assert [len(row) for row in rows] == [4, 10]  # block_size 64
    assert rows == [greedy(model, prompts[0], 4), greedy(model, prompts[1], 10)]
    assert len(generate(model, prompts, replace(GREEDY, max_new_tokens=1000))[1]) == 63
    beams = replace(GREEDY, max_new_tokens=10, num_beams=3)
    assert len(generate(model, prompts[:1], beams)[0]) == 4


def test_prompts_that_do_not_fit_are_refused(model: GPT) -> None:
    for settings in (GREEDY, replace(GREEDY, num_beams=2)):
        with pytest.raises(ValueError, match=r"prompt has 64 tokens but model\.gpt\.block_size is"):
            generate(model, [[1], list(range(64))], settings)
        with pytest.raises(ValueError, match="prompt is empty"):
            generate(model, [[1], []], settings)
    check_prompt(63, 64)


def test_ids_beyond_the_tokenizer_are_never_chosen(model: GPT) -> None:
    free = {token for row in generate(model, PROMPTS, DRAWN) for token in row}
    assert max(free) >= 40
    model.n_tokens = 40
    for settings in (GREEDY, DRAWN, replace(GREEDY, num_beams=3)):
        rows = generate(model, PROMPTS, settings)
        assert max(token for row in rows for token in row) < 40


def test_a_bidirectional_model_cannot_write(tiny_gpt: MakeGPT) -> None:
    with pytest.raises(ValueError, match=r"model\.gpt\.causal is false"):
        generate(tiny_gpt(causal=False), PROMPTS, GREEDY)


# Odds 8 : 4 : 2 : 1 : 1, not in order
LOGITS = torch.tensor([[2.0, 8.0, 1.0, 4.0, 1.0]]).log()


@pytest.mark.parametrize(
    ("changes", "odds"),
    [
        ({}, [2, 8, 1, 4, 1]),
        ({"temperature": 0.5}, [4, 64, 1, 16, 1]),
        ({"top_k": 2}, [0, 8, 0, 4, 0]),
        ({"top_k": 5}, [2, 8, 1, 4, 1]),
        ({"top_k": 99}, [2, 8, 1, 4, 1]),
        ({"top_p": 0.5}, [0, 8, 0, 0, 0]),  # 8/16 reach it exactly
        ({"top_p": 0.51}, [0, 8, 0, 4, 0]),  # the one that passes it stays
        ({"top_p": 1e-9}, [0, 8, 0, 0, 0]),  # one is always left
        ({"top_k": 3, "top_p": 0.8}, [0, 8, 0, 4, 0]),  # of the three that are left: 12/14
        ({"temperature": 2.0, "top_k": 2}, [0, 2**0.5, 0, 1, 0]),
        ({"temperature": 1e-30}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-40}, [0, 1, 0, 0, 0]),  # less than float32 has
        ({"temperature": 1e-320}, [0, 1, 0, 0, 0]),
        ({"top_p": 1e-50}, [0, 8, 0, 0, 0]),
    ],
)
def test_distributions_by_hand(changes: dict[str, Any], odds: list[float]) -> None:
    settings = Sampling(**{"max_new_tokens": 1, "temperature": 1.0, **changes})
    expected = torch.tensor([odds]) / sum(odds)
    torch.testing.assert_close(probabilities(LOGITS, settings), expected, rtol=1e-5, atol=1e-7)
    # another row beside it, another order
    both = probabilities(torch.cat((LOGITS.flip(1), LOGITS)), settings)
    torch.testing.assert_close(both[1:], expected, rtol=1e-5, atol=1e-7)


def test_draws_follow_the_distribution() -> None:
    settings = Sampling(max_new_tokens=1, temperature=1.0, top_k=3)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2000)]
    drawn = choose(LOGITS.expand(2000, -1), [settings] * 2000, generators)
    shares = [drawn.count(token) / 2000 for token in range(5)]
    # a share of 2,000 draws has a standard deviation of at most 0.011; the seeds are fixed
    assert shares == pytest.approx([2 / 14, 8 / 14, 0, 4 / 14, 0], abs=0.035)


def test_temperature_0_is_greedy(model: GPT) -> None:
    cold = replace(DRAWN, temperature=0.0, top_k=0, top_p=1.0)
    assert generate(model, PROMPTS, cold) == generate(model, PROMPTS, GREEDY)
    assert generate(model, PROMPTS, replace(DRAWN, top_k=1)) == generate(model, PROMPTS, GREEDY)


def likeliest(model: GPT, prompt: list[int], n_new: int, stops: frozenset[int]) -> list[int]:
    """The text of the highest mean log-probability, of all that stop and all that do not."""
    vocabulary = range(model.head.out_features)
    best: tuple[float, list[int]] = (-math.inf, [])
    for length in range(1, n_new + 1):
        texts = [
            [*text]
            for text in itertools.product(vocabulary, repeat=length)
            if not stops & {*text[:-1]} and (text[-1] in stops or length == n_new)
        ]
        if texts:
            means = mean_log_p(model, prompt, texts)
            at = int(means.argmax())
            best = max(
                best, (float(means[at]), [token for token in texts[at] if token not in stops])
            )
    return best[1]


@torch.inference_mode()
def mean_log_p(model: GPT, prompt: list[int], texts: list[list[int]]) -> Tensor:
    """Mean log-probability a token of texts of one length, (B,)."""
    hidden = model(torch.tensor([prompt + text for text in texts]))
    log_p = model.head(hidden[:, len(prompt) - 1 : -1]).log_softmax(dim=-1)
    return log_p.gather(2, torch.tensor(texts)[:, :, None]).mean(dim=(1, 2))


@pytest.mark.parametrize(
    ("n_vocab", "stops", "num_beams"),
    [
        (4, (), 64),
        (4, (2,), 64),
        (4, (0, 3), 64),
        (4, (0, 1, 2, 3), 2),
    ],
)
def test_enough_beams_find_the_likeliest_text_of_all(
    tiny_gpt: MakeGPT, n_vocab: int, stops: tuple[int, ...], num_beams: int
) -> None:
    lengths = set()
    for seed in range(12):
        model = tiny_gpt("llama", vocab_size=n_vocab, seed=seed)
        settings = Sampling(4, num_beams=num_beams, stop_ids=frozenset(stops))
        (found,) = generate(model, [[1, 3, 0]], settings)
        assert found == likeliest(model, [1, 3, 0], 4, frozenset(stops))
        lengths.add(len(found))
    if 0 < len(stops) < n_vocab:
        assert len(lengths) > 1, "seeds that show early ends and late ones"


def test_more_beams_find_likelier_texts(model: GPT) -> None:
    """On the whole: a single prompt may be unlucky. Narrow beams equal transformers' elsewhere."""
    means = []
    for settings in (GREEDY, replace(GREEDY, num_beams=6)):
        rows = generate(model, PROMPTS, settings)
        assert rows == [generate(model, [prompt], settings)[0] for prompt in PROMPTS]
        pairs = zip(PROMPTS, rows, strict=True)
        means.append(sum(float(mean_log_p(model, prompt, [row])) for prompt, row in pairs))
    assert means[0] < means[1]


@torch.no_grad()
def test_beams_see_past_many_stops(tiny_gpt: MakeGPT) -> None:
    """After 0, token 3 is rarer than all eight stops; after 3 it is certain, so it wins."""
    model = tiny_gpt("llama", vocab_size=9)
    for tensor in model.tensors().values():
        tensor.zero_()
    model.final_norm.weight.fill_(1.0)
    model.token_embedding.weight[0, 0] = model.token_embedding.weight[3, 1] = 1.0
    model.head.weight[3, :2] = torch.tensor([-0.2, 5.0])
    stops = frozenset({0, 1, 2, 4, 5, 6, 7, 8})
    assert generate(model, [[0]], Sampling(4, num_beams=2, stop_ids=stops)) == [[3, 3, 3, 3]]
    assert likeliest(model, [0], 4, stops) == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give at least 1"),
        ({"temperature": -0.5}, r"temperature is -0\.5; give 0 or more"),
        ({"top_k": -1}, r"top_k is -1; give 0 \(all tokens\) or more"),
        ({"top_p": 0.0}, r"top_p is 0\.0; give a probability in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"num_beams": 0}, "num_beams is 0; give at least 1"),
        ({"num_beams": 2, "temperature": 0.7}, r"num_beams is 2.*temperature is 0\.7"),
    ],
)
def test_refused_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GREEDY, **changes)
