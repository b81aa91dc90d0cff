"""Compilation: same numbers, no graph breaks, and none of it where text is generated.

Graphs are traced as for a GPU but run uncompiled; tests/test_gpu.py compiles them.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from pipeline.gpt import GPT
from pipeline.loss import cross_entropies
from pipeline.training import callbacks
from pipeline.training.compiling import RECOMPILE_LIMIT, compile_blocks
from tests.journey import Journey
from tests.training import (
    LORA,
    TINY,
    after_a_validation,
    classifier,
    fit,
    instruction_data,
    language_model,
    pretraining_data,
    spam_data,
)


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler of kernels, and with an error for what cannot be traced in one piece."""
    torch._dynamo.reset()
    counters.clear()
    whole = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)


def n_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("adapters", "precision"),
    [
        (False, "32-true"),
        pytest.param(True, "32-true", marks=pytest.mark.slow),  # as the first, and adapters
        pytest.param(
            True, "bf16-mixed", marks=pytest.mark.slow
        ),  # emulated, it takes half a minute
    ],
)
def test_losses_are_those_of_separate_operations(
    adapters: bool, precision: str, tiny: Journey, tmp_path: Path
) -> None:
    """Micro-batches of many shapes, with padding and without, a validation between them."""
    config = replace(TINY, dropout=0.0)
    lora = replace(LORA, dropout=0.0, targets=["q", "down"])
    base = {"init_from": str(tiny.best("pretrain")), "lora": lora}
    runs = []
    for is_compiled in (False, True):
        own: dict[str, Any] = {"gpt": None, **base} if adapters else {"gpt": config}
        module = language_model(**own, compile=is_compiled)
        data = instruction_data(tiny.tokenizer)
        often = {"limit_val_batches": 0} if adapters else {"val_check_interval": 1}
        _, losses = fit(module, data, tmp_path, max_steps=2, precision=precision, **often)
        runs.append(losses.losses)
        assert (n_graphs() > 0) == is_compiled
        assert (module._cross_entropies is not cross_entropies) == is_compiled
    # in bf16 the norms' gradients, which are not torch's where nothing is compiled, round otherwise
    assert runs[0] == pytest.approx(runs[1], rel=5e-5 if adapters else 1e-5)
    assert n_graphs() < RECOMPILE_LIMIT


def test_of_a_classifier(tiny: Journey, tmp_path: Path) -> None:
    runs = []
    for is_compiled in (False, True):
        module = classifier(gpt=replace(TINY, dropout=0.0), compile=is_compiled)
        _, losses = fit(module, spam_data(tiny.tokenizer), tmp_path, max_steps=3)
        runs.append(losses.losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert n_graphs() > 0


def test_one_graph_for_all_blocks_and_none_for_text(
    tiny: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
    gpt = GPT(replace(TINY, n_layer=4, vocab_size=data.tokenizer.n_vocab))
    compile_blocks(gpt)
    for _ in "ab":
        gpt(torch.arange(12).view(2, 6))
    assert n_graphs() == 1
    tables: list[Any] = []
    run = SimpleNamespace(log_table=lambda rows, _: tables.append(rows))
    monkeypatch.setattr(callbacks, "run_of", lambda _: run)
    module = SimpleNamespace(data=data, model=gpt, is_compiled=True, train=gpt.train)
    callbacks.SampleTexts(["The", "A longer one"], 4).on_validation_end(
        after_a_validation(), module
    )
    assert len(tables[0]) == 2
    assert n_graphs() == 1
    gpt(torch.arange(12).view(2, 6))
    assert n_graphs() == 1, "afterwards it is as before"
