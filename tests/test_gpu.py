"""What needs a CUDA device; run with `make gpu-test` on a machine that has one."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from pipeline.decoding import step_graph
from pipeline.decoding.generate import Batch, generate, generate_each
from pipeline.decoding.packed import pack
from pipeline.decoding.prefix_cache import PrefixCache
from pipeline.decoding.sampling import Sampling
from pipeline.gpt import GPT
from pipeline.inference import label_probabilities, load_classifier
from pipeline.models import load
from pipeline.training import training_graph
from tests.journey import Journey
from tests.training import (
    ADAMW,
    LORA,
    TINY,
    Losses,
    classifier,
    fit,
    instruction_data,
    language_model,
    pretraining_data,
    spam_data,
)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once; sums in a fixed order
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytestmark = [pytestmark, pytest.mark.skip("no CUDA device")]

PROMPTS = [[5, 6, 7], [11], list(range(20, 33))]
EAGER = {"cuda_graphs": False}
GRAPHS = {"cuda_graphs": True}
N_STEPS = 8
DEVICE = "cuda"


@pytest.fixture
def in_order() -> Iterator[None]:
    """Sums in a fixed order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Killed(Exception):
    pass


class KillAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def trained(module: Any, data: Any, folder: Path, precision: str) -> list[float]:
    """The losses of a few steps."""
    pl.seed_everything(1, verbose=False)
    losses = Losses()
    trainer = pl.Trainer(
        accelerator=DEVICE,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=N_STEPS,
        limit_val_batches=1,
        val_check_interval=N_STEPS // 2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        callbacks=[losses],
    )
    trainer.fit(module, datamodule=data)
    return losses.losses


