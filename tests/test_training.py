"""The optimizer step, what is trained, what is refused, and golden losses."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from sklearn.metrics import roc_auc_score
from torch import nn

from pipeline.hardware import resolve_precision
from pipeline.runs.run_directory import Run
from pipeline.training.callbacks import SampleTexts
from pipeline.training.lit_language_model import LitLanguageModel
from pipeline.training.nonfinite import MAX_SKIPPED_STEPS, NonFiniteLossError
from pipeline.training.optim import OptimizerConfig
from pipeline.training.run_logger import RunLogger
from tests.journey import Journey
from tests.training import (
    ADAMW,
    LORA,
    TINY,
    classifier,
    fit,
    instruction_data,
    language_model,
    pretraining_data,
    spam_data,
)

GOLDEN = Path(__file__).with_name("golden_losses.json")


class Gradients(pl.Callback):
    """Keeps the (clipped) gradients of the first step."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        return

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if not self.first:
            self.first = {
                name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None
            }


@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_max_tokens_changes_no_gradient(kind: str, tiny: Journey, tmp_path: Path) -> None:
    """1 x 8, 8 x 1 and anything between: the same step. Float32 sums in another order: 1e-6."""
    gpt = TINY.__class__(**{**TINY.__dict__, "dropout": 0.0})
    found = []
    for max_tokens in (1, 200, 400, 100_000):
        gradients = Gradients()
        if kind == "classifier":
            module: Any = classifier(gpt=gpt)
            data: Any = spam_data(tiny.tokenizer, max_tokens=max_tokens)
        else:
            module = language_model(gpt=gpt)
            data = instruction_data(tiny.tokenizer, max_tokens=max_tokens)
        fit(module, data, tmp_path, max_steps=1, limit_val_batches=0, callbacks=[gradients])
        found.append(gradients.first)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            assert torch.allclose(gradient, other[name], atol=1e-6, rtol=0), name


