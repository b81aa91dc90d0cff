"""What both LightningModules share: starting weights, the exact optimizer step, checkpoints."""

import sys
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from datamodules.batching import MicroBatch
from datamodules.step_data_module import StepDataModule
from pipeline import held_out, lora, sharding, training_graph
from pipeline.checkpoint import CHECKPOINTS
from pipeline.compiling import compile_blocks
from pipeline.directories import path_digest
from pipeline.gpt import GPT, GPTConfig
from pipeline.hardware import available_memory_bytes, keep_freed_memory
from pipeline.lora import LoRAConfig
from pipeline.memory import GIB, estimate_gib
from pipeline.models import Loaded, describe_base, load
from pipeline.nonfinite import NonFiniteGuard
from pipeline.optim import OptimizerConfig, check_warmup, learning_rate_factor, make_optimizer
from pipeline.resume import check_alike, check_base, check_resumable, check_tensors
from pipeline.runs.run_directory import flat
from pipeline.steps import is_logged_step, run_of

VOCAB_MULTIPLE = 64  # matrix products are faster on round sizes


class LitStep(pl.LightningModule):
    """One batch is one optimizer step: the exact mean of its losses, whatever the micro-batches.

    Args:
        gpt: a model to build anew; or else
        init_from: a checkpoint whose weights to start from.
        lora: adapters to train instead of the weights.
        optimizer: how weights are updated.
        gradient_checkpointing: compute blocks again in the backward pass instead of keeping all
            that it needs: less memory for about a third more time, the same numbers.
        compile: compile blocks and loss with torch.compile; it pays on a GPU, after a minute of
            compiling. A resumed run may then round differently.
        cuda_graphs: capture each training pass as CUDA graphs, which pays where it is many small
            operations; null: wherever it can be done.
    """

    automatic_optimization = False
    strict_loading = False  # on_load_checkpoint is stricter
    kind: str
    model: Any
    allow_changes = False  # go on from a checkpoint of another run
    ckpt_path: str | None = None  # what is gone on from

    def __init__(
        self,
        optimizer: OptimizerConfig,
        *,
        gpt: GPTConfig | None = None,
        init_from: str | None = None,
        lora: LoRAConfig | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        cuda_graphs: bool | None = None,
    ) -> None:
        super().__init__()
        if (gpt is None) == (init_from is None):
            raise ValueError(
                "give either model.gpt (a new model) or model.init_from (weights to start from); "
                + ("both are given." if gpt else "neither is given.")
            )
        self.gpt_config, self.init_from = gpt, init_from
        self.lora_config, self.optimizer_config = lora, optimizer
        self.gradient_checkpointing = gradient_checkpointing
        self.is_compiled, self.cuda_graphs = compile, cuda_graphs
        self.model = None
        self.base: dict[str, Any] | None = None
        self.parent: dict[str, str] | None = None
        self.earlier: list[dict[str, Any]] = []  # trainings that the starting weights went through
        self._step: list[MicroBatch] = []  # that is being taken
        self._loss = self._norm = torch.zeros(())  # its mean loss, the norm of its gradients
        self._guard = NonFiniteGuard()

    # What a subclass decides

    @abstractmethod
    def wrap(self, gpt: GPT, loaded: Loaded | None) -> nn.Module:
        """The trained module around a transformer."""

    @abstractmethod
    def loss_sum(self, micro_batch: MicroBatch) -> Tensor:
        """Scalar sum of the losses of a micro-batch, in nats."""

    @abstractmethod
    def n_targets(self, micro_batch: MicroBatch) -> int:
        """How many losses that sum adds up."""

    @property
    def data(self) -> StepDataModule:
        """The data module that the trainer runs on."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def gpt(self) -> GPT:
        """The transformer in the model, or that the model is."""
        return getattr(self.model, "gpt", self.model)

    def compile_loss(self) -> None:
        """Compiles what of the loss is worth it."""

    # Weights

    def configure_model(self) -> None:
        """Builds or loads the model; called by Lightning once the data is there."""
        if self.model is not None:
            return
        self.model = self.build()
        fits = self.trainer.state.fn == TrainerFn.FITTING
        if self.lora_config is not None and fits and str(self.trainer.precision) == "bf16-mixed":
            lora.hold_base(self.model, torch.bfloat16)
        if self.is_compiled and fits:
            compile_blocks(self.gpt)
            self.compile_loss()
        if isinstance(self.trainer.strategy, sharding.FullySharded):
            sharding.shard(self.model, self.trainer.strategy.device_mesh["data_parallel"])
        self.train()

    def build(self) -> nn.Module:
        """The model, with its adapters."""
        loaded = load(self.init_from) if self.init_from else None
        gpt = loaded.gpt if loaded else self._new_gpt()
        self._check_fit(gpt.config, loaded)
        gpt.gradient_checkpointing = self.gradient_checkpointing
        if loaded is not None:
            self._check_held_out(loaded.meta)
            self.earlier = held_out.trained_on(loaded.meta)
            self.parent = {"path": str(loaded.path), "digest": path_digest(loaded.path)}
        if loaded is not None and self.lora_config is not None:
            folder = Path(self.trainer.default_root_dir) / CHECKPOINTS
            self.base = describe_base(loaded, folder)
        model = self.wrap(gpt, loaded)
        if self.lora_config is not None:
            self.lora_config = lora.attach(model, self.lora_config)
        return model

    def on_fit_start(self) -> None:
        """Warns of too little memory; has it kept between steps, and passes captured on a GPU.

        Raises:
            ValueError: processes differ, as where a node has other files.
        """
        own = {"ckpt_path": str(self.ckpt_path), **self.identity()}
        first, *others = sharding.of_ranks(self.trainer, own)
        for rank, other in enumerate(others, start=1):
            check_alike(first, other, rank)
        if self.device.type == "cpu":
            keep_freed_memory()
        needed, free = self.memory_gib(), available_memory_bytes(self.device) / GIB
        if needed > free:
            print(
                f"warning: training needs about {needed:.1f} GiB of memory, {free:.1f} GiB are "
                f"free; lower data.max_tokens (it is {self.data.max_tokens}) or train adapters "
                "(model.lora).",
                file=sys.stderr,
            )
        if self.cuda_graphs is not False:
            training_graph.install(self.gpt, self.trainer, is_asked_for=bool(self.cuda_graphs))

    def on_train_start(self) -> None:
        """Takes the first step at this run's rate: that of a checkpoint is of its run's length."""
        schedule: Any = self.lr_schedulers()
        groups = schedule.optimizer.param_groups
        for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * factor(schedule.last_epoch)

    def teardown(self, stage: str) -> None:
        """Removes captured graphs: they hold for the weights' present addresses."""
        if self.model is not None:
            training_graph.remove(self.gpt)

    def memory_gib(self) -> float:
        """About what a training step needs."""
        half = "16" in str(self.trainer.precision)
        return estimate_gib(self.model, self.gpt, self.data.max_tokens, half=half)

    def _new_gpt(self) -> GPT:
        assert self.gpt_config is not None
        n_vocab = self.data.tokenizer.n_vocab
        rounded = -(-n_vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        vocab_size = self.gpt_config.vocab_size or rounded
        if vocab_size < n_vocab:
            raise ValueError(
                f"model.gpt.vocab_size is {vocab_size} but the tokenizer has {n_vocab} tokens; "
                "leave it null to take the tokenizer's."
            )
        return GPT(replace(self.gpt_config, vocab_size=vocab_size))

    def _check_fit(self, config: GPTConfig, loaded: Loaded | None) -> None:
        if loaded is not None and not loaded.tokenizer.is_like(self.data.tokenizer):
            raise ValueError(
                f"data.tokenizer ({self.data.tokenizer.name}) is not the tokenizer of "
                f"{self.init_from} ({loaded.tokenizer.name}); leave it null to take that."
            )
        check_context(self.data, config.block_size)

    def _check_held_out(self, meta: dict[str, Any]) -> None:
        """Refuses to evaluate on data that the weights were trained on, or in another form.

        Training goes on from them on such data, with a warning.
        """
        assert self.init_from is not None
        data, fn = self.data, self.trainer.state.fn
        if fn == TrainerFn.FITTING:
            if self.trainer.is_global_zero:
                held_out.warn_of_split(self.init_from, meta, data.config, data.fingerprint)
            return
        if meta.get("dataset") is not None:
            held_out.check_form(self.init_from, meta, data.meta())
        split = "val" if fn == TrainerFn.VALIDATING else "test"
        held_out.check_held_out(meta, data.config, data.fingerprint, [split])

    # The optimizer step

    def training_step(self, batch: list[MicroBatch], batch_idx: int) -> Tensor:
        """Backward over all micro-batches, then one optimizer step; returns the mean loss."""
        self._step = batch
        optimizer = self.optimizers()
        is_graph = training_graph.is_installed(self.gpt)
        optimizer.zero_grad(set_to_none=not is_graph)  # type: ignore[union-attr]
        n_targets = self.over_ranks(sum(self.n_targets(micro_batch) for micro_batch in batch))
        mean = torch.zeros((), device=self.device)
        n_micro_batches = self.over_ranks(len(batch), "max")  # none may wait for another
        for i in range(n_micro_batches):
            micro_batch, weight = (batch[i], 1.0) if i < len(batch) else (self._filler(), 0.0)
            with self._synchronized(last=i == n_micro_batches - 1):
                share = weight * self.loss_sum(micro_batch) / n_targets
                self.manual_backward(share * self.trainer.world_size)  # ranks are averaged
            mean += share.detach()
        mean = self.trainer.strategy.reduce(mean, reduce_op="sum")
        self._loss = mean
        rate = optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
        optimizer.step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        if is_logged_step(self.trainer):
            self.log("train/loss", mean, prog_bar=True)
            self.log("train/lr", rate)
            self.log("train/grad_norm", self._norm)
            self.log("train/skipped_steps", float(self._guard.in_all))
        return mean

    def over_ranks(self, count: int, operation: str = "sum") -> int:
        """A count over all ranks: their sum, or the largest (max)."""
        if self.trainer.world_size == 1:
            return count
        counts = torch.tensor(count, device=self.device)
        return int(self.trainer.strategy.reduce(counts, reduce_op=operation))

    def _filler(self) -> MicroBatch:
        """What a rank goes through that has fewer micro-batches than another; it weighs nothing."""
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
        # both are of all ranks; under 16-mixed gradients overflow routinely, and the scaler skips
        # those steps by itself, but a loss that is not finite is what it is elsewhere
        is_finite = bool(torch.isfinite(self._loss if self._has_scaler else norm + self._loss))
        if not is_finite:
            optimizer.zero_grad(set_to_none=True)
        self._guard.saw(is_finite, self.trainer, self._step)

    @property
    def _has_scaler(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def configure_optimizers(self) -> Any:
        """AdamW or Muon, with warm-up and a cosine over the whole run, a step at a time."""
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
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)]

    # Checkpoints

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of itself; primitives."""
        return {
            "kind": self.kind,
            "step": self.global_step,
            "gpt": self.gpt.config.primitives(),
            "lora": asdict(self.lora_config) if self.lora_config else None,
            "base": self.base,
            "parent": self.parent,
            "identity": self.identity(),
            "precision": str(self.trainer.precision),
            "data": self.data.config,
            "dataset": self.data.fingerprint,
            "earlier": self.earlier,
            **self.data.meta(),
        }

    def identity(self) -> dict[str, str]:
        """What a resumed run must share with its checkpoint, as text by dotted key.

        `max_tokens` is not among it: it may be lowered where memory has run out.
        """
        model = {
            "kind": self.kind,
            "gpt": self.gpt.config.primitives(),
            "lora": asdict(self.lora_config) if self.lora_config else None,
            "optimizer": asdict(self.optimizer_config),
            "n_trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        }
        run = {"precision": self.trainer.precision, "world_size": self.trainer.world_size}
        return flat({"data": self.data.identity(), "model": model, "trainer": run})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """All weights; of a LoRA run the adapter and what else is trained, nothing of the base."""
        sharding.share_out_again(self.model)
        checkpoint["state_dict"] = self._gathered(self._own_tensors())
        checkpoint["meta"] = self.meta()
        checkpoint["tokenizer"] = self.data.tokenizer
        checkpoint["skipped"] = self._guard.state_dict()
        if self.lora_config is not None:
            checkpoint["adapter"] = self._gathered(lora.adapter_state(self.model))
            checkpoint["adapter_config"] = lora.adapter_config_json(self.lora_config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that a checkpoint is of this model, on this base, to the last tensor."""
        check_base(checkpoint["meta"]["base"], self.base)
        changes = check_resumable(checkpoint["meta"], self.meta(), allowed=self.allow_changes)
        if changes:
            self._say_what_changed(changes)
        self._remember_trainings(checkpoint["meta"])
        tensors = checkpoint["state_dict"]
        check_tensors("the checkpoint", tensors, self._own_tensors())
        self._guard.load_state_dict(checkpoint["skipped"])
        checkpoint["state_dict"] = {f"model.{name}": tensor for name, tensor in tensors.items()}
        if self.lora_config is not None:
            own = lora.adapter_state(self.model)
            lora.load_adapter(self.model, sharding.shares(checkpoint["adapter"], own))

    def _say_what_changed(self, changes: str) -> None:
        print(f"warning: this run goes on with another: {changes}", file=sys.stderr)
        if run := run_of(self.trainer):
            run.event("changes_allowed", changes=changes)

    def _remember_trainings(self, meta: dict[str, Any]) -> None:
        """What the checkpoint was trained on, should it not be this run's data, was learned too."""
        config, fingerprint = self.data.config, self.data.fingerprint
        own = {"data": config, "dataset": fingerprint}
        for training in held_out.trained_on(meta):
            if training not in (own, *self.earlier):
                self.earlier.append(training)
        if self.trainer.is_global_zero:
            held_out.warn_of_split(str(self.ckpt_path), meta, config, fingerprint)

    def _gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, on the rank that writes them."""
        whole: dict[str, Tensor] = sharding.gathered(tensors, keep=self.trainer.is_global_zero)
        return whole

    def _own_tensors(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        if self.lora_config is None:
            return {name: p.detach() for name, p in named}
        return {n: p.detach() for n, p in named if p.requires_grad and not lora.is_adapter_key(n)}


def check_context(data: StepDataModule, block_size: int) -> None:
    """Refuses rows that do not fit in the model's context.

    Raises:
        ValueError: naming both keys.
    """
    key, n_tokens = data.context
    if n_tokens > block_size:
        raise ValueError(
            f"data.{key} is {n_tokens} but model.gpt.block_size is {block_size}; "
            f"lower data.{key} or use a model with a longer context."
        )
