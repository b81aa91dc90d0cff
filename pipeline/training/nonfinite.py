"""Steps whose loss or gradients are not finite: skipped, counted, and in the end too many."""

import lightning.pytorch as pl

from datamodules.batching import MicroBatch
from pipeline.console import warn
from pipeline.training.steps import run_of, sample_ids

MAX_SKIPPED_STEPS = 5  # in a row


class NonFiniteLossError(ValueError):
    """Training diverged: several steps in a row had a loss or gradient that is not finite."""


class NonFiniteGuard:
    """Counts the steps that were skipped; the counts survive a resume."""

    def __init__(self) -> None:
        self.in_a_row = self.in_all = 0

    def saw(self, is_finite: bool, trainer: pl.Trainer, batch: list[MicroBatch]) -> None:
        """Takes in a step before it is taken; all ranks call it, with the same answer.

        Raises:
            NonFiniteLossError: it is one too many.
        """
        if is_finite:
            self.in_a_row = 0
            return
        self.in_a_row, self.in_all = self.in_a_row + 1, self.in_all + 1
        _say_what_is_skipped(trainer, batch)
        if self.in_a_row >= MAX_SKIPPED_STEPS:
            raise NonFiniteLossError(
                f"{MAX_SKIPPED_STEPS} steps in a row had gradients that are not finite, the last "
                f"of them step {trainer.global_step + 1}; the last checkpoint is untouched by "
                "them. Lower model.optimizer.lr, or look at the samples that the journal names."
            )

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"in_a_row": self.in_a_row, "in_all": self.in_all}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restores what `state_dict` gave."""
        self.in_a_row, self.in_all = state_dict["in_a_row"], state_dict["in_all"]


def _say_what_is_skipped(trainer: pl.Trainer, batch: list[MicroBatch]) -> None:
    """The samples of a step that is not taken, in the journal and on stderr."""
    ids, step = sample_ids(trainer, batch), trainer.global_step + 1
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    warn(f"step {step} was skipped: its gradients are not finite (samples {shown})")
    if run := run_of(trainer):
        run.event("skipped_step", step=step, sample_ids=ids)
