"""The optimizer step of both LightningModules: an exact mean over all micro-batches."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.batching import MicroBatch
from pipeline.console import warn
from pipeline.hardware import available_memory_bytes, keep_freed_memory
from pipeline.resume import check_alike
from pipeline.training import sharding, training_graph
from pipeline.training.lit_checkpoint import LitCheckpoint
from pipeline.training.memory import GIB, estimate_gib
from pipeline.training.optim import check_warmup, learning_rate_factor, make_optimizer
from pipeline.training.steps import is_logged_step, log_figures


class LitStep(LitCheckpoint):
    """One batch is one optimizer step: the exact mean of its losses over all micro-batches."""

    automatic_optimization = False

    @abstractmethod
    def loss_sum(self, micro_batch: MicroBatch) -> Tensor:
        """Scalar sum of the losses of a micro-batch, in nats."""

    @abstractmethod
    def n_targets(self, micro_batch: MicroBatch) -> int:
        """Number of losses in that sum."""

    def on_fit_start(self) -> None:
        """Warns of too little memory; on a CPU reuses freed memory, on a GPU captures passes.

        Raises:
            ValueError: the ranks differ, as when a node has other files.
        """
        own = {"ckpt_path": str(self.ckpt_path), **self.identity()}
        first, *others = sharding.of_ranks(self.trainer, own)
        for rank, other in enumerate(others, start=1):
            check_alike(first, other, rank)
        if self.device.type == "cpu":
            keep_freed_memory()
        needed, free = self.memory_gib(), available_memory_bytes(self.device) / GIB
        if needed > free:
            warn(
                f"training needs about {needed:.1f} GiB beside the weights, {free:.1f} GiB are "
                f"free; lower data.max_tokens (it is {self.data.max_tokens}) or train adapters "
                "(model.lora)."
            )
        if self.cuda_graphs is not False:
            training_graph.install(self.gpt, self.trainer, is_asked_for=bool(self.cuda_graphs))

    def on_train_start(self) -> None:
        """Sets the learning rate of the first step; a checkpoint's fits its own run's length."""
        schedule: Any = self.lr_schedulers()
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):  # of a subclass
            return
        groups = schedule.optimizer.param_groups
        for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * factor(schedule.last_epoch)

    def teardown(self, stage: str) -> None:
        """Removes captured graphs: they are bound to the weights' present addresses."""
        if self.model is not None:
            training_graph.remove(self.gpt)

    def memory_gib(self) -> float:
        """Estimated memory of a training step beside the weights, in GiB."""
        half = "16" in str(self.trainer.precision)
        return estimate_gib(self.model, self.gpt, self.data.max_tokens, half=half)

    def training_step(self, batch: list[MicroBatch], batch_idx: int) -> Tensor:
        """Backward over all micro-batches, then one optimizer step; returns the mean loss."""
        self._step = batch
        optimizer = self.optimizers()
        is_graph = training_graph.is_installed(self.gpt)
        optimizer.zero_grad(set_to_none=not is_graph)  # type: ignore[union-attr]
        n_targets = self.over_ranks(sum(self.n_targets(micro_batch) for micro_batch in batch))
        mean = torch.zeros((), device=self.device)
        micro_batches = self.micro_batches(batch)
        for i, (micro_batch, is_own) in enumerate(micro_batches, start=1):
            with self._synchronized(last=i == len(micro_batches)):
                share = float(is_own) * self.loss_sum(micro_batch) / n_targets
                self.manual_backward(share * self.trainer.world_size)  # averaged over ranks
            mean += share.detach()
        mean = self.trainer.strategy.reduce(mean, reduce_op="sum")
        self._loss = mean
        rate = optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
        optimizer.step()  # type: ignore[union-attr]
        if (schedule := self.lr_schedulers()) is not None:
            schedule.step()  # type: ignore[union-attr]
        if is_logged_step(self.trainer):
            self.log("train/loss", mean, prog_bar=True)
            figures = {
                "train/lr": rate,
                "train/grad_norm": self._norm,
                "train/skipped_steps": float(self._guard.in_all),
            }
            log_figures(self, figures)
        return mean

    def over_ranks(self, count: int, operation: str = "sum") -> int:
        """A count over all ranks: their sum, or the largest (max)."""
        if self.trainer.world_size == 1:
            return count
        counts = torch.tensor(count, device=self.device)
        return int(self.trainer.strategy.reduce(counts, reduce_op=operation))

    def micro_batches(self, batch: list[MicroBatch]) -> list[tuple[MicroBatch, bool]]:
        """This rank's micro-batches, each with true, then fillers with false, which weigh nothing.

        All ranks get equally many, so that none waits for another.
        """
        n_missing = self.over_ranks(len(batch), "max") - len(batch)
        fillers = [(self._filler(), False) for _ in range(n_missing)]
        return [*((micro_batch, True) for micro_batch in batch), *fillers]

    def _filler(self) -> MicroBatch:
        ids = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
        return MicroBatch(input_ids=ids, labels=ids, label=ids[0, :1])

    def _synchronized(self, *, last: bool) -> AbstractContextManager:
        model: Any = self.trainer.strategy.model
        return nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips the (unscaled) gradients, and drops them where they or the loss are not finite."""
        trained = [p for p in self.parameters() if p.grad is not None]
        max_norm = self.optimizer_config.max_grad_norm
        norm = sharding.gathered(nn.utils.clip_grad_norm_(trained, max_norm), keep=True)
        self._norm = norm
        # both are over all ranks; under 16-mixed, gradients overflow routinely and the scaler skips
        # those steps itself, but a loss that is not finite counts as in other precisions
        is_finite = bool(torch.isfinite(self._loss if self._has_scaler else norm + self._loss))
        if not is_finite:
            optimizer.zero_grad(set_to_none=True)
        self._guard.saw(is_finite, self.trainer, self._step)

    @property
    def _has_scaler(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def configure_optimizers(self) -> Any:
        """AdamW or Muon, with warm-up and a cosine over the whole run, updated every step."""
        config, n_steps = self.optimizer_config, self.trainer.estimated_stepping_batches
        if n_steps == float("inf"):
            raise ValueError("the run has no end; give trainer.max_steps or trainer.max_epochs.")
        total_steps = int(n_steps)
        check_warmup(config.warmup_steps, total_steps)
        optimizer = make_optimizer(self.model, config, is_scaled=self._has_scaler)
        factor: Callable[[int], float] = partial(
            learning_rate_factor,
            warmup_steps=config.warmup_steps,
            total_steps=total_steps,
            final=config.final_lr_fraction,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]
