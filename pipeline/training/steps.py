"""What the trainer knows of a step: whether it is logged, its samples, its run."""

from collections.abc import Mapping

import lightning.pytorch as pl
from torch import Tensor

from datamodules.batching import MicroBatch
from pipeline.runs.run_directory import Run
from pipeline.training.sharding import of_ranks


def run_of(trainer: pl.Trainer) -> Run | None:
    """The open run to log to, if there is one."""
    run = getattr(trainer.logger, "run", None)
    return run if isinstance(run, Run) else None


def is_logged_step(trainer: pl.Trainer) -> bool:
    """Whether the step just taken is one that Lightning logs, or the last of an epoch or the run.

    `log` costs the better part of a millisecond, whether Lightning writes the value or not.
    """
    step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
    is_due = every > 0 and step % every == 0
    return is_due or trainer.is_last_batch or step == trainer.max_steps


def log_figures(module: pl.LightningModule, figures: Mapping[str, float | Tensor]) -> None:
    """Logs figures of the step just taken that neither the progress bar nor early stopping needs.

    They go straight to the run's journal, in a tenth of the time that `log` takes. Other loggers,
    if there are any, get them by `log`, all values of a step together.
    """
    trainer = module.trainer
    if (run := run_of(trainer)) is None or len(trainer.loggers) > 1:
        for name, value in figures.items():
            module.log(name, value)
    elif trainer._logger_connector.should_update_logs:
        values = {name: float(value) for name, value in figures.items()}
        run.log_metrics(values, trainer.global_step)


def n_real_tokens(batch: list[MicroBatch]) -> int:
    """Number of tokens in a step, without padding."""
    return sum(
        int(mb["attention_mask"].sum()) if "attention_mask" in mb else mb["input_ids"].numel()
        for mb in batch
    )


def validations(
    n_steps: int, n_between: int, n_per_epoch: int, every_n_epochs: int | None
) -> tuple[int, int]:
    """How often a run validates, and after which step it does so last.

    `n_between` is Lightning's `val_check_batch`, `every_n_epochs` its `check_val_every_n_epoch`,
    where None counts steps across epochs.
    """
    if every_n_epochs is None:
        every_n_epochs, n_per_epoch = 1, max(1, n_steps)
    in_epoch = range(n_between, n_per_epoch + 1, n_between)
    starts = range((every_n_epochs - 1) * n_per_epoch, n_steps, every_n_epochs * n_per_epoch)
    n_behind_end = sum(starts[-1] + step > n_steps for step in in_epoch) if starts else 0
    backwards = (start + step for start in reversed(starts) for step in reversed(in_epoch))
    last = next((step for step in backwards if step <= n_steps), 0)
    return len(starts) * len(in_epoch) - n_behind_end, last


def sample_ids(trainer: pl.Trainer, batch: list[MicroBatch]) -> list[int]:
    """Ids of the samples of a step, over all ranks, which must all call it."""
    own = [i for micro_batch in batch for i in micro_batch["sample_ids"].tolist()]
    return [i for ids in of_ranks(trainer, own) for i in ids]
