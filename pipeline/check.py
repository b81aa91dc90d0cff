"""`check`: says what `fit` would do, cost and leave out, before it starts.

It is a fit that ends after a few steps, in a run that is thrown away: it reads the same options and
resolves data, tokenizer and weights by the same code.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from lightning.pytorch.callbacks import Timer

from datamodules.step_data_module import StepDataModule, described
from pipeline.checkpoint import newest_valid
from pipeline.cli import PipelineCLI
from pipeline.cli import main as lightning_main
from pipeline.console import say
from pipeline.directories import CHECKPOINTS
from pipeline.hardware import multiplies_bf16
from pipeline.runs.journal import JOURNAL
from pipeline.runs.reuse import Attempt
from pipeline.runs.run_directory import Run, is_open, read_outcome
from pipeline.runs.stage_run import mlruns_root
from pipeline.training.flops import flops_per_token
from pipeline.training.memory import GIB
from pipeline.training.steps import validations
from pipeline.training.trial import N_VAL_BATCHES, Epoch, Trial


class CheckCLI(PipelineCLI):
    """`fit` for a few steps, and a report instead of a result."""

    help: ClassVar[dict[str, str]] = {
        "usage": "python -m pipeline check [options of fit]",
        "description": "Says what fit would do, cost and leave out, before it starts.",
    }

    @contextmanager
    def make_run(self, attempt: Attempt) -> Iterator[Run]:
        """A run that is deleted afterwards and never sent to MLflow."""
        mlruns_root().mkdir(parents=True, exist_ok=True)
        for journal in mlruns_root().glob(f".check-*/*/*/{JOURNAL}"):
            if not is_open(journal.parent):  # that check was killed
                shutil.rmtree(journal.parents[2])
        with TemporaryDirectory(prefix=".check-", dir=mlruns_root()) as folder:
            run = Run.open(Path(folder) / self.stage.run.experiment / self.stage.run.name)
            try:
                yield run
            finally:
                run.fail("only a check")

    def before_instantiate_classes(self) -> None:
        """Leaves out the user's loggers: the steps of a check are not theirs to log."""
        super().before_instantiate_classes()
        self.stage.trainer.logger = None

    def before_fit(self) -> None:
        """Nothing: there is no checkpoint to go on from."""

    def fit(self, model: Any, datamodule: StepDataModule, **kwargs: Any) -> None:
        """Runs the trial's steps and reports what they show.

        Raises:
            ValueError: for several processes, whose shares of a step it does not know.
        """
        if self.trainer.world_size > 1:
            raise ValueError(
                f"check measures one process, not {self.trainer.world_size}; leave out what starts "
                "more (trainer.devices, trainer.num_nodes, torchrun)."
            )
        say("taking a few steps ...")
        datamodule.prepare_data()
        datamodule.setup("fit")
        epoch = Epoch(datamodule)
        order = epoch.trial_order()
        datamodule.train_order = lambda: lambda _: order  # type: ignore[method-assign]
        trial, n_val_batches, limit_s = Trial(epoch), self._n_val_batches(), self._take_limit_s()
        self.trainer.callbacks.append(trial)  # type: ignore[attr-defined]
        self.trainer.limit_val_batches = min(N_VAL_BATCHES, n_val_batches)
        self._val_every = self.trainer.check_val_every_n_epoch
        self.trainer.check_val_every_n_epoch = self._val_every and 1
        self._get(self.config_init, "checkpoints").is_quiet = True
        self.trainer.fit_loop.min_epochs = self.trainer.fit_loop.epoch_loop.min_steps = None
        self.trainer.fit(model, datamodule=datamodule, **kwargs)
        n_epochs = self._n_steps / len(epoch.keys)
        training_s = trial.training_s(n_epochs * epoch.n_tokens)
        n_validations, last = self._validations(training_s)
        val_batch_s = sum(trial.val_batch_s) / max(1, len(trial.val_batch_s))
        validation_s = n_validations * (n_val_batches * val_batch_s + trial.val_rest_s)
        time = (
            f"{trial.start_s + training_s + validation_s:,.0f} s: start {trial.start_s:,.0f}, "
            f"training {training_s:,.0f}, {n_validations} validations {validation_s:,.0f}"
        )
        for line in [*self._facts(trial, n_epochs, time), *self._warnings(trial, n_epochs, last)]:
            print(line)
        if limit_s < training_s + validation_s:
            n_steps = int(self._n_steps * limit_s / (training_s + validation_s))
            print(
                f"warning: time is up after about {n_steps:,} of {self._n_steps:,} steps "
                "(trainer.max_time), before the learning rate has come down; lower "
                "trainer.max_steps, or give more time"
            )

    def after_fit(self) -> None:
        """Nothing: there is no result."""

    def _take_limit_s(self) -> float:
        """The time that training may take, which does not end the trial."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        timers = [callback for callback in callbacks if isinstance(callback, Timer)]
        for timer in timers:
            callbacks.remove(timer)
        given = [left for timer in timers if (left := timer.time_remaining()) is not None]
        return min(given, default=math.inf)

    def _n_val_batches(self) -> int:
        n_batches, limit = len(self.datamodule.val_dataloader()), self.trainer.limit_val_batches
        return min(n_batches, limit) if isinstance(limit, int) else int(n_batches * limit)

    @property
    def _n_steps(self) -> int:
        return int(self.trainer.estimated_stepping_batches)

    def _validations(self, training_s: float) -> tuple[int, int]:
        """How many there are, and the step of the last one: if they are timed, the run's last."""
        if interval_s := getattr(self.trainer, "_val_check_time_interval", None):
            n_validations = int(training_s // interval_s)
            return n_validations, self._n_steps * bool(n_validations)
        n_between = int(self.trainer.val_check_batch or 1)  # set once the loaders are made
        n_per_epoch = int(self.trainer.num_training_batches)
        return validations(self._n_steps, n_between, n_per_epoch, self._val_every)

    def _facts(self, trial: Trial, n_epochs: float, time: str) -> Iterator[str]:
        epoch, parameters = trial.epoch, list(self.model.parameters())
        n_tokens = n_epochs * epoch.n_tokens
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        yield f"run         {self._would_be()}"
        yield f"data        {described(self.datamodule.fingerprint['counts'])}"
        yield (
            f"epoch       {epoch.n_samples:,} samples, {epoch.n_tokens:,} tokens, "
            f"padding {1 - epoch.n_tokens / epoch.n_padded:.1%}"
        )
        yield f"steps       {self._n_steps:,} ({n_epochs:.2f} epochs), {n_tokens:,.0f} tokens"
        yield f"parameters  {sum(p.numel() for p in parameters):,}, trained {trained:,}"
        memory = max(trial.peak_bytes, trial.needed_bytes if not trial.step_s else 0)
        yield (
            f"memory      {memory / GIB:.2f} of {trial.total_bytes / GIB:.1f} GiB; "
            f"{trial.kept_bytes / GIB:.2f} of it kept for the backward pass"
        )
        if not trial.step_s:
            yield "time        not measured: no step could be timed"
        else:
            n_flops = flops_per_token(self.model.gpt, epoch.n_tokens // epoch.n_samples) * n_tokens
            yield f"compute     {n_flops / 1e12:,.1f} TFLOP"
            yield f"time        {time}"

    def _would_be(self) -> str:
        path = self.attempt().path
        if read_outcome(path) is not None:
            return f"{path} is finished; fit would do nothing (--run.resume never starts anew)"
        newest = newest_valid(path / CHECKPOINTS, set_aside=False)
        return f"{path} would go on from {newest.name}" if newest else f"{path}, new"

    def _warnings(self, trial: Trial, n_epochs: float, last_validated: int) -> Iterator[str]:
        data, counts = self.datamodule, self.datamodule.fingerprint["counts"]
        if not trial.fits:
            yield (
                "warning: this needs more memory than there is; lower data.max_tokens, set "
                "model.gradient_checkpointing, or take a smaller model"
            )
        n_left = self._n_steps - last_validated if self.trainer.enable_validation else 0
        if n_left and not last_validated:
            yield (
                "warning: the run ends before its first validation; lower "
                "trainer.val_check_interval, or raise trainer.max_steps"
            )
        elif n_left:
            yield (
                f"warning: the last {n_left} steps come after the last validation, so the best "
                "checkpoint is without them (trainer.val_check_interval)"
            )
        if n_epochs < 1:
            is_told = self._n_steps == self.trainer.max_steps
            limit = "max_steps" if is_told else "limit_train_batches"
            yield f"warning: the run ends after {n_epochs:.0%} of the data (trainer.{limit})"
        if counts.get("n_cut"):
            yield f"warning: {counts['n_cut']} samples are cut to data.max_length {data.max_length}"
        for name, count in counts.items():
            if "/" in name and count == 0:
                yield f"warning: there is no {name.replace('/', ' sample of label ')}"
        if trial.epoch.largest[1] > data.max_tokens:
            yield (
                f"warning: the longest sample has {trial.epoch.largest[1]} tokens, which is more "
                f"than data.max_tokens {data.max_tokens}: it goes alone"
            )
        slow = "32-true" if multiplies_bf16(self.trainer.strategy.root_device) else "bf16-mixed"
        if self.trainer.precision == slow:
            yield f"warning: precision {slow} is slow on this machine; auto takes the faster one"


def main(args: Sequence[str]) -> None:
    """Runs `check`, which takes the options of `fit`."""
    lightning_main(["fit", *args], cli=CheckCLI)
