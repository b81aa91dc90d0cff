"""What a LightningModule's checkpoints hold, and when a run may resume from one."""

from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from pipeline import held_out, lora
from pipeline.console import warn
from pipeline.resume import check_base, check_resumable, check_tensors
from pipeline.runs.run_directory import flat
from pipeline.training import sharding
from pipeline.training.lit_model import LitModel
from pipeline.training.nonfinite import NonFiniteGuard
from pipeline.training.steps import run_of


class LitCheckpoint(LitModel):
    """Checkpoints that resume exactly; a LoRA run's hold what is trained and name the base."""

    strict_loading = False  # on_load_checkpoint is stricter
    allow_changes = False  # resume even if data or model have changed
    ckpt_path: str | None = None  # checkpoint that the run resumes from

    def meta(self) -> dict[str, Any]:
        """Metadata of a checkpoint; primitives only."""
        return {
            "kind": self.kind,
            "step": self.global_step,
            "gpt": asdict(self.gpt.config),
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

        `max_tokens` is left out: it may be lowered when memory has run out.
        """
        model = {
            "kind": self.kind,
            "gpt": asdict(self.gpt.config),
            "lora": asdict(self.lora_config) if self.lora_config else None,
            "optimizer": asdict(self.optimizer_config),
            "n_trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        }
        run = {"precision": self.trainer.precision, "world_size": self.trainer.world_size}
        return flat({"data": self.data.identity(), "model": model, "trainer": run})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds all weights; in a LoRA run only those that are trained, none of the base."""
        sharding.share_out_again(self.model)
        gathered = partial(sharding.gathered, keep=self.trainer.is_global_zero)
        checkpoint["state_dict"] = gathered(self._own_tensors())
        checkpoint["meta"] = self.meta()
        checkpoint["tokenizer"] = self.data.tokenizer
        checkpoint["skipped"] = asdict(self._guard)
        if self.lora_config is not None:
            checkpoint["adapter"] = gathered(lora.adapter_state(self.model))
            checkpoint["adapter_config"] = lora.adapter_config_json(self.lora_config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that a checkpoint fits model and base to the last tensor; loads the adapter."""
        check_base(checkpoint["meta"]["base"], self.base)
        changes = check_resumable(checkpoint["meta"], self.meta(), allowed=self.allow_changes)
        if changes:
            warn(f"this run resumes one that differs: {changes}")
            if run := run_of(self.trainer):
                run.event("changes_allowed", changes=changes)
        self._remember_trainings(checkpoint["meta"])
        tensors = checkpoint["state_dict"]
        check_tensors("the checkpoint", tensors, self._own_tensors())
        self._guard = NonFiniteGuard(**checkpoint["skipped"])
        checkpoint["state_dict"] = {f"model.{name}": tensor for name, tensor in tensors.items()}
        if self.lora_config is not None:
            own = lora.adapter_state(self.model)
            lora.load_adapter(self.model, sharding.shares(checkpoint["adapter"], own))

    def _remember_trainings(self, meta: dict[str, Any]) -> None:
        """Records other data that the checkpoint was trained on; warns of another split."""
        config, fingerprint = self.data.config, self.data.fingerprint
        for training in held_out.trained_on(meta):
            is_own = training["dataset"].get("digest") == fingerprint["digest"]
            if not is_own and training not in self.earlier:
                self.earlier.append(training)
        if self.trainer.is_global_zero:
            held_out.warn_of_split(str(self.ckpt_path), meta, config, fingerprint)

    def _own_tensors(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        if self.lora_config is None:
            return {name: p.detach() for name, p in named}
        return {n: p.detach() for n, p in named if p.requires_grad and not lora.is_adapter_key(n)}
