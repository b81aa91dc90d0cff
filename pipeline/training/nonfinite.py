"""Steps whose loss or gradients are not finite: skipped, counted, fatal if too many in a row."""

from dataclasses import dataclass

import lightning.pytorch as pl

from datamodules.batching import MicroBatch
from pipeline.console import warn
from pipeline.training.steps import run_of, sample_ids

MAX_SKIPPED_STEPS = 5  # in a row


class NonFiniteLossError(ValueError):
    """Training diverged: several steps in a row had a loss or gradient that is not finite."""


@dataclass
class NonFiniteGuard:
    """Counts the steps that were skipped; checkpoints keep its fields."""

    in_a_row: int = 0
    in_all: int = 0

    def saw(self, is_finite: bool, trainer: pl.Trainer, batch: list[MicroBatch]) -> None:
        """Counts a step before it is taken; all ranks call this, with the same `is_finite`.

        Raises:
            NonFiniteLossError: too many steps in a row were not finite.
        """
        if is_finite:
            self.in_a_row = 0
            return
        self.in_a_row, self.in_all = self.in_a_row + 1, self.in_all + 1
        ids, step = sample_ids(trainer, batch), trainer.global_step + 1
        shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        warn(f"step {step} was skipped: its gradients are not finite (samples {shown})")
        if run := run_of(trainer):
            run.event("skipped_step", step=step, sample_ids=ids)
        if self.in_a_row >= MAX_SKIPPED_STEPS:
            raise NonFiniteLossError(
                f"{MAX_SKIPPED_STEPS} steps in a row had gradients that are not finite, the last "
                f"of them step {step}; the last checkpoint is untouched by them. Lower "
                "model.optimizer.lr, or look at the samples that the journal names."
            )
