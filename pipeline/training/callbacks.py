"""Callbacks that watch a training run: throughput, loss spikes, sample texts."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch

from datamodules.batching import MicroBatch
from datamodules.files import at
from datamodules.prompts import encode_start, stop_ids
from datamodules.step_data_module import StepDataModule
from pipeline.decoding.generate import generate
from pipeline.decoding.passes import check_prompt
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.text_stream import text_of
from pipeline.hardware import matrix_product_ceiling
from pipeline.training.flops import flops_per_token
from pipeline.training.sharding import gather_shared
from pipeline.training.steps import is_logged_step, log_figures, n_real_tokens, run_of, sample_ids

SPIKE_WINDOW, SPIKE_Z = 50, 8.0  # past losses to compare with; z-score of a spike
LOSS_FLOOR = 1e-6  # nats: smaller differences are rounding
NORMAL_MAD = 1.4826  # standard deviation of a normal distribution / its median absolute deviation


class Throughput(pl.Callback):
    """Logs tokens per second, and the share of the machine's matrix-product ceiling that they use.

    The ceiling is measured when training starts, in the precision of the run. Padding does not
    count; every other token counts as if it went through the whole model, even where logits that
    are not needed, or a prefix that rows share, are not computed.
    """

    def __init__(self) -> None:
        self.total_tokens, self.ceiling = 0, 0.0  # over all ranks, since the run began; FLOP/s
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.tokens_before, self.since = self.total_tokens, time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measures the ceiling."""
        half = {"bf16": torch.bfloat16, "16-m": torch.float16, "16-t": torch.float16}
        dtype = half.get(str(trainer.precision)[:4], torch.float32)
        self.ceiling = matrix_product_ceiling(pl_module.device, dtype)
        self._restart_clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: list[MicroBatch], *_: Any
    ) -> None:
        """Counts tokens; logs at the steps that Lightning logs."""
        self.total_tokens += pl_module.over_ranks(n_real_tokens(batch))
        if not is_logged_step(trainer):
            return
        rate = (self.total_tokens - self.tokens_before) / (time.perf_counter() - self.since)
        self._restart_clock()
        n_context = max((mb["input_ids"].shape[1] for mb in batch), default=0)
        flops = flops_per_token(pl_module.gpt, n_context)
        pl_module.log("perf/tokens_per_s", rate, prog_bar=True)
        figures = {
            "train/tokens": float(self.total_tokens),
            "perf/model_flops_utilisation": rate * flops / self.ceiling / trainer.world_size,
        }
        log_figures(pl_module, figures)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Leaves validation out of the training time."""
        self._restart_clock()

    def state_dict(self) -> dict[str, int]:
        """Number of tokens so far."""
        return {"total_tokens": self.total_tokens}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restores what `state_dict` returned."""
        self.total_tokens = state_dict["total_tokens"]


class LossSpikes(pl.Callback):
    """Records each loss spike as an event, and counts them in `train/loss_spikes`.

    A spike has a high robust z-score: its distance above the median of recent losses, divided by
    their median absolute deviation, scaled to be the usual z-score for a normal distribution.
    """

    def __init__(self) -> None:
        self.window: list[float] = []
        self.n_spikes = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: list[MicroBatch], i: int
    ) -> None:
        """Judges the step's loss, then adds it to the window if it is finite."""
        loss = float(outputs["loss"])
        z = robust_z(loss, self.window) if len(self.window) >= SPIKE_WINDOW // 2 else 0.0
        if z > SPIKE_Z:
            self.n_spikes += 1
            ids, step = sample_ids(trainer, batch), trainer.global_step
            if run := run_of(trainer):
                run.event("loss_spike", step=step, loss=loss, z=round(z, 1), sample_ids=ids)
        if is_logged_step(trainer):
            log_figures(pl_module, {"train/loss_spikes": float(self.n_spikes)})
        if math.isfinite(loss):
            self.window = [*self.window, loss][-SPIKE_WINDOW:]

    def state_dict(self) -> dict[str, Any]:
        """The losses that the next one is compared with, and the number of spikes."""
        return {"window": list(self.window), "n_spikes": self.n_spikes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.window, self.n_spikes = list(state_dict["window"]), state_dict["n_spikes"]


def robust_z(value: float, others: Sequence[float]) -> float:
    """How far a value is above the median of others, in robust standard deviations."""
    middle = median(others)
    spread = median(abs(other - middle) for other in others) * NORMAL_MAD
    floor = max(abs(middle) * 1e-3, LOSS_FLOOR)  # equal losses have no spread
    return (value - middle) / max(spread, floor)


class SampleTexts(pl.Callback):
    """Logs the model's greedy continuations of fixed prompts at every validation.

    Args:
        prompts: texts to continue; for an instruction-tuned model, messages of a user.
        max_new_tokens: maximum length of each continuation, in tokens.
    """

    def __init__(self, prompts: list[str], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"SampleTexts.max_new_tokens is {max_new_tokens}; give at least 1.")
        self.prompts, self.max_new_tokens = prompts, max_new_tokens

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Refuses prompts that the model cannot continue, and a model that generates no text."""
        if pl_module.model is not pl_module.gpt:
            raise ValueError(
                "SampleTexts needs a model that writes text; take it out of trainer.callbacks."
            )
        for prompt, ids in zip(self.prompts, self._ids(pl_module.data), strict=True):
            with at(f"SampleTexts.prompts, {prompt[:60]!r}"):
                check_prompt(len(ids), pl_module.model.config.block_size)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Generates the texts and logs them as a table."""
        run, is_fit = run_of(trainer), trainer.state.fn == "fit" and not trainer.sanity_checking
        if not is_fit or not self.prompts or (run is None and trainer.world_size == 1):
            return
        gather_shared(pl_module.model)  # under FSDP2, so every rank has to generate
        tokenizer, style = pl_module.data.tokenizer, pl_module.data.meta().get("prompt_style")
        settings = Sampling(
            max_new_tokens=self.max_new_tokens, stop_ids=frozenset(stop_ids(tokenizer, style))
        )
        ids = self._ids(pl_module.data)
        is_compiled = pl_module.is_compiled  # decoding runs uncompiled
        eager = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
        with trainer.precision_plugin.forward_context(), eager:  # an adapter's base may be bf16
            new = generate(pl_module.model, ids, settings)
        pl_module.train()
        if run is None:
            return
        step = trainer.global_step
        rows = [
            {"step": step, "prompt": prompt, "text": text_of(tokenizer, answer, before)}
            for prompt, before, answer in zip(self.prompts, ids, new, strict=True)
        ]
        run.log_table(rows, f"samples/step-{step:08d}.json")

    def _ids(self, data: StepDataModule) -> list[list[int]]:
        style = data.meta().get("prompt_style")
        return [encode_start(data.tokenizer, style, prompt) for prompt in self.prompts]
