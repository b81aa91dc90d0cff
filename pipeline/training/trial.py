"""A few steps of a training run, taken to estimate what the whole run costs.

Shapes: B rows, T tokens, N samples of an epoch.
"""

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from datamodules.batching import MicroBatch, cut, pad
from datamodules.step_data_module import StepDataModule
from pipeline.hardware import peak_memory_bytes, total_memory_bytes, used_memory_bytes
from pipeline.training.steps import n_real_tokens
from pipeline.training.training_graph import is_installed, left_out

QUANTILES = (0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6)  # of step tokens; prefixes are balanced
N_WARMUP = 4  # untimed steps: the largest and one of median size, twice
N_TIMED = 3 * len(QUANTILES)
TRIAL_S = 20.0  # of timed steps; at least three are taken
N_VAL_BATCHES = 5


class Epoch:
    """Statistics of the first epoch of training samples, from a data module that is set up."""

    def __init__(self, data: StepDataModule) -> None:
        order = data.train_order()(0)
        self.keys = order.split(data.batch_size)  # of samples, in training order, by step
        steps = data.train_lengths(order).split(data.batch_size)
        self.step_tokens = torch.stack([of_step.sum() for of_step in steps])  # (steps,)
        self.n_samples, self.n_tokens = len(order), int(self.step_tokens.sum())  # without padding
        shapes = [
            (rows.stop - rows.start, lengths[rows.start], step)
            for step, of_step in enumerate(steps)
            for lengths in [sorted(of_step.tolist(), reverse=True)]
            for rows in cut(lengths, data.max_tokens)
        ]
        self.n_padded = sum(b * t for b, t, _ in shapes)  # all tokens, with padding
        # of the micro-batch with the most tokens: its step, rows, and tokens per row
        n_rows, n_tokens, self.heaviest = max(shapes, key=lambda s: (s[0] * s[1], s[1]))
        self.largest = n_rows, n_tokens

    def trial_order(self) -> Tensor:
        """(N,) keys, beginning with the steps of the trial: warm-up, then steps of all sizes."""
        whole = max(1, len(self.keys) - 1)  # the last step may have fewer samples
        by_size = self.step_tokens[:whole].argsort()
        quantiles = [int(by_size[round(q * (whole - 1))]) for q in QUANTILES]
        warmup = [min(self.heaviest, whole - 1), quantiles[0]] * 2
        taken = [*warmup, *quantiles * (N_TIMED // len(QUANTILES))]
        return torch.cat([self.keys[step] for step in taken] + list(self.keys))[: self.n_samples]


class Trial(pl.Callback):
    """Takes the steps of `Epoch.trial_order`, times them, validates a little, and ends the run.

    If the run needs more memory than there is, no step is taken.
    """

    def __init__(self, epoch: Epoch) -> None:
        self.epoch = epoch
        self.start_s = 0.0  # from the start of the process to the first step
        self.kept_bytes = 0  # counted: what the largest micro-batch keeps for backward
        self.needed_bytes = 0  # counted: what the run needs at least
        self.peak_bytes = self.total_bytes = 0  # peak use; memory of the machine
        self.step_s: list[float] = []  # of the timed steps
        self.step_tokens: list[int] = []  # likewise
        self.val_batch_s: list[float] = []
        self.val_rest_s = 0.0  # what else a validation does: checkpoint, sample texts
        self._n_steps, self._since, self._n_prepared = 0, 0.0, 0

    @property
    def fits(self) -> bool:
        """Whether the machine has enough memory."""
        return max(self.needed_bytes, self.peak_bytes) <= self.total_bytes

    def training_s(self, n_tokens: float) -> float:
        """Seconds that training on so many tokens takes; 0 if no step was timed."""
        return sum(self.step_s) / max(1, sum(self.step_tokens)) * n_tokens

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Counts the memory that is needed; ends the run if there is too little."""
        self.start_s = time.time() - psutil.Process().create_time()
        device = pl_module.device
        self.total_bytes = total_memory_bytes(device)
        self.kept_bytes = largest_kept_bytes(trainer, pl_module, self.epoch)
        gradients = 2 if is_installed(pl_module.gpt) else 1  # graphs have their own, too
        held = sum(
            p.nbytes * (gradients + (1 if "momentum" in group else 2))  # moments of Muon, AdamW
            for group in trainer.optimizers[0].param_groups
            for p in group["params"]
        )
        self.needed_bytes = used_memory_bytes(device) + held + self.kept_bytes
        trainer.should_stop = not self.fits
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: list[MicroBatch], *_: Any
    ) -> None:
        """Times steps until there are enough of them."""
        now = time.perf_counter()
        self._n_steps += 1
        n_before = self._n_prepared
        self._n_prepared = getattr(pl_module.gpt.forward, "n_prepared", 0)
        if self._n_steps > N_WARMUP and self._n_prepared == n_before:  # no graph prepared
            self.step_s.append(now - self._since)
            self.step_tokens.append(n_real_tokens(batch))
        is_long = len(self.step_s) >= 3 and sum(self.step_s) > TRIAL_S
        trainer.should_stop = is_long or len(self.step_s) == N_TIMED
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Starts the clock of a validation."""
        self._since = self._val_start = time.perf_counter()
        self.val_batch_s = []

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Times a batch."""
        now = time.perf_counter()
        self.val_batch_s.append(now - self._since)
        self._since = now

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Times the rest; called after the checkpoint was written."""
        self._since = time.perf_counter()
        self.val_rest_s = self._since - self._val_start - sum(self.val_batch_s)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Reads the peak memory."""
        self.peak_bytes = peak_memory_bytes(pl_module.device)


def largest_kept_bytes(trainer: pl.Trainer, module: Any, epoch: Epoch) -> int:
    """Bytes that the largest micro-batch keeps for the backward pass, padding included.

    Extrapolated from its longest row, taken once and twice: costs per row, and fixed costs.
    """
    data: StepDataModule = trainer.datamodule  # type: ignore[attr-defined]
    keys, (n_rows, _) = epoch.keys[epoch.heaviest], epoch.largest
    key = int(keys[data.train_lengths(keys).argmax()])
    sample = data.train_set[key]

    def kept(n: int) -> int:
        batch = trainer.strategy.batch_to_device(pad([sample] * n, data.tokenizer.eos_id))
        with trainer.precision_plugin.forward_context(), left_out(module.gpt):
            return kept_bytes(lambda: module.loss_sum(batch), module)

    once, twice = kept(1), kept(2)
    return once + (n_rows - 1) * (twice - once)


def kept_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that a forward pass of a module keeps for the backward pass besides its parameters."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # with its graph, it would never be freed

    with saved_tensors_hooks(count, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(kept.values())