@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_a_validation_with_a_loss_that_is_no_number_says_so(
    kind: str, tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of the others would make such a model the best so far."""
    if kind == "classifier":
        module: Any = classifier()
        data: Any = spam_data(tiny.tokenizer)
    else:
        module, data = language_model(), instruction_data(tiny.tokenizer)
    forward, n_passes = torch.nn.RMSNorm.forward, []

    def overflowing(norm: Any, x: torch.Tensor) -> torch.Tensor:
        n_passes.append(1)
        return forward(norm, x) * (math.nan if len(n_passes) == 1 else 1.0)

    trainer, _ = fit(module, data, tmp_path, max_steps=1, limit_val_batches=0)
    trainer.limit_val_batches = 1.0
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", overflowing)
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    assert len(n_passes) > 10
    assert math.isnan(found["val/loss"])


@pytest.mark.parametrize("kind", ["pretraining", "instructions", "texts"])
def test_a_validation_is_the_mean_over_all_that_is_predicted(
    kind: str, tiny: Journey, tmp_path: Path
) -> None:
    """Every token or text weighs the same, whatever it goes through the model with, each time."""
    module: Any = classifier() if kind == "texts" else language_model()
    data: Any = {
        "pretraining": lambda: pretraining_data(tiny.tokenizer, tiny.folder / "prose"),
        "instructions": lambda: instruction_data(tiny.tokenizer),
        "texts": lambda: spam_data(tiny.tokenizer),
    }[kind]()
    trainer, _ = fit(module, data, tmp_path, max_steps=1, limit_val_batches=0)
    for limit in (1, 1.0):  # one batch, of which the next validation knows nothing, then all
        trainer.limit_val_batches = limit
        (found,) = trainer.validate(module, datamodule=data, verbose=False)
    model, samples = module.model.eval(), [data.val_set[i] for i in range(len(data.val_set))]
    with torch.inference_mode():
        hidden = [model(sample["input_ids"][None]) for sample in samples]
        if kind == "texts":
            logits, labels = torch.cat(hidden), torch.tensor([s["label"] for s in samples])
        else:
            logits = torch.cat([model.head(states)[0, :-1] for states in hidden])
            labels = torch.cat([sample["labels"][1:] for sample in samples])
        loss = float(F.cross_entropy(logits, labels))
    wanted = {"val/loss": loss}
    if kind == "texts":
        spam, positive = labels == 1, logits.argmax(dim=-1) == 1
        wanted["val/accuracy"] = float((spam == positive).float().mean())
        wanted["val/recall"] = float(positive[spam].float().mean())
        wanted["val/auroc"] = float(roc_auc_score(labels, logits.softmax(dim=-1)[:, 1]))
    else:
        wanted["val/perplexity"] = math.exp(loss)
        with torch.inference_mode():
            rows = [row for step in data.val_dataloader() for row in module.predict_step(step, 0)]
        n_tokens = sum(row["tokens"] for row in rows)
        assert sum(row["nats"] for row in rows) / n_tokens == pytest.approx(loss, rel=1e-5)
    if kind == "pretraining":
        n_bytes = len(data.heldout_bytes()) / data.corpus.facts["tokens"]["val"]
        wanted["val/bits_per_byte"] = loss / math.log(2) / n_bytes
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)  # float32


@pytest.mark.parametrize("with_schedule", [False, True])
def test_a_subclass_may_have_an_optimizer_of_its_own(
    with_schedule: bool, tiny: Journey, tmp_path: Path
) -> None:
    class Own(LitLanguageModel):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)
            return ([optimizer], [schedule]) if with_schedule else optimizer

    module, data = Own(optimizer=ADAMW, gpt=TINY), instruction_data(tiny.tokenizer)
    fit(module, data, tmp_path, max_steps=2)
    assert module.global_step == 2
    assert module.gpt.n_tokens == data.tokenizer.n_vocab < module.gpt.config.vocab_size


def test_training_learns(tiny: Journey, tmp_path: Path) -> None:
    data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
    module = language_model(optimizer=OptimizerConfig(**{**ADAMW.__dict__, "lr": 5e-3}))
    _, losses = fit(module, data, tmp_path, max_steps=60, limit_val_batches=0)
    start, end = sum(losses.losses[:5]) / 5, sum(losses.losses[-5:]) / 5
    assert start > 5.0, "an untrained model is near ln(vocabulary)"
    assert end < 0.6 * start


@pytest.mark.parametrize("trainable", ["head", "last_block", "all", "lora"])
def test_only_what_is_named_is_trained(trainable: str, tiny: Journey, tmp_path: Path) -> None:
    lora = LORA if trainable == "lora" else None
    module = classifier(
        gpt=None, init_from=str(tiny.best("pretrain")), trainable=trainable, lora=lora
    )
    data = spam_data(tiny.tokenizer)
    before: dict[str, torch.Tensor] = {}

    class Remember(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            before.update({n: p.detach().clone() for n, p in module.model.named_parameters()})
            assert all(part.training for part in module.modules()), "nothing would be dropped out"

    fit(module, data, tmp_path, max_steps=3, limit_val_batches=0, callbacks=[Remember()])
    moved = {n for n, p in module.model.named_parameters() if not torch.equal(p, before[n])}
    n_layer = len(module.model.gpt.blocks)
    last = {n for n in before if n.startswith((f"gpt.blocks.{n_layer - 1}.", "gpt.final_norm"))}
    expected = {
        "head": set(),
        "last_block": last,
        "all": {n for n in before if n.startswith("gpt.")},
        "lora": {n for n in before if ".lora_" in n},
    }[trainable]
    assert moved == expected | {"classifier.weight"}


def test_a_classifier_keeps_the_order_of_its_labels(tiny: Journey, tmp_path: Path) -> None:
    module = classifier(gpt=None, init_from=str(tiny.best("spam")), trainable="head")
    data = spam_data(tiny.tokenizer)
    data.label_names.reverse()
    with pytest.raises(ValueError, match=r"\['spam', 'ham'\].*\['ham', 'spam'\].*same order"):
        fit(module, data, tmp_path, max_steps=1, limit_val_batches=0)


class Spoil(pl.Callback):
    """Makes the gradient of some steps infinite."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.global_step in self.steps:
            next(p for p in module.parameters() if p.grad is not None).grad.fill_(torch.inf)


def test_a_step_that_is_not_finite_never_reaches_the_weights(
    tiny: Journey, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = language_model()
    data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
    trainer, losses = fit(
        module, data, tmp_path, max_steps=6, limit_val_batches=0, callbacks=[Spoil({2, 3})]
    )
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    assert float(trainer.callback_metrics["train/skipped_steps"]) == 2
    first, second = (line for line in capsys.readouterr().err.splitlines() if "skipped" in line)
    assert "step 3 was skipped: its gradients are not finite" in first
    named = re.findall(r"\d+", second.partition("samples")[2])
    assert {int(i) for i in named} == set(losses.sample_ids[3])


def test_many_such_steps_end_the_run(tiny: Journey, tmp_path: Path) -> None:
    data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
    spoil = Spoil(set(range(2, 20)))
    with pytest.raises(NonFiniteLossError, match=r"step 7; .* Lower model\.optimizer\.lr"):
        fit(language_model(), data, tmp_path, max_steps=20, limit_val_batches=0, callbacks=[spoil])
    assert MAX_SKIPPED_STEPS == 5


class Diverge(pl.Callback):
    """Has no loss but NaN from the third step on."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            module.loss_sum = lambda batch: math.nan * type(module).loss_sum(module, batch)


class UnscaledFirst(pl.Callback):
    """Has gradients unscaled before they are clipped, as it is on a GPU: only on a CPU AdamW is
    fused, and would do that by itself."""

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        (optimizer,) = trainer.optimizers
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def test_under_a_scaler_overflows_are_routine_and_losses_are_not(
    tiny: Journey, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(callback: pl.Callback) -> pl.Trainer:
        data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
        options: dict[str, Any] = {"max_steps": 20, "limit_val_batches": 0}
        plugins = [MixedPrecision("16-mixed", "cpu")]  # on a GPU, Lightning adds it by itself
        folder = tmp_path / type(callback).__name__
        return fit(
            language_model(),
            data,
            folder,
            callbacks=[callback, UnscaledFirst()],
            plugins=plugins,
            **options,
        )[0]

    trainer = half(Spoil({2, 3}))
    assert float(trainer.callback_metrics["train/skipped_steps"]) == 0
    assert "skipped" not in capsys.readouterr().err
    with pytest.raises(NonFiniteLossError, match="step 7"):
        half(Diverge())


@pytest.mark.parametrize("max_grad_norm", [0.01, 1e9])
def test_gradients_are_clipped(max_grad_norm: float, tiny: Journey, tmp_path: Path) -> None:
    gradients = Gradients()
    config = OptimizerConfig(**{**ADAMW.__dict__, "max_grad_norm": max_grad_norm})
    data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
    trainer, _ = fit(
        language_model(optimizer=config),
        data,
        tmp_path,
        max_steps=1,
        limit_val_batches=0,
        callbacks=[gradients],
    )
    norm = nn.utils.get_total_norm(gradients.first.values())
    logged = float(trainer.callback_metrics["train/grad_norm"])  # before it was clipped
    assert float(norm) == pytest.approx(min(max_grad_norm, logged), rel=1e-3)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_precision_follows_the_hardware(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.cpu.get_capabilities()
    of_cpu = "bf16-mixed" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "32-true"
    assert resolve_precision("auto", "cpu") == of_cpu
    for accelerator in ("cpu",) if torch.cuda.is_available() else ("cpu", "auto"):
        with pytest.raises(ValueError, match="16-mixed, which takes a GPU; give auto"):
            resolve_precision("16-mixed", accelerator)
    assert resolve_precision("16-mixed", "cuda") == "16-mixed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert resolve_precision("auto", "cpu") == of_cpu
    assert resolve_precision("auto", "auto") == ("bf16-mixed" if has_bf16 else "32-true")
    assert resolve_precision("16-mixed", "auto") == "16-mixed"


def test_bf16_mixed_trains_close_to_float32(tiny: Journey, tmp_path: Path) -> None:
    """bf16 keeps 8 bits of mantissa: losses of the first steps agree to 2 %."""
    runs = []
    for precision in ("32-true", "bf16-mixed"):
        data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
        gpt = TINY.__class__(**{**TINY.__dict__, "dropout": 0.0})
        module = language_model(gpt=gpt)
        _, losses = fit(
            module, data, tmp_path, max_steps=5, limit_val_batches=0, precision=precision
        )
        assert all(p.dtype == torch.float32 for p in module.parameters())
        runs.append(losses.losses)
    assert runs[1] == pytest.approx(runs[0], rel=0.02)
    assert runs[1] != runs[0]


def test_under_autocast_only_the_frozen_base_is_bf16(tiny: Journey, tmp_path: Path) -> None:
    """Adapters and the new head are trained, and saved, in float32."""
    module = classifier(gpt=None, init_from=str(tiny.best("pretrain")), lora=LORA, trainable="lora")
    data = spam_data(tiny.tokenizer)
    fit(module, data, tmp_path, max_steps=2, limit_val_batches=0, precision="bf16-mixed")
    kinds = {(p.requires_grad, p.dtype) for p in module.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert module.model.classifier.weight.requires_grad


def test_sample_texts_of_adapters_under_autocast(tiny: Journey, tmp_path: Path) -> None:
    """They are generated between steps, from a base that is bf16 and adapters that are not."""
    module = language_model(gpt=None, init_from=str(tiny.best("pretrain")), lora=LORA)
    data = instruction_data(tiny.tokenizer)
    run = Run.open(tmp_path / "mlruns" / "default" / "run")
    journal = RunLogger(run)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=1,
        logger=journal,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        val_check_interval=1,
        limit_val_batches=1,
        default_root_dir=str(run.path),
        callbacks=[SampleTexts(prompts=["Hello"], max_new_tokens=3)],
    )
    journal.trainer = trainer
    trainer.fit(module, datamodule=data)
    assert list((run.path / "samples").glob("*.json"))
    run.finish({}, {}, {})


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_golden_losses(name: str, tiny: Journey, tmp_path: Path) -> None:
    """20 tiny steps give the losses that are on record, to 1e-3: another CPU adds in another order.

    A change that is meant to change them: delete tests/golden_losses.json and run this test twice.
    """
    config = OptimizerConfig(**{**ADAMW.__dict__, "name": name})
    data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
    module = language_model(optimizer=config)
    _, losses = fit(module, data, tmp_path, max_steps=20, limit_val_batches=0)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if name not in golden:
        golden[name] = [round(loss, 6) for loss in losses.losses]
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
        pytest.fail(f"there were no golden losses of {name}; written now, run again")
    assert losses.losses == pytest.approx(golden[name], rel=1e-3), self_help(name)


class Rates(pl.Callback):
    """Collects the learning rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_a_longer_run_goes_on_by_its_own_schedule(tiny: Journey, tmp_path: Path) -> None:
    """From its first step on: the rate in the checkpoint is of the end of the shorter one."""

    def rates(folder: str, **options: Any) -> list[float]:
        data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
        seen = Rates()
        module = language_model(optimizer=replace(ADAMW, warmup_steps=2))
        fit(module, data, tmp_path / folder, callbacks=[seen], **options)
        return seen.rates

    rates("a", max_steps=3, limit_val_batches=0)
    (path,) = tmp_path.glob("a/checkpoints/step-00000003")
    longer = rates("b", max_steps=6, limit_val_batches=0, ckpt_path=path)
    whole = rates("c", max_steps=6, limit_val_batches=0)
    assert whole[:3] == [ADAMW.lr / 2, ADAMW.lr, ADAMW.lr]
    assert longer == whole[3:]


def self_help(name: str) -> str:
    return f"losses of {name} changed; where that is meant, delete {GOLDEN.name} and run twice"


@pytest.mark.parametrize(("n_steps", "n_left"), [(4, 0), (5, 1)])
def test_steps_after_the_last_validation_are_told_of(
    n_steps: int, n_left: int, tiny: Journey, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(language_model(), data, tmp_path, max_steps=n_steps, **options)
    err = capsys.readouterr().err
    assert ("steps were not validated" in err) == bool(n_left)
    assert not n_left or f"the last {n_left} steps" in err
    fit(language_model(), data, tmp_path / "none", max_steps=1, **options)
    assert "nothing was validated, so " in capsys.readouterr().err
