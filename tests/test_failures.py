"""Messages when memory runs out: how much is needed, and what to change first."""

import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from pipeline.failures import explain
from pipeline.training.memory import GIB, estimate_gib


@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("no")])
def test_the_cheapest_remedy_comes_first(error: BaseException) -> None:
    """First what changes no result, then what costs time, then what trains something else."""
    text = explain(error, max_tokens=512, needed_gib=3.26, free_gib=1.5)
    assert text is not None
    assert "Training needs about 3.3 GiB beside the weights, 1.5 GiB are free: lower " in text
    knobs = ["data.max_tokens", "model.gradient_checkpointing", "model.lora", "a smaller model"]
    places = [text.index(knob) for knob in knobs]
    assert places == sorted(places)


def test_other_errors_are_not_explained() -> None:
    assert explain(RuntimeError("no"), max_tokens=1, needed_gib=0, free_gib=0) is None


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(RuntimeError) as raised:
            TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    text = explain(raised.value, max_tokens=1, needed_gib=0, free_gib=0)
    assert text is not None
    assert f"port: {port}" in text
    assert "MASTER_PORT" in text


def test_the_estimate_by_hand(tiny_gpt: Callable[..., Any]) -> None:
    model = tiny_gpt()
    n = sum(p.numel() for p in model.parameters())

    def estimate(max_tokens: int, *, half: bool = False) -> float:
        return estimate_gib(model, model, max_tokens, half=half) * GIB

    # float32: the gradient, two moments; the weights are there already
    assert estimate(0) == pytest.approx(12 * n)
    # a token: in each of 2 blocks 16 x 32 and 3 x 64 numbers; 96 logits and their gradient
    token = 4 * 2 * (16 * 32 + 3 * 64) + 96 * 2 * 4
    assert estimate(100) - estimate(0) == pytest.approx(100 * token)
    assert estimate(100, half=True) < estimate(100)
    block, logits = 4 * (16 * 32 + 3 * 64), 96 * 2 * 4
    model.gradient_checkpointing = True
    assert estimate(100) - estimate(0) == pytest.approx(100 * (4 * 2 * 32 + block + logits))
    model.gradient_checkpointing = False
    model.requires_grad_(False)
    assert estimate(0) == 0
    model.blocks[1].requires_grad_(True)
    assert estimate(100) - estimate(0) == pytest.approx(100 * (block + logits))
    del model.head
    assert estimate(100) - estimate(0) == pytest.approx(100 * block)
