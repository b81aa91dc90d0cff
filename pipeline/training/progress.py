"""What a training run shows on stderr: progress bars, and fewer messages of libraries."""

import logging
import time
import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SHOWN_METRICS = {
    "train/loss": "loss {:.3f}",
    "val/loss": "val {:.3f}",
    "perf/tokens_per_s": "{:,.0f} tok/s",
}
SCREEN_INTERVAL_S, LOG_INTERVAL_S = 0.5, 20.0  # between updates in a terminal, lines in a file


class ProgressDisplay(ProgressBar):
    """One bar over all steps of a run, on stderr: losses, speed, time elapsed and left.

    In a terminal a second bar shows a validation while it runs; in a file the bar is printed as a
    line now and then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True
        self._console = Console(stderr=True)
        self._progress: Progress | None = None

    def disable(self) -> None:
        """Hides bars that start from now on; Lightning calls this on all ranks but one."""
        self.is_enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Adds the bar of all steps, including those before a resume."""
        n_steps = int(trainer.estimated_stepping_batches)
        self._training = self._add("train", n_steps, completed=trainer.global_step)
        self._interval_s = SCREEN_INTERVAL_S if self._console.is_terminal else LOG_INTERVAL_S
        self._due = time.monotonic() + self._interval_s

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Updates the bar, but only now and then: reading a loss waits for the device."""
        if time.monotonic() >= self._due:
            self._update(trainer)
            self._print()
            self._due = time.monotonic() + self._interval_s

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Shows the last step."""
        self._update(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Adds a bar of batches."""
        name = "test" if trainer.testing else "predict" if trainer.predicting else "val"
        self._evaluation = self._add(name, sum(getattr(trainer, f"num_{name}_batches")))

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Advances that bar."""
        if self._progress:
            self._progress.advance(self._evaluation)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Removes that bar, if training goes on."""
        if self._progress and trainer.state.fn == "fit":
            self._progress.remove_task(self._evaluation)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Stops the display, with its last state left visible."""
        if self._progress:
            self._progress.stop()
            self._print()
            self._progress = None

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Shows how far training got, and releases the terminal."""
        if self._progress is not None and trainer.training:
            self._update(trainer)
        self.teardown(trainer, pl_module, "")

    def _add(self, name: str, total: float, completed: int = 0) -> TaskID:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=self._console,
                refresh_per_second=2,
                disable=not (self.is_enabled and self._console.is_terminal),
            )
            self._progress.start()
        return self._progress.add_task(name, total=total, completed=completed, metrics="")

    def _update(self, trainer: pl.Trainer) -> None:
        values = trainer.progress_bar_metrics
        known = [(form, values[name]) for name, form in SHOWN_METRICS.items() if name in values]
        metrics = " ".join(form.format(float(value)) for form, value in known)
        assert self._progress is not None
        self._progress.update(self._training, completed=trainer.global_step, metrics=metrics)

    def _print(self) -> None:
        """Prints the bars as lines, unless a terminal shows them."""
        if self.is_enabled and not self._console.is_terminal:
            self._console.print(self._progress)


def quiet_libraries() -> None:
    """Silences messages of libraries that are of no use here: tips, hints, deprecations."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # a requested report
    for message in (
        ".*does not have many workers.*",
        ".*is not resumable.*",
        ".*logging interval.*",
        ".*sync_dist=True.*",  # the means are over all ranks already
        r".*isinstance\(treespec, LeafSpec\).*",
    ):
        warnings.filterwarnings("ignore", message)
