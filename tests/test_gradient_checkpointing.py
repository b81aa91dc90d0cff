"""Gradient checkpointing: bit-identical numbers, with less kept for the backward pass."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from pipeline.gpt import GPT
from pipeline.training.trial import kept_bytes
from tests.journey import Journey
from tests.training import (
    LORA,
    TINY,
    classifier,
    fit,
    instruction_data,
    language_model,
    pretraining_data,
    spam_data,
)

MakeGPT = Callable[..., GPT]
FROM_BASE = {"gpt": None, "lora": LORA}


class Gradients(pl.Callback):
    """Keeps the gradients of the last step, and how often a block was computed."""

    def __init__(self) -> None:
        self.last: dict[str, Tensor] = {}
        self.n_calls = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        gpt = getattr(module.model, "gpt", module.model)
        gpt.blocks[0].register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.n_calls += 1

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        named = module.named_parameters()
        self.last = {name: p.grad.clone() for name, p in named if p.grad is not None}


KINDS = ["pretrain", "instruct", "adapters", "fused adapters", "spam"]
EMULATED = [  # bf16, on most machines
    pytest.param(kind, "bf16-mixed", marks=[pytest.mark.slow] if kind in KINDS[1:3] else [])
    for kind in KINDS
]


@pytest.mark.parametrize(("kind", "precision"), [*[(kind, "32-true") for kind in KINDS], *EMULATED])
def test_losses_and_gradients_are_the_same(
    kind: str, precision: str, tiny: Journey, tmp_path: Path
) -> None:
    """With dropout, rows packed and several micro-batches a step; both runs draw alike."""
    base = {**FROM_BASE, "init_from": str(tiny.best("pretrain"))}

    def run(*, switch: bool) -> tuple[list[float], Gradients]:
        options = {"gradient_checkpointing": switch}
        module: Any
        data: Any = instruction_data(tiny.tokenizer)
        if kind == "pretrain":
            module = language_model(**options)
            data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
        elif kind == "instruct":
            module = language_model(**options)
        elif kind == "adapters":
            module = language_model(**base, **options)
        elif kind == "fused adapters":
            module = language_model(**{**base, "lora": replace(LORA, dropout=0.0)}, **options)
        else:
            module, data = classifier(**options), spam_data(tiny.tokenizer)
        gradients = Gradients()
        _, losses = fit(
            module,
            data,
            tmp_path,
            max_steps=3,
            limit_val_batches=0,
            precision=precision,
            callbacks=[gradients],
        )
        return losses.losses, gradients

    (losses, gradients), (again, recomputed) = run(switch=False), run(switch=True)
    assert again == losses
    assert recomputed.last.keys() == gradients.last.keys() != set()
    for name, gradient in gradients.last.items():
        assert torch.equal(recomputed.last[name], gradient), name
    assert recomputed.n_calls == 2 * gradients.n_calls > 0


def test_a_block_keeps_its_input_alone(tiny_gpt: MakeGPT) -> None:
    """Beside it only what lies outside the blocks is kept, which is the same for any depth."""
    input_ids = torch.zeros((2, 32), dtype=torch.int64)

    def forward() -> Tensor:
        return model(input_ids)

    plain, checkpointed = [], []
    for n_layer in (2, 5):
        model = tiny_gpt("llama", n_layer=n_layer).train()
        plain.append(kept_bytes(forward, model))
        model.gradient_checkpointing = True
        checkpointed.append(kept_bytes(forward, model))
    width = 2 * 32 * TINY.n_embd * 4  # one residual stream in float32
    assert checkpointed[1] - checkpointed[0] == 3 * width
    # a block keeps more than ten times its input: both norms, q, k, v, attention, three of the MLP
    assert plain[1] - plain[0] > 3 * 10 * width
