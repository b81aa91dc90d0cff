"""What the trainer knows of a step: whether it is logged, its samples, the run that it is of."""

import lightning.pytorch as pl

from datamodules.batching import MicroBatch
from pipeline.runs.run_directory import Run
from pipeline.training.sharding import of_ranks


def run_of(trainer: pl.Trainer) -> Run | None:
    """The open run, where there is one to log to."""
    run = getattr(trainer.logger, "run", None)
    return run if isinstance(run, Run) else None


def is_logged_step(trainer: pl.Trainer) -> bool:
    """Whether the step just taken is one that Lightning logs, or the last of an epoch or the run.

    `log` costs the better part of a millisecond, whether Lightning writes the value or not.
    """
    step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
    is_due = every > 0 and step % every == 0
    return is_due or trainer.is_last_batch or step == trainer.max_steps


def n_real_tokens(batch: list[MicroBatch]) -> int:
    """Tokens of a step, padding left out."""
    return sum(
        int(mb["attention_mask"].sum()) if "attention_mask" in mb else mb["input_ids"].numel()
        for mb in batch
    )


def validation_steps(
    n_steps: int, n_between: int, n_per_epoch: int, every_n_epochs: int | None
) -> list[int]:
    """The steps of a run after which it validates.

    Args:
        n_steps: of the run.
        n_between: Lightning's `val_check_batch`.
        n_per_epoch: steps of an epoch.
        every_n_epochs: Lightning's `check_val_every_n_epoch`; None counts over epochs.
    """
    if every_n_epochs is None:
        return list(range(n_between, n_steps + 1, n_between))
    in_epoch = range(n_between, n_per_epoch + 1, n_between)
    starts = range(0, n_steps, n_per_epoch)[every_n_epochs - 1 :: every_n_epochs]
    return [start + step for start in starts for step in in_epoch if start + step <= n_steps]


def sample_ids(trainer: pl.Trainer, batch: list[MicroBatch]) -> list[int]:
    """Ids of the samples of a step, over all ranks, which must all call it."""
    own = [i for micro_batch in batch for i in micro_batch["sample_ids"].tolist()]
    return [i for ids in of_ranks(trainer, own) for i in ids]
