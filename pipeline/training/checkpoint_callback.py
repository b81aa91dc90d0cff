"""Lightning's side of checkpoints: when they are written, and which are kept."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pipeline import checkpoint as files
from pipeline.console import say, warn
from pipeline.directories import CHECKPOINTS, CheckpointError, CheckpointNotWritten
from pipeline.hardware import available_memory_bytes
from pipeline.interrupts import StopRequest
from pipeline.training.sharding import of_ranks

N_MOMENTS = 2  # that an optimizer keeps per trained weight, at most
COPY_FRACTION = 0.1  # of the free memory: larger copies are not made by default
OF_VALIDATION = "val/"  # prefix of its metrics
_AT_ODDS = {  # validation metrics, each with the mode that would take its worst value for the best
    **dict.fromkeys(("val/loss", "val/perplexity", "val/bits_per_byte"), "max"),
    **{f"val/{name}": "min" for name in ("accuracy", "auroc", "f1", "precision", "recall")},
}
_STATE = ("best", "last_step", "last_validated", "should_stop")
_IN_FILES = ("state_dict", "meta", "tokenizer", "adapter", "adapter_config")


class DirectoryCheckpointIO(CheckpointIO):
    """Lightning's checkpoint dictionary as a checkpoint directory, and back."""

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: Any,
        storage_options: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        """Writes the directory, whole or not at all.

        Args:
            checkpoint: the dictionary that Lightning makes.
            path: the checkpoint directory.
            storage_options: called with a function that writes a copy on the CPU, to run it while
                training goes on; None: the checkpoint is written before this returns.
        """
        if storage_options is not None:
            changing = {key: v for key, v in checkpoint.items() if key != "tokenizer"}
            copied = tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), changing)
            checkpoint = {**checkpoint, **copied}
        state = {key: value for key, value in checkpoint.items() if key not in _IN_FILES}
        writers: dict[str, Any] = {
            **files.model_writers(
                checkpoint["state_dict"], checkpoint["meta"], checkpoint["tokenizer"]
            ),
            files.TRAINING: partial(torch.save, state),
        }
        if "adapter" in checkpoint:
            writers[files.ADAPTER_WEIGHTS] = files.tensors_writer(checkpoint["adapter"])
            config: str = checkpoint["adapter_config"]
            writers[files.ADAPTER_CONFIG] = lambda file: file.write_text(config)
        write = partial(files.write_checkpoint, Path(path), writers)
        if storage_options is not None:
            storage_options(write)
        else:
            write()

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: Any = None
    ) -> dict[str, Any]:
        """Verifies and reads a directory; unpickles nothing but tensors and primitives."""
        folder = Path(path)
        files.verify_checkpoint(folder)
        checkpoint = files.read_training(folder)
        checkpoint["meta"] = files.read_meta(folder)
        checkpoint["state_dict"] = files.read_tensors(folder)
        if (folder / files.ADAPTER_WEIGHTS).exists():
            checkpoint["adapter"] = files.read_tensors(folder, files.ADAPTER_WEIGHTS)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a directory."""
        files.remove_checkpoint(Path(path))


class Checkpoints(pl.Callback):
    """Writes a checkpoint every N steps and after each validation; keeps the last and the best.

    They hold the random state, too: a resumed run draws what an uninterrupted one would have drawn.

    Args:
        every_n_steps: optimizer steps between checkpoints; each validation writes one, too.
        monitor: validation metric that decides which checkpoint is the best.
        mode: whether the best is the smallest (min) or the largest (max).
        keep_last: how many of the last checkpoints to keep.
        keep_best: how many of the best checkpoints to keep.
        asynchronous: write from a copy in memory while training goes on, one at a time; null: if
            the copy takes less than a tenth of the free memory.
    """

    is_quiet = False  # about steps that were not validated

    def __init__(
        self,
        every_n_steps: int,
        monitor: str,
        mode: str,
        *,
        keep_last: int = 1,
        keep_best: int = 1,
        asynchronous: bool | None = None,
    ) -> None:
        self.every_n_steps, self.monitor, self.mode = every_n_steps, monitor, mode
        self.keep_last, self.keep_best = keep_last, keep_best
        for key in ("every_n_steps", "keep_last", "keep_best"):
            if (count := getattr(self, key)) < 1:
                raise ValueError(f"checkpoints.{key} is {count}; give at least 1.")
        check_monitor(monitor, "checkpoints.monitor")
        if mode not in ("min", "max"):
            raise ValueError(f"checkpoints.mode is {mode!r}; give min or max.")
        self.best: dict[int, dict[str, Any]] = {}  # step -> value and metrics, best first
        self.asynchronous, self._thread = asynchronous, ThreadPoolExecutor(max_workers=1)
        self._saving: Future[Any] | None = None  # in the background
        self.last_step: int | None = None
        self.last_validated = 0  # step
        self.should_stop = False  # whether the run was asked to end, as by early stopping
        self._is_due = False
        self._at_step_end: dict[str, Any] = {}  # loops and data position
        self._rng: list[dict[str, Any]] | None = None  # by rank
        self._stop = StopRequest()

    def path(self, trainer: pl.Trainer, step: int) -> Path:
        """Path of the checkpoint of a step."""
        return Path(trainer.default_root_dir) / CHECKPOINTS / files.step_name(step)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Shares rank 0's run directory; warns of a mode that takes the worst value for the best.

        Only rank 0 can name a run that starts anew.
        """
        path = trainer.strategy.broadcast(trainer.default_root_dir)
        trainer._default_root_dir = path  # type: ignore[attr-defined]
        judges: list[Any] = [self, *trainer.early_stopping_callbacks]
        for judge in judges if stage == "fit" and trainer.is_global_zero else ():
            if _AT_ODDS.get(judge.monitor) == judge.mode:
                name, mode = type(judge).__name__, judge.mode
                warn(f"{name} takes the worst {judge.monitor} for the best: its mode is {mode}.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the random state, now that every iterator exists; starts handling signals.

        If the run resumes from another run's checkpoint, that run's best checkpoints and its end
        do not count. Lightning restores the signal handlers when the trainer ends.
        """
        saved, rank = self._rng or [], trainer.global_rank
        if rank < len(saved):
            set_random_state(saved[rank], pl_module.device)
        elif rank > 0:  # else dropout would be alike on all ranks
            torch.manual_seed(torch.initial_seed() + rank)
        self._rng = None
        self.best = {n: best for n, best in self.best.items() if self.path(trainer, n).exists()}
        self._stop.listen()
        is_own = self.last_step is not None and self.path(trainer, self.last_step).exists()
        trainer.should_stop = trainer.should_stop or (is_own and self.should_stop)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Notes the state at the end of a step.

        A checkpoint written later resumes from here: Lightning then knows that the step's
        validation, if any, is over, and neither repeats nor loses it.
        """
        data, fit_loop = trainer.datamodule, trainer.fit_loop  # type: ignore[attr-defined]
        loops, epoch = fit_loop.state_dict(), data.state_dict()["epoch"]
        for progress in loops["epoch_progress"].values():  # lags after a resume at an epoch's end
            progress |= {"ready": epoch + 1, "started": epoch + 1}
            progress |= {"processed": epoch, "completed": epoch}
        data.advance(int(trainer.num_training_batches))
        self._at_step_end = {"loops": loops, "data": data.state_dict()}
        fetcher: Any = fit_loop._data_fetcher
        is_validated = fit_loop.epoch_loop._should_check_val_fx(fetcher)
        self._is_due = trainer.global_step % self.every_n_steps == 0 and not is_validated

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Saves the previous step, if due: by now its metrics are in the journal.

        Raises:
            SystemExit: a signal was received; that step is saved, the code is 128 + the signal.
            CheckpointNotWritten: an asynchronous save has failed.
        """
        if self._saving is not None and self._saving.done():
            self._end_saving()
        number = pl_module.over_ranks(self._stop.signal or 0, "max")  # all stop at the same step
        if self._is_due or (number and self._at_step_end):
            self._save(trainer)
        if number:
            self._end_saving()
            trainer.strategy.barrier()  # launchers end all processes once one ends
            say(
                f"stopped after step {trainer.global_step}; repeat the command to resume "
                "(without --run.resume never)"
            )
            raise SystemExit(128 + number)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the epoch's last step, if it is due."""
        if self._is_due:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the step that was validated."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        known = trainer.callback_metrics.items()
        metrics = {name: float(v) for name, v in known if name.startswith(OF_VALIDATION)}
        if self.monitor not in metrics:
            raise ValueError(
                f"checkpoints.monitor is {self.monitor!r}, but validation logs {sorted(metrics)}; "
                "name one of them."
            )
        value = metrics[self.monitor]
        self.last_validated = trainer.global_step
        self.best[trainer.global_step] = {"value": value, "metrics": metrics}
        best_first = sorted(self.best.items(), key=self._rank, reverse=True)  # ties: the earliest
        self.best = dict(best_first[: self.keep_best])
        self._save(trainer)

    def _rank(self, item: tuple[int, dict[str, Any]]) -> float:
        value = item[1]["value"]
        if math.isnan(value):  # worse than any number
            return -math.inf
        return value if self.mode == "max" else -value

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the last step unless it is saved already, and waits until all is on disk."""
        if not self._at_step_end:  # no step was taken
            return
        self._save(trainer)
        self._end_saving()
        n_since = trainer.global_step - self.last_validated
        is_told = trainer.enable_validation and trainer.is_global_zero and not self.is_quiet
        if n_since and is_told:
            last = self.path(trainer, trainer.global_step)
            said = (
                f"the last {n_since} steps were not validated, so the best checkpoint is without "
                f"them; {last} has them"
                if self.best
                else f"nothing was validated, so {last} is handed over, as good as it may be"
            )
            warn(f"{said}. trainer.val_check_interval says when to validate.")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Waits for a save in the background."""
        try:
            self._end_saving()
        except CheckpointNotWritten as error:
            warn(error)

    def _save(self, trainer: pl.Trainer) -> None:
        self._is_due, step, start = False, trainer.global_step, time.perf_counter()
        path = self.path(trainer, step)
        self._end_saving()
        if trainer.strategy.broadcast(self.last_step == step and path.exists()):
            return
        self.last_step, self.should_stop = step, trainer.should_stop
        best = {files.step_name(step) for step in self.best}

        def write_and_prune(write: Callable[[], None]) -> None:
            write()
            self._prune(trainer, path, best)

        def beside(write: Callable[[], None]) -> None:
            self._saving = self._thread.submit(write_and_prune, write)

        is_beside = self._is_beside(trainer)
        options = beside if is_beside else None
        trainer.save_checkpoint(path, weights_only=False, storage_options=options)
        if trainer.is_global_zero and not is_beside:
            self._prune(trainer, path, best)
        if trainer.logger is not None:  # how long training was held up
            seconds = time.perf_counter() - start
            # Lightning counts steps from 0
            trainer.logger.log_metrics({"perf/checkpoint_s": seconds}, step - 1)

    def _end_saving(self) -> None:
        """Waits for the save in the background, if any; raises its error."""
        if saving := self._saving:
            wait([saving])
            self._saving = None
            saving.result()

    def _is_beside(self, trainer: pl.Trainer) -> bool:
        """Whether saves are written in the background."""
        if self.asynchronous is None:
            parameters = trainer.lightning_module.parameters()
            copied = sum(p.nbytes * (1 + N_MOMENTS * p.requires_grad) for p in parameters)
            free = available_memory_bytes(torch.device("cpu"))
            self.asynchronous = copied < COPY_FRACTION * free
        return self.asynchronous

    def _prune(self, trainer: pl.Trainer, newest: Path, best: set[str]) -> None:
        """Removes checkpoints that are neither last nor best, if the newest one is whole."""
        try:
            files.verify_checkpoint(newest)
        except CheckpointError as error:
            warn(f"{error} Older ones are kept.")
            return
        for path in files.steps_in(newest.parent)[: -self.keep_last]:
            if path.name not in best:
                trainer.strategy.remove_checkpoint(path)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the random state, and loops and position in the data as of the step's end."""
        checkpoint["rng"] = of_ranks(trainer, random_state(pl_module.device))
        if self._at_step_end:
            checkpoint["loops"]["fit_loop"] = self._at_step_end["loops"]
            data = type(trainer.datamodule).__qualname__  # type: ignore[attr-defined]
            checkpoint[data] = self._at_step_end["data"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the random state for the start of training."""
        self._rng = checkpoint["rng"]

    def state_dict(self) -> dict[str, Any]:
        """The best so far, the last steps saved and validated, whether the run was to end."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        vars(self).update({name: state_dict[name] for name in _STATE})

    def best_metrics(self) -> dict[str, float]:
        """Validation metrics of the best checkpoint."""
        return next(iter(self.best.values()))["metrics"] if self.best else {}

    def outputs(self, trainer: pl.Trainer) -> dict[str, str]:
        """Paths that a stage hands over: the last checkpoint, and the best by the monitored metric.

        Raises:
            ValueError: no step was taken, so there is none.
        """
        last = self.path(trainer, trainer.global_step)
        if not last.exists():
            raise ValueError(
                f"nothing was trained: the run begins and ends at step {trainer.global_step}; "
                "raise trainer.max_steps (or max_epochs, max_time, limit_train_batches)."
            )
        best = next(iter(self.best), trainer.global_step)
        return {"last": str(last), "best": str(self.path(trainer, best))}


def check_monitor(name: str, key: str) -> None:
    """ValueError for a training metric: at a validation it is an earlier step's, or not there."""
    if not name.startswith(OF_VALIDATION):
        raise ValueError(f"{key} is {name!r}; name a metric of validation, such as val/loss.")


def random_state(device: torch.device) -> dict[str, Tensor | None]:
    """State of torch's random generators: the CPU's, and the device's if that is a GPU."""
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "gpu": gpu}


def set_random_state(state: dict[str, Tensor | None], device: torch.device) -> None:
    """Restores what `random_state` returned, possibly on another kind of device."""
    assert state["cpu"] is not None
    torch.set_rng_state(state["cpu"].cpu())
    if state["gpu"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["gpu"].cpu(), device)
