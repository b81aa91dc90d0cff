"""What watches a training run: speed, progress, sample texts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
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

from datamodules.batching import MicroBatch
from datamodules.prompts import Message, encode_prompt, stop_ids
from pipeline.generate import Sampling, generate
from pipeline.run_directory import Run
from pipeline.sharding import gather_shared, of_ranks

CEILING_SIZE = 1024  # rows of the square matrices whose product is timed
CEILING_SECONDS = 0.3
SPIKE_WINDOW, SPIKE_Z = 50, 8.0  # losses that are looked back on; what stands out
NORMAL_MAD = 1.4826  # standard deviations of a normal distribution in its median distance
SHOWN_METRICS = {
    "train/loss": "loss {:.3f}",
    "val/loss": "val {:.3f}",
    "perf/tokens_per_s": "{:,.0f} tok/s",
}
SCREEN_INTERVAL_S, LOG_INTERVAL_S = 0.5, 20.0  # between updates in a terminal, lines in a file


def run_of(trainer: pl.Trainer) -> Run | None:
    """The open run, where there is one to log to."""
    return getattr(trainer.logger, "run", None)


def is_logged_step(trainer: pl.Trainer) -> bool:
    """Whether the step just taken is one that Lightning logs, or the last of an epoch or the run.

    `log` costs the better part of a millisecond, whether Lightning writes the value or not.
    """
    is_due = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
    return is_due or trainer.is_last_batch or trainer.global_step == trainer.max_steps


def n_real_tokens(batch: list[MicroBatch]) -> int:
    """Tokens of a step, padding left out."""
    return sum(
        int(mb.get("attention_mask", torch.ones_like(mb["input_ids"])).sum()) for mb in batch
    )


def sample_ids(trainer: pl.Trainer, batch: list[MicroBatch]) -> list[int]:
    """Of the samples of a step, over all ranks, which must all call it."""
    own = [i for micro_batch in batch for i in micro_batch["sample_ids"].tolist()]
    return [i for ids in of_ranks(trainer, own) for i in ids]


class Throughput(pl.Callback):
    """Logs tokens a second, and what share of the machine's matrix-product ceiling that is.

    The ceiling is measured when training starts, in the precision that it runs in. Padding counts
    for nothing.
    """

    def __init__(self) -> None:
        self.total_tokens = 0  # of this rank, since the run began; n_tokens come on top
        self.n_tokens, self.since, self.ceiling = 0, time.perf_counter(), 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measures the ceiling."""
        half = {"bf16": torch.bfloat16, "16-m": torch.float16, "16-t": torch.float16}
        dtype = half.get(str(trainer.precision)[:4], torch.float32)
        self.ceiling = matrix_product_ceiling(pl_module.device, dtype)
        self.n_tokens, self.since = 0, time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: list[MicroBatch],
        batch_idx: int,
    ) -> None:
        """Counts; logs where Lightning logs."""
        self.n_tokens += n_real_tokens(batch)
        if not is_logged_step(trainer):
            return
        now = time.perf_counter()
        rate = self.n_tokens * trainer.world_size / (now - self.since)
        n_context = max((mb["input_ids"].shape[1] for mb in batch), default=0)
        gpt = getattr(pl_module.model, "gpt", pl_module.model)
        flops = gpt.flops_per_token(n_context, training=True)
        self.total_tokens += self.n_tokens
        pl_module.log("train/tokens", float(self.total_tokens * trainer.world_size))
        pl_module.log("perf/tokens_per_s", rate, prog_bar=True)
        pl_module.log(
            "perf/model_flops_utilisation", rate * flops / self.ceiling / trainer.world_size
        )
        self.n_tokens, self.since = 0, now

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Validation's time is not training's."""
        self.total_tokens += self.n_tokens
        self.n_tokens, self.since = 0, time.perf_counter()

    def state_dict(self) -> dict[str, int]:
        """Tokens so far."""
        return {"total_tokens": self.total_tokens + self.n_tokens}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restores what `state_dict` gave."""
        self.total_tokens = state_dict["total_tokens"]


