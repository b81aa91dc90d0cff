"""RunLogger: Lightning's metrics into the run's journal."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.trainer.states import TrainerFn

from pipeline.runs.run_directory import Run
from pipeline.training.steps import is_logged_step

OF_A_STEP = ("train/", "perf/tokens", "perf/model")  # prefixes of metrics of training steps


class RunLogger(Logger):
    """Writes metrics to the open run, on rank 0, not to a server that may be slow or down."""

    trainer: pl.Trainer  # counts the optimizer steps; set later

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    @property
    def name(self) -> str:
        """The experiment."""
        return self.run.path.parent.name

    @property
    def version(self) -> str:
        """The run's name."""
        return self.run.path.name

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends metrics to the journal.

        Once a run is to stop, Lightning logs at every step, with values left over from earlier
        ones: these are left out.
        """
        is_stale = not is_logged_step(self.trainer)
        values = {
            key: float(value)
            for key, value in metrics.items()
            if key != "epoch" and not (is_stale and key.startswith(OF_A_STEP))
        }
        if values:
            fits = self.trainer.state.fn == TrainerFn.FITTING  # Lightning counts from 0
            n_steps = step + 1 if fits and step is not None else self.trainer.global_step
            self.run.log_metrics(values, n_steps)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the parameters are the resolved YAML, which the command line logs."""