@pytest.mark.parametrize("options", [EAGER, GRAPHS], ids=["eager", "graphs"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_pretraining(precision: str, options: Any, tiny: Journey, tmp_path: Path) -> None:
    data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
    module = language_model(**options)
    losses = trained(module, data, tmp_path, precision)
    assert losses[-1] < losses[0]
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


@pytest.mark.parametrize("options", [EAGER, GRAPHS], ids=["eager", "graphs"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_adapters(precision: str, options: Any, tiny: Journey, tmp_path: Path) -> None:
    data = spam_data(tiny.tokenizer)
    base = str(tiny.best("pretrain"))
    module = classifier(gpt=None, init_from=base, lora=LORA, trainable="lora", **options)
    trained(module, data, tmp_path, precision)
    moved = {n: p for n, p in module.named_parameters() if "lora_B" in n}  # they begin at 0
    assert moved
    assert all(bool(torch.isfinite(p).all()) and bool(p.any()) for p in moved.values())


@pytest.mark.parametrize("trainable", ["head", "last_block", "all"])
def test_a_classifier(trainable: str, tiny: Journey, tmp_path: Path) -> None:
    base = str(tiny.best("pretrain"))
    losses = []
    for options in (EAGER, {}):
        module = classifier(gpt=None, init_from=base, trainable=trainable, **options)
        losses.append(trained(module, spam_data(tiny.tokenizer), tmp_path, "32-true"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


KINDS: dict[str, dict[str, Any]] = {
    "all": {"gpt": replace(TINY, dropout=0.0)},
    "untied": {"gpt": replace(TINY, dropout=0.0, tie_embeddings=False)},
    "adapters": {"lora": replace(LORA, dropout=0.0)},
    "muon": {"gpt": replace(TINY, dropout=0.0), "optimizer": replace(ADAMW, name="muon")},
    "dora": {"lora": replace(LORA, dropout=0.0, dora=True)},
}


@pytest.mark.parametrize("options", [GRAPHS, {**EAGER, "compile": True}, {"compile": True}])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("precision", "near"), [("32-true", 1e-4), ("bf16-mixed", 0.02)])
def test_the_losses_of_separate_operations(
    kind: str, options: Any, precision: str, near: float, tiny: Journey, tmp_path: Path
) -> None:
    """Steps of several micro-batches of unequal rows, some of one shape, so of one graph."""
    if "compile" in options and kind not in ("all", "adapters"):
        pytest.skip("a minute of compiling, for what the others show")
    begun = {} if "gpt" in KINDS[kind] else {"gpt": None, "init_from": str(tiny.best("pretrain"))}
    losses = []
    for own in (EAGER, options):
        module = language_model(**KINDS[kind], **begun, **own)
        losses.append(trained(module, instruction_data(tiny.tokenizer), tmp_path, precision))
    assert losses[0] == pytest.approx(losses[1], rel=near)


def test_gradients_of_captured_passes(tiny_gpt: Callable[..., GPT]) -> None:
    gpt = tiny_gpt("llama", block_size=100).to(DEVICE).train()
    gpt.forward = graphs = training_graph.TrainingGraphs(gpt)  # type: ignore[method-assign]
    earlier, ids = torch.randint(1, 90, (2, 3, 2, 64), device=DEVICE)

    def gradients(parts: torch.Tensor) -> list[torch.Tensor]:
        gpt.zero_grad()
        for part in parts:
            (gpt(part) ** 2).sum().backward()
        return [p.grad.clone() for p in gpt.parameters() if p.grad is not None]

    gradients(earlier)
    found = gradients(ids)
    assert list(graphs.captured) == [(2, 64)]
    with training_graph.left_out(gpt):
        torch.testing.assert_close(found, gradients(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [EAGER, GRAPHS], ids=["eager", "graphs"])
def test_a_run_goes_on_to_the_last_bit(
    options: Any, tiny: Journey, tmp_path: Path, in_order: None
) -> None:
    """With dropout, in bf16; sums on a GPU are of no fixed order unless that is asked for."""
    weights = []
    for killed_at in ([], [5]):
        folder = tmp_path / f"killed-{len(killed_at)}"
        for step in [*killed_at, None]:
            module = language_model(**options)
            with suppress(Killed):
                fit(
                    module,
                    instruction_data(tiny.tokenizer),
                    folder,
                    ckpt_path=max(folder.glob("checkpoints/step-*"), default=None),
                    callbacks=[KillAt(step)] if step else [],
                    every_n_steps=3,
                    accelerator=DEVICE,
                    precision="bf16-mixed",
                    max_steps=N_STEPS,
                    limit_val_batches=0,
                )
            assert module.global_step == (step or N_STEPS)
        weights.append(module.model.tensors())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_dropout_of_a_graph_differs_between_steps(tiny: Journey, tmp_path: Path) -> None:
    data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
    no_rate = replace(language_model().optimizer_config, lr=1e-30)
    options = {"gpt": replace(TINY, dropout=0.5), "optimizer": no_rate, **GRAPHS}
    runs = [trained(language_model(**options), data, tmp_path, "32-true") for _ in "ab"]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == N_STEPS


def test_shapes_too_many_are_computed_alike(
    tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_order: None
) -> None:
    """To the last bit, dropout too: a run that goes on may have met other shapes first."""
    losses, shapes = [], []
    capture = training_graph.TrainingGraphs._capture

    def counted(self: Any, shape: tuple[int, int]) -> Any:
        shapes.append(shape)
        return capture(self, shape)

    monkeypatch.setattr(training_graph.TrainingGraphs, "_capture", counted)
    for max_shapes in (32, 1):
        shapes.clear()
        monkeypatch.setattr(training_graph, "MAX_SHAPES", max_shapes)
        data = instruction_data(tiny.tokenizer)
        losses.append(trained(language_model(**GRAPHS), data, tmp_path, "bf16-mixed"))
        assert (len(shapes) == 1) == (max_shapes == 1)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_text_of_a_cpu(tiny_gpt: Callable[..., GPT], family: str) -> None:
    settings = Sampling(max_new_tokens=30)
    expected = generate(tiny_gpt(family), PROMPTS, settings)
    assert generate(pack(tiny_gpt(family).to("cuda")), PROMPTS, settings) == expected


def test_the_texts_of_a_cpu_where_rows_come_and_go(
    tiny_gpt: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of unequal lengths, on stores that grow and shrink, a step in several shapes."""
    captured = []
    capture = step_graph.StepGraph._capture

    def counted(self: step_graph.StepGraph) -> None:
        captured.append(self.input_ids.shape)
        capture(self)

    monkeypatch.setattr(step_graph.StepGraph, "_capture", counted)
    cpu, gpu = tiny_gpt("llama", block_size=256), pack(tiny_gpt("llama", block_size=256).to("cuda"))
    prompts = [list(range(i, 2 * i + 1)) for i in range(1, 25)]
    settings = [Sampling(max_new_tokens=5 + 17 * (i % 9)) for i in range(len(prompts))]
    expected = [generate(cpu, [p], s)[0] for p, s in zip(prompts, settings, strict=True)]

    batch, rows, waiting = Batch(gpu, PrefixCache(4)), {}, list(range(len(prompts)))
    while waiting or batch.rows:
        if waiting and len(batch.rows) < 5:
            i = waiting.pop()
            (rows[i],) = batch.join([prompts[i]], [settings[i]])
        else:
            batch.step()
    assert [rows[i].ids[len(p) :] for i, p in enumerate(prompts)] == expected
    assert len(captured) > 3
    longest = Sampling(max_new_tokens=200)
    assert (
        dict(generate_each(gpu, prompts[:1], longest, max_rows=1))[0]
        == generate(cpu, prompts[:1], longest)[0]
    )
    assert any(n_tokens > 1 for _, n_tokens in captured), "guesses are checked in graphs too"


def test_the_labels_of_a_cpu(tiny: Journey) -> None:
    path, texts = tiny.best("spam"), ["Win a prize now", "See you at six", "ok"]
    there, here = load_classifier(str(path)), load(path)
    assert there.device.type == "cuda"
    assert label_probabilities(there, texts) == [
        pytest.approx(row, abs=1e-4) for row in label_probabilities(here, texts)
    ]
