"""A callback that records the steps of `fit`, started from the command line as users do."""

import time
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from benchmarks.record import Record
from datamodules.batching import MicroBatch
from pipeline.training.steps import n_real_tokens


class StepClock(pl.Callback):
    """Everything between two steps counts (data, logging, checkpoints), except validation.

    The record also has the seconds that the module itself takes of each step, as `module_s`.

    Args:
        path: where the record is written.
    """

    def __init__(self, path: str) -> None:
        self.record = Record(path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The first step begins."""
        step, seconds = pl_module.training_step, self.record.facts.setdefault("module_s", [])

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            loss = step(*args, **options)
            seconds.append(time.perf_counter() - start)
            return loss

        pl_module.training_step = timed
        self.record.start()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: dict[str, Tensor],
        batch: list[MicroBatch],
        batch_idx: int,
    ) -> None:
        """A step has ended."""
        self.record.step(n_real_tokens(batch), float(outputs["loss"]))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The next step begins."""
        self.record.validation(float(trainer.callback_metrics["val/loss"]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Writes the record."""
        self.record.save()
