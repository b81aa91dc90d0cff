"""What both LightningModules train: a new model, or existing weights."""

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from datamodules.batching import MicroBatch
from datamodules.step_data_module import StepDataModule
from pipeline import held_out, lora
from pipeline.directories import CHECKPOINTS, path_digest
from pipeline.gpt import GPT, GPTConfig
from pipeline.lora import LoRAConfig
from pipeline.models import Loaded, describe_base, load
from pipeline.runs.run_directory import Run
from pipeline.training import sharding
from pipeline.training.compiling import compile_blocks
from pipeline.training.nonfinite import NonFiniteGuard
from pipeline.training.optim import OptimizerConfig
from pipeline.training.steps import run_of

VOCAB_MULTIPLE = 64  # matrix products are faster on round sizes


class LitModel(pl.LightningModule):
    """A transformer, new or from existing weights, with what a subclass puts around it.

    Args:
        gpt: configuration of a new model; give either this or init_from.
        init_from: checkpoint whose weights to start from, or any source that `import` takes.
        lora: adapters to train instead of the weights of `init_from`.
        optimizer: how weights are updated.
        gradient_checkpointing: recompute blocks in the backward pass instead of keeping their
            activations: less memory for about a third more time, the same numbers.
        compile: compile blocks and loss with torch.compile; it pays on a GPU, after a minute of
            compiling. A resumed run may then round differently.
        cuda_graphs: capture training passes as CUDA graphs, which pays where a pass is many small
            operations; null: wherever possible.
    """

    kind: str
    model: Any

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
        if lora is not None and init_from is None:
            raise ValueError(
                "model.lora is given with model.gpt, a new model, whose weights would stay random "
                "and be kept nowhere; set model.lora to null (and a classifier's model.trainable "
                "to all), or give model.init_from instead of model.gpt."
            )
        self.gpt_config, self.init_from = gpt, init_from
        self.lora_config, self.optimizer_config = lora, optimizer
        self.gradient_checkpointing = gradient_checkpointing
        self.is_compiled, self.cuda_graphs = compile, cuda_graphs
        self.model = None
        self.base: dict[str, Any] | None = None
        self.parent: dict[str, str] | None = None
        self.earlier: list[dict[str, Any]] = []  # trainings that the starting weights went through
        self._step: list[MicroBatch] = []  # micro-batches of the current step
        self._loss = self._norm = torch.zeros(())  # its mean loss, the norm of its gradients
        self._guard = NonFiniteGuard()

    @abstractmethod
    def wrap(self, gpt: GPT, loaded: Loaded | None) -> nn.Module:
        """The trained module around a transformer."""

    @property
    def data(self) -> StepDataModule:
        """The data module that the trainer runs on."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def gpt(self) -> GPT:
        """The transformer: a part of the model, or the model itself."""
        return getattr(self.model, "gpt", self.model)

    def compile_loss(self) -> None:
        """Compiles the parts of the loss that gain from it."""

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
        if run := run_of(self.trainer):
            self._log_lineage(run)

    def _log_lineage(self, run: Run) -> None:
        """Logs which data and weights a run builds on, by digest."""
        facts = self.data.fingerprint
        source = ", ".join(facts["sources"])
        run.log_dataset(type(self.data).__name__, facts["digest"], facts["counts"], source)
        if self.parent is not None:
            run.log_tags({"parent": self.parent})

    def build(self) -> nn.Module:
        """Builds or loads the model, with its adapters."""
        loaded = load(self.init_from) if self.init_from else None
        gpt = loaded.gpt if loaded else self._new_gpt()
        if loaded is not None and not loaded.tokenizer.is_like(self.data.tokenizer):
            raise ValueError(
                f"data.tokenizer ({self.data.tokenizer.name}) is not the tokenizer of "
                f"{self.init_from} ({loaded.tokenizer.name}); leave it null to take that."
            )
        check_context(self.data, gpt.config.block_size)
        gpt.n_tokens = self.data.tokenizer.n_vocab
        gpt.gradient_checkpointing = self.gradient_checkpointing
        if loaded is not None:
            self._check_held_out(loaded.meta)
            self.earlier = held_out.trained_on(loaded.meta)
            self.parent = {"path": str(loaded.path), "digest": path_digest(loaded.path)}
            if self.lora_config is not None:
                folder = Path(self.trainer.default_root_dir) / CHECKPOINTS
                self.base = describe_base(loaded, folder)
        model = self.wrap(gpt, loaded)
        if self.lora_config is not None:
            self.lora_config = lora.attach(model, self.lora_config)
        return model

    def _new_gpt(self) -> GPT:
        assert self.gpt_config is not None
        n_vocab = self.data.tokenizer.n_vocab
        vocab_size = self.gpt_config.vocab_size or n_vocab + -n_vocab % VOCAB_MULTIPLE
        if vocab_size < n_vocab:
            raise ValueError(
                f"model.gpt.vocab_size is {vocab_size} but the tokenizer has {n_vocab} tokens; "
                "leave it null to take the tokenizer's."
            )
        return GPT(replace(self.gpt_config, vocab_size=vocab_size))

    def _check_held_out(self, meta: dict[str, Any]) -> None:
        """Refuses to evaluate on data that the weights were trained on, or given in another form.

        Further training is allowed; it warns if the data are split otherwise than before.
        """
        assert self.init_from is not None
        data, fn = self.data, self.trainer.state.fn
        facts = (meta, data.config, data.fingerprint)
        if fn == TrainerFn.FITTING:
            if self.trainer.is_global_zero:
                held_out.warn_of_split(self.init_from, *facts)
            return
        if meta.get("dataset") is not None:
            held_out.check_form(self.init_from, meta, data.meta())
        split = "val" if fn == TrainerFn.VALIDATING else "test"
        held_out.check_held_out(*facts, [split], data.keys(split))


def check_context(data: StepDataModule, block_size: int) -> None:
    """ValueError if rows do not fit into the model's context."""
    key, n_tokens = data.context
    if n_tokens > block_size:
        raise ValueError(
            f"data.{key} is {n_tokens} but model.gpt.block_size is {block_size}; "
            f"lower data.{key} or use a model with a longer context."
        )
