"""A run that was stopped goes on exactly where it was: order, losses, weights, best checkpoint."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from pipeline.checkpoint import newest_valid, read_tensors
from pipeline.checkpointing import Checkpoints
from pipeline.journal import read_journal
from tests.journey import CONFIGS, PLAIN, TINY, Journey, run
from tests.training import LORA, classifier, fit, language_model, pretraining_data, spam_data

STEPS = 12
EVERY = 2


class KeepAll(pl.Callback):
    """Copies every checkpoint away before it is pruned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        for path in (Path(trainer.default_root_dir) / "checkpoints").glob("step-*"):
            if not (self.folder / path.name).exists():
                shutil.copytree(path, self.folder / path.name)


def spam_lora(journey: Journey) -> tuple[Any, Any]:
    data = spam_data(journey.tokenizer)
    base = str(journey.best("pretrain"))
    return classifier(gpt=None, init_from=base, lora=LORA, trainable="lora"), data


def spam_full(journey: Journey) -> tuple[Any, Any]:
    return classifier(), spam_data(journey.tokenizer)


def pretraining(journey: Journey) -> tuple[Any, Any]:
    data = pretraining_data(journey.tokenizer, journey.folder / "prose", batch_size=32)
    return language_model(), data


CASES = {
    "full, validation inside the epoch": (
        spam_full,
        {"max_steps": STEPS, "val_check_interval": 5, "check_val_every_n_epoch": None},
    ),
    "full, no validation": (spam_full, {"max_steps": STEPS, "limit_val_batches": 0}),
    "lora, validation inside the epoch": (
        spam_lora,
        {"max_steps": STEPS, "val_check_interval": 4, "check_val_every_n_epoch": None},
    ),
    "pretraining over epochs": (pretraining, {"max_epochs": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(case: str, tiny: Journey, tmp_path: Path) -> None:
    make: Callable[[Journey], tuple[Any, Any]]
    make, length = CASES[case]  # type: ignore[assignment]
    copies = tmp_path / "copies"
    module, data = make(tiny)
    whole, losses = fit(
        module, data, tmp_path / "whole", every_n_steps=EVERY, callbacks=[KeepAll(copies)], **length
    )
    assert len(losses.losses) == whole.global_step
    kept = sorted(copies.iterdir())
    assert len(kept) >= 4
    for path in kept:
        step = int(path.name.removeprefix("step-"))
        again, data = make(tiny)
        resumed, tail = fit(
            again, data, tmp_path / path.name, ckpt_path=path, every_n_steps=EVERY, **length
        )
        assert resumed.global_step == whole.global_step
        assert tail.sample_ids == losses.sample_ids[step:], f"{path.name}: other samples"
        assert tail.losses == losses.losses[step:], f"{path.name}: other losses"
        for name, tensor in module.model.state_dict().items():
            assert torch.equal(tensor, again.model.state_dict()[name]), f"{path.name}: {name}"
        assert best_of(resumed) == best_of(whole)


def best_of(trainer: pl.Trainer) -> Any:
    return next(c.best for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore


def test_other_data_is_refused(tiny: Journey, tmp_path: Path) -> None:
    module, data = spam_full(tiny)
    fit(module, data, tmp_path, max_steps=2, limit_val_batches=0)
    path = newest_valid(tmp_path / "checkpoints")
    again = classifier()
    with pytest.raises(
        ValueError, match="the checkpoint was made with batch_size 8, this run has 4"
    ):
        fit(
            again,
            spam_data(tiny.tokenizer, batch_size=4),
            tmp_path / "again",
            ckpt_path=path,
            max_steps=4,
            limit_val_batches=0,
        )


def test_another_base_is_refused(tiny: Journey, tmp_path: Path) -> None:
    module, data = spam_lora(tiny)
    fit(module, data, tmp_path, max_steps=2, limit_val_batches=0)
    path = newest_valid(tmp_path / "checkpoints")
    other = tiny.outcomes["instruct"]["outputs"]["best"]  # the base, with its adapter merged
    again = classifier(gpt=None, init_from=other, lora=LORA, trainable="lora")
    with pytest.raises(ValueError, match="which holds other weights"):
        fit(
            again,
            spam_data(tiny.tokenizer),
            tmp_path / "again",
            ckpt_path=path,
            max_steps=4,
            limit_val_batches=0,
        )


def test_killed_for_real_and_started_again(
    tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the middle of `fit`; the same command goes on and ends with equal bits."""
    words = [
        "fit",
        f"--config={CONFIGS}/pretrain.yaml",
        *TINY,
        *PLAIN,
        f"--data.source=[{tiny.folder / 'prose'}]",
        f"--data.tokenizer={tiny.tokenizer}",
        "--data.near_duplicates=null",
        "--trainer.max_steps=60",
        "--trainer.val_check_interval=20",
        "--checkpoints.every_n_steps=5",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(whole))
    assert run(*words) == 0
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(killed))
    process = subprocess.Popen([sys.executable, "-m", "pipeline", *words])
    while not list(killed.glob("default/*/checkpoints/step-*")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = newest_valid(next(killed.glob("default/*/checkpoints")))
    assert stopped is not None
    assert not list(killed.glob("default/*/outcome.json")), "it ended before it was killed"
    assert run(*words) == 0
    last = "default/*/checkpoints/step-00000060"
    (ours,), (theirs,) = whole.glob(last), killed.glob(last)
    tensors, others = read_tensors(ours), read_tensors(theirs)
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert losses_of(theirs.parents[1]) == losses_of(ours.parents[1])


def losses_of(path: Path) -> dict[int, float]:
    return {
        line["step"]: line["values"]["train/loss"]
        for line, _ in read_journal(path)
        if line["kind"] == "metric" and "train/loss" in line["values"]
    }
