"""What surrounds the CUDA graphs of training, without a GPU; tests/test_gpu.py tests the graphs."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from pipeline.decoding.generate import generate
from pipeline.decoding.sampling import Sampling
from pipeline.gpt import GPT
from pipeline.loss import next_token_loss
from pipeline.training import training_graph
from pipeline.training.sharding import FullySharded
from pipeline.training.training_graph import Pass, TrainingGraphs, install, left_out
from tests.journey import Journey
from tests.training import LORA, TINY, fit, instruction_data, language_model

MakeGPT = Callable[..., GPT]
LENGTHS = [[9, 70, 30], [65, 65], [5, 40, 12], [9, 70, 31]]


@pytest.fixture
def graphs(tiny_gpt: MakeGPT, monkeypatch: pytest.MonkeyPatch) -> TrainingGraphs:
    """Of a model in training; a graph is what it would be captured of."""
    monkeypatch.setattr(TrainingGraphs, "_capture", uncaptured)
    gpt = tiny_gpt("llama", block_size=100, tie_embeddings=False).train()
    gpt.forward = graphs = TrainingGraphs(gpt)  # type: ignore[method-assign]
    return graphs


def micro_batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    made = []
    for lengths in map(torch.tensor, LENGTHS):
        ids = torch.randint(1, 90, (len(lengths), int(lengths.max())))
        made.append((ids, torch.arange(ids.shape[1]) < lengths[:, None]))
    return made


def gradients(gpt: GPT, **options: Any) -> dict[str, Tensor]:
    """Of all micro-batches together."""
    gpt.zero_grad(**options)
    for ids, mask in micro_batches():
        labels = ids.masked_fill(~mask, -100)
        next_token_loss(gpt(ids, mask), gpt.head.weight, labels)[0].backward()
    return {n: p.grad.clone() for n, p in gpt.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_rows_without_padding(graphs: TrainingGraphs) -> None:
    gpt = graphs.gpt
    got = gradients(gpt)
    assert graphs.met == {(3, 100), (2, 100), (3, 64)}
    assert list(graphs.captured) == [(3, 100)], "the one that came again"
    again = gradients(gpt, set_to_none=False)
    assert list(graphs.captured) == [(3, 100), (2, 100), (3, 64)]
    assert graphs.n_prepared == 6
    with left_out(gpt):
        assert not training_graph.is_installed(gpt)
        expected = gradients(gpt)
    assert training_graph.is_installed(gpt)
    assert got.keys() == expected.keys() == dict(gpt.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)
        assert torch.equal(got[name], again[name])


def test_gradients_are_held_where_they_were(graphs: TrainingGraphs) -> None:
    """A graph adds to memory, not to what is called so; what was forgotten is zero."""
    gpt, (ids, mask) = graphs.gpt, micro_batches()[0]
    gpt(ids, mask).sum().backward()
    trained = list(graphs.trained.values())
    held, first = [p.grad for p in trained], [p.grad.clone() for p in trained]
    assert gpt.head.weight.grad is None, "it is no part of the pass"
    assert all(bool(grad.any()) for grad in first)
    states = gpt(ids, mask)
    gpt.zero_grad(set_to_none=True)  # as some do it, between the two
    trained[0].grad = torch.ones_like(trained[0])
    states.sum().backward()
    assert all(p.grad is grad for p, grad in zip(trained, held, strict=True))
    torch.testing.assert_close(held[0], first[0] + 1)
    assert all(torch.equal(*pair) for pair in zip(held[1:], first[1:], strict=True))


def test_gradients_have_a_place_before_a_capture(graphs: TrainingGraphs) -> None:
    """Made in one, they would be zero again at every replay."""
    Pass(graphs)
    assert "gradients" in vars(graphs)


def test_a_pass_goes_back_once_and_before_another_begins(graphs: TrainingGraphs) -> None:
    """The memory of graphs is shared."""
    (ids, mask), message = micro_batches()[0], "backward ran twice, or after another forward"
    first = graphs.gpt(ids, mask)
    second = graphs.gpt(ids, mask)
    with pytest.raises(RuntimeError, match=message):
        first.sum().backward()
    loss = second.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


def test_nothing_is_kept(graphs: TrainingGraphs) -> None:
    """Of the memory of graphs, at once: a GPU has little, and cycles wait for their collection."""
    gpt = graphs.gpt
    for _ in range(2):
        gradients(gpt)
    kept = [weakref.ref(one) for one in graphs.captured.values()]
    assert len(kept) == 3
    del graphs
    gc.disable()
    try:
        training_graph.remove(gpt)
        assert [one() for one in kept] == [None] * 3
    finally:
        gc.enable()


def test_shapes_too_many_are_computed_alike(
    graphs: TrainingGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_graph, "MAX_SHAPES", 1)
    expected = gradients(graphs.gpt)
    got = gradients(graphs.gpt)
    assert list(graphs.captured) == [(3, 100)]
    assert graphs.n_prepared == 4, "others are not prepared any more"
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"device": "cpu"}, r"training runs on cpu \(trainer\.accelerator\)"),
        ({"world_size": 2}, r"there are 2 processes \(trainer\.devices\)"),
        ({"strategy": FullySharded}, r"weights are shared out \(trainer\.strategy\)"),
        ({"causal": False}, r"model\.gpt\.causal is false"),
        ({"frozen": True}, r"no weight of the transformer is trained \(model\.trainable\)"),
        ({"gradient_checkpointing": True}, r"model\.gradient_checkpointing is true"),
        ({"detect_anomaly": True}, r"trainer\.detect_anomaly is true"),
        ({"max_bytes": 1000}, r"gradients take more than 3 GiB, and are there twice"),
    ],
)
def test_what_cannot_be_captured_is_not_unless_it_is_asked_for(
    tiny_gpt: MakeGPT, changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt, trainer = tiny_gpt("llama", causal=changes.get("causal", True)), trainer_with(changes)
    gpt.gradient_checkpointing = changes.get("gradient_checkpointing", False)
    if changes.get("frozen"):
        gpt.blocks.requires_grad_(False), gpt.final_norm.requires_grad_(False)
        gpt.token_embedding.requires_grad_(False), gpt.head.requires_grad_(True)
    max_bytes = changes.get("max_bytes", training_graph.MAX_GRADIENT_BYTES)
    monkeypatch.setattr(training_graph, "MAX_GRADIENT_BYTES", max_bytes)
    install(gpt, trainer, is_asked_for=False)
    assert not training_graph.is_installed(gpt)
    with pytest.raises(ValueError, match=f"model.cuda_graphs is true, but {named}; set it to null"):
        install(gpt, trainer, is_asked_for=True)


@pytest.mark.parametrize("is_asked_for", [False, True])
def test_what_can_be_captured_is(tiny_gpt: MakeGPT, is_asked_for: bool) -> None:
    gpt = tiny_gpt("llama")
    install(gpt, trainer_with({}), is_asked_for=is_asked_for)
    assert training_graph.is_installed(gpt)
    training_graph.remove(gpt)
    assert not training_graph.is_installed(gpt)


def trainer_with(changes: dict[str, Any]) -> Any:
    device = torch.device(changes.get("device", "cuda"))
    strategy = Mock(spec=changes.get("strategy", SingleDeviceStrategy), root_device=device)
    anomaly = changes.get("detect_anomaly", False)
    n_processes = changes.get("world_size", 1)
    return SimpleNamespace(strategy=strategy, world_size=n_processes, _detect_anomaly=anomaly)


@pytest.mark.parametrize("adapters", [False, True], ids=["all", "adapters"])
def test_a_run_has_the_losses_of_one_without(
    adapters: bool, tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several micro-batches a step, gradients forgotten in between; nothing is left afterwards."""
    lora = replace(LORA, dropout=0.0) if adapters else None
    base = {"gpt": None, "init_from": str(tiny.best("pretrain")), "lora": lora}
    own = base if adapters else {"gpt": replace(TINY, dropout=0.0)}
    losses, counts = [], []
    for is_captured in (False, True):
        if is_captured:
            monkeypatch.setattr(TrainingGraphs, "_capture", uncaptured)
            monkeypatch.setattr(training_graph, "install", installed)
        module, counting = language_model(**own), Counting()
        data = instruction_data(tiny.tokenizer)
        _, found = fit(module, data, tmp_path, max_steps=5, callbacks=[counting])
        losses.append(found.losses)
        counts.append(counting.n)
        assert not training_graph.is_installed(module.gpt)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert counts[0] == 0 < counts[1]


class Counting(pl.Callback):
    n = 0

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.n = getattr(module.gpt.forward, "n_prepared", 0)


def uncaptured(graphs: TrainingGraphs, shape: tuple[int, int]) -> Pass:
    return Pass(graphs)


def installed(gpt: GPT, trainer: Any, **_: Any) -> None:
    gpt.forward = TrainingGraphs(gpt)  # type: ignore[method-assign]


def test_only_what_trains_is_captured(graphs: TrainingGraphs) -> None:
    gpt, (ids, mask) = graphs.gpt, micro_batches()[0]
    with torch.no_grad():
        gpt(ids, mask)
    gpt.eval()
    gpt(ids, mask)
    assert generate(gpt, [[1, 2]], Sampling(max_new_tokens=3))
    assert not graphs.met
    with pytest.raises(ValueError, match=r"do not fit in model\.gpt\.block_size 100"):
        gpt.train()(torch.zeros((1, 101), dtype=torch.int64))
