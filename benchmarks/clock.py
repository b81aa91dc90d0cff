"""A callback that records the steps of `fit`, through the command line as users start it."""

import time
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from benchmarks.record import Record
from datamodules.batching import MicroBatch
from pipeline.training.steps import n_real_tokens


class StepClock(pl.Callback):
    """All that is between two steps counts: data, logging, checkpoints; validations do not.

    The record has the seconds of the module's own part of each step too, as `module_s`.

    Args:
        path: of the record.
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
