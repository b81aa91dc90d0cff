"""Decoding over all slots of the cache, as on a GPU, but computed instead of replayed.

tests/test_gpu.py does the same with CUDA graphs.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from pipeline.decoding import passes
from pipeline.decoding.generate import Batch, beam_search, generate, generate_each
from pipeline.decoding.packed import pack
from pipeline.decoding.prefix_cache import PrefixCache
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.step_graph import StepGraph
from pipeline.gpt import GPT

MakeGPT = Callable[..., GPT]
GREEDY = Sampling(max_new_tokens=20)


class Recording:
    """Writes where the graph would, from where it would read."""

    def __init__(self, step: StepGraph) -> None:
        self.step, self.output, self.n_replays = step, step.logits, 0

    def replay(self) -> None:
        self.n_replays += 1
        self.output.copy_(self.step._run())


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StepGraph]]:
    """Every step that is captured."""
    steps: list[StepGraph] = []

    def capture(self: StepGraph) -> None:
        self.logits = torch.full_like(self._run(), torch.nan)  # a capture computes nothing
        self.graph = Recording(self)  # type: ignore[assignment]
        steps.append(self)

    monkeypatch.setattr(StepGraph, "_capture", capture)
    monkeypatch.setattr(passes, "_is_captured", lambda *_: True)
    yield steps
    assert all(step.graph.n_replays for step in steps)  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_that_come_and_go(
    tiny_gpt: MakeGPT, family: str, seed: int, captured: list[StepGraph]
) -> None:
    """What they get is what each gets alone, whoever was in its place before."""
    draw = random.Random(seed)
    model = pack(tiny_gpt(family, block_size=256))
    prompts = [[draw.randrange(90) for _ in range(draw.randint(1, 30))] for _ in range(12)]
    settings = [replace(GREEDY, max_new_tokens=draw.randint(1, 90)) for _ in prompts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_is_captured", lambda *_: False)
        expected = [generate(model, [p], s)[0] for p, s in zip(prompts, settings, strict=True)]

    batch, rows, waiting = Batch(model, PrefixCache(2)), {}, [*range(len(prompts))]
    while waiting or batch.rows:
        if waiting and (not batch.rows or draw.random() < 0.2):
            i = waiting.pop()
            (rows[i],) = batch.join([prompts[i]], [settings[i]])
        elif draw.random() < 0.02:
            gone = draw.choice(batch.rows)
            batch.leave(gone)
            waiting += [i for i, row in rows.items() if row is gone]
        else:
            batch.step()
    assert [rows[i].ids[len(p) :] for i, p in enumerate(prompts)] == expected
    shapes = [tuple(step.input_ids.shape) for step in captured]
    assert any(n_places > 1 for n_places, _ in shapes)
    assert len(shapes) < 60, "one that is captured is used many times"


def test_guesses_are_checked_in_a_shape_of_their_own(
    tiny_gpt: MakeGPT, captured: list[StepGraph]
) -> None:
    model = pack(tiny_gpt("llama", block_size=256))
    generate(model, [[1, 2, 3] * 5], replace(GREEDY, max_new_tokens=200))
    assert {step.input_ids.shape[1] for step in captured} >= {1, 5}


def test_a_store_is_captured_once_for_all_that_it_holds(
    tiny_gpt: MakeGPT, captured: list[StepGraph]
) -> None:
    """64 tokens of room: 3 rows begin, one after the other ends."""
    prompts, model = [[1], [2], [3]], pack(tiny_gpt("llama"))
    batch = Batch(model)
    batch.join(prompts, [replace(GREEDY, max_new_tokens=n) for n in (10, 20, 30)])
    while len(batch.rows) > 2:
        batch.step()
    assert [tuple(step.input_ids.shape) for step in captured] == [(3, 1)]
    batch.step()
    assert len(captured) == 1


def test_a_place_that_was_empty_when_it_was_captured(
    tiny_gpt: MakeGPT, captured: list[StepGraph]
) -> None:
    model = pack(tiny_gpt("llama"))
    batch = Batch(model)
    gone, _, _ = batch.join([[1], [2], [3]], [GREEDY] * 3)
    batch.leave(gone)
    for _ in range(5):
        batch.step()
    (row,) = batch.join([[4]], [GREEDY])
    while batch.rows:
        batch.step()
    assert {tuple(step.input_ids.shape) for step in captured} >= {(3, 1)}
    assert row.ids[1:] == generate(model, [[4]], GREEDY)[0]


def test_beams_are_never_captured(tiny_gpt: MakeGPT, captured: list[StepGraph]) -> None:
    """They move to another store at every step."""
    model, settings = pack(tiny_gpt("llama")), replace(GREEDY, num_beams=3)
    found = beam_search(model, [1, 2], settings)
    assert not captured
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_is_captured", lambda *_: False)
        assert beam_search(model, [1, 2], settings) == found


@torch.inference_mode()
def test_a_model_that_is_trained_is_not_captured(tiny_gpt: MakeGPT) -> None:
    """Nor one on a CPU."""
    model = tiny_gpt("llama")
    assert dict(generate_each(model, [[1]], GREEDY, max_rows=1))
    cache = passes.prefill(model, [[1]]).cache
    assert not passes._is_captured(model, cache)
    assert not passes._is_captured(pack(model), cache)