class LossSpikes(pl.Callback):
    """Flags losses that stand out from those before: an event, and `train/loss_spikes` counts them.

    A loss stands out by its robust z-score: its distance from the median, in units of the median
    distance from it, scaled so that for a normal distribution it is the usual z-score.
    """

    def __init__(self) -> None:
        self.window: list[float] = []
        self.n_spikes = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: list[MicroBatch], i: int
    ) -> None:
        """Judges the step's loss, then takes it into the window; one that is not finite never."""
        loss = float(outputs["loss"])
        z = robust_z(loss, self.window) if len(self.window) >= SPIKE_WINDOW // 2 else 0.0
        if z > SPIKE_Z:
            self.n_spikes += 1
            ids, step = sample_ids(trainer, batch), trainer.global_step
            if run := run_of(trainer):
                run.event("loss_spike", step=step, loss=loss, z=round(z, 1), sample_ids=ids)
        if is_logged_step(trainer):
            pl_module.log("train/loss_spikes", float(self.n_spikes))
        if math.isfinite(loss):
            self.window = [*self.window, loss][-SPIKE_WINDOW:]

    def state_dict(self) -> dict[str, Any]:
        """The losses that the next one is judged by."""
        return {"window": list(self.window), "n_spikes": self.n_spikes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.window, self.n_spikes = list(state_dict["window"]), state_dict["n_spikes"]


def robust_z(value: float, others: Sequence[float]) -> float:
    """How far a value is above the median of others, in robust standard deviations."""
    middle = median(others)
    spread = median(abs(other - middle) for other in others) * NORMAL_MAD
    return (value - middle) / max(spread, abs(middle) * 1e-3)  # equal losses are no scale


def matrix_product_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of large matrix products, measured."""
    a = torch.randn(CEILING_SIZE, CEILING_SIZE, generator=torch.Generator().manual_seed(0))
    a = a.to(device=device, dtype=dtype)
    n_products, best = 0, 0.0
    start = time.perf_counter()
    while time.perf_counter() - start < CEILING_SECONDS or n_products < 3:
        before = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = max(best, 2 * CEILING_SIZE**3 / (time.perf_counter() - before))
        n_products += 1
    return best


class ProgressDisplay(ProgressBar):
    """One bar over all steps of a run, on stderr: losses, speed, time elapsed and left.

    In a terminal a second bar shows a validation while it runs; in a file the bar becomes a line
    now and then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True
        self._console = Console(stderr=True)
        self._progress: Progress | None = None

    def enable(self) -> None:
        """Shows what starts from here on."""
        self.is_enabled = True

    def disable(self) -> None:
        """Shows nothing that starts from here on; Lightning asks for it on all ranks but one."""
        self.is_enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Adds the bar of all steps, those before a resume included."""
        n_steps = int(trainer.estimated_stepping_batches)
        self._training = self._add("train", n_steps, completed=trainer.global_step)
        self._interval_s = SCREEN_INTERVAL_S if self._console.is_terminal else LOG_INTERVAL_S
        self._due = time.monotonic() + self._interval_s

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Updates the bar now and then: to read a loss is to wait for the device."""
        if time.monotonic() >= self._due:
            self._update(trainer)
            self._print()
            self._due = time.monotonic() + self._interval_s

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Shows the last step."""
        self._update(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Adds a bar of batches."""
        name, n_batches = "val", trainer.num_val_batches
        if trainer.testing:
            name, n_batches = "test", trainer.num_test_batches
        elif trainer.predicting:
            name, n_batches = "predict", trainer.num_predict_batches
        self._evaluation = self._add(name, sum(n_batches))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Moves that bar on."""
        if self._progress:
            self._progress.update(self._evaluation, completed=batch_idx + 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Takes that bar away again, where training goes on."""
        if self._progress and trainer.state.fn == "fit":
            self._progress.remove_task(self._evaluation)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Leaves the last state there."""
        if self._progress:
            self._progress.stop()
            self._print()
            self._progress = None

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Gives the terminal back."""
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
        """The bars as lines, where they do not move."""
        if self.is_enabled and not self._console.is_terminal:
            self._console.print(self._progress)


class SampleTexts(pl.Callback):
    """Writes what the model says to fixed prompts at every validation, greedily.

    Args:
        prompts: texts to go on from; of an instruction-tuned model, what the user asks.
        max_new_tokens: of each answer.
    """

    def __init__(self, prompts: list[str], max_new_tokens: int) -> None:
        self.prompts, self.max_new_tokens = prompts, max_new_tokens

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Generates and logs a table."""
        run = run_of(trainer)
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self.prompts:
            return
        if run is None and trainer.world_size == 1:
            return
        gather_shared(pl_module.model)  # so every rank generates, where each has a share
        tokenizer, style = pl_module.data.tokenizer, pl_module.data.meta().get("prompt_style")
        ids = [self._ids(tokenizer, style, prompt) for prompt in self.prompts]
        stops = stop_ids(tokenizer, style) if style else {tokenizer.eos_id}
        settings = Sampling(
            max_new_tokens=self.max_new_tokens,
            stop_ids=frozenset(stops),
            n_vocab=tokenizer.n_vocab,
        )
        with trainer.precision_plugin.forward_context():  # the base of adapters may be bf16
            new = generate(pl_module.model, ids, settings)
        texts = [tokenizer.decode(answer) for answer in new]
        pl_module.train()
        if run is None:
            return
        step = trainer.global_step
        rows = [
            {"step": step, "prompt": p, "text": t} for p, t in zip(self.prompts, texts, strict=True)
        ]
        run.log_table(rows, f"samples/step-{step:08d}.json")

    @staticmethod
    def _ids(tokenizer: Any, style: str | None, prompt: str) -> list[int]:
        if style is None:
            return tokenizer.encode(prompt)
        return encode_prompt(tokenizer, style, [Message(role="user", content=prompt)])
