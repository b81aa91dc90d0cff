"""Options of Lightning's trainer that meet this project's own: refused by name, or put right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from pipeline.launchers import n_started

# an option, its values without effect, and what to use instead
_NOT_HERE = (
    (
        "accumulate_grad_batches",
        (1,),
        "here a batch is an optimizer step: set data.batch_size, data.max_tokens for memory.",
    ),
    ("fast_dev_run", (False, 0), "it keeps nothing; use check, or trainer.max_steps."),
    ("overfit_batches", (0,), "steps are drawn anew every epoch: give a data.source of few rows."),
    ("reload_dataloaders_every_n_epochs", (0,), "data stay as they are; leave it out."),
    ("gradient_clip_val", (None, 0), "set model.optimizer.max_grad_norm."),
    ("enable_checkpointing", (None, True), "a run goes on from its own; see checkpoints."),
    ("default_root_dir", (None,), "runs lie below GPT_PIPELINE_HOME, or else mlruns: set that."),
)


def check_trainer(options: Any, *, is_test: bool) -> None:
    """Refuses what cannot be meant here.

    Args:
        options: those of the trainer, parsed.
        is_test: they are for `test`.

    Raises:
        ValueError: naming the key, and what to use instead.
    """
    for key, usual, remedy in _NOT_HERE:
        if options[key] not in usual:
            raise ValueError(f"trainer.{key} is {options[key]}; {remedy}")
    if options.logger is False:
        raise ValueError("trainer.logger is False; a run always keeps a journal: leave it out.")
    if options.val_check_interval == 0:
        raise ValueError(
            "trainer.val_check_interval is 0; give the steps between validations, or to have "
            "none trainer.limit_val_batches: 0."
        )
    limit = options.limit_test_batches  # 1 is a batch, 1.0 is all
    is_all = limit is None or (limit == 1 and not isinstance(limit, int))
    if is_test and not is_all:
        raise ValueError(
            f"trainer.limit_test_batches is {limit}; a test is of the whole test set, leave it out."
        )


def check_processes(trainer: pl.Trainer) -> None:
    """Refuses processes that would train side by side, or that would share this one's open run.

    Raises:
        ValueError: naming the key, and what to use instead.
    """
    n_processes = n_started()
    if n_processes > 1 and n_processes != trainer.world_size:
        raise ValueError(
            f"{n_processes} processes were started, but trainer.devices, num_nodes and strategy "
            f"make {trainer.world_size} of them: add -c configs/trainer/ddp.yaml (or fsdp2.yaml) "
            "with trainer.devices as many as there are on a node, or start one."
        )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            "trainer.strategy forks or spawns its processes, which cannot share an open run; give "
            "ddp, which starts the command again."
        )


def check_callbacks(callbacks: Sequence[pl.Callback]) -> None:
    """Has early stopping judge a validation before its checkpoint is written, which keeps that.

    Raises:
        ValueError: for a callback that cannot be meant here.
    """
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            raise ValueError(
                f"trainer.callbacks has a {type(callback).__name__}; a run writes its checkpoints "
                "anyway: set checkpoints.monitor, mode, every_n_steps, keep_best and keep_last."
            )
        if isinstance(callback, EarlyStopping):
            if callback._check_on_train_epoch_end:
                raise ValueError(
                    "EarlyStopping.check_on_train_epoch_end is true; a resumed run would not know "
                    "what was seen there: leave it out."
                )
            callback._check_on_train_epoch_end = False
