"""LitLanguageModel: pretraining and instruction tuning, with one loss on different data."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric

from datamodules.batching import MicroBatch
from pipeline.gpt import GPT
from pipeline.loss import count_supervised, cross_entropies, next_token_loss
from pipeline.models import Loaded
from pipeline.training.lit_step import LitStep


class LitLanguageModel(LitStep):
    """Language model, trained by next-token prediction."""

    kind = "language_model"
    model: GPT

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.gpt_config is not None and not self.gpt_config.causal:
            raise ValueError(
                "model.gpt.causal is false: every token would see the one that it has to predict; "
                "give true."
            )
        self._cross_entropies = cross_entropies
        self.loss_mean = MeanMetric(nan_strategy=math.nan)  # "disable" drops weights, others NaN

    def wrap(self, gpt: GPT, loaded: Loaded | None) -> nn.Module:
        """The transformer itself."""
        if loaded is not None and loaded.model is not gpt:
            raise ValueError(
                f"model.init_from ({loaded.path}) is a classifier, which predicts no tokens; "
                "start from the language model that it was made from."
            )
        return gpt

    def compile_loss(self) -> None:
        """Compiles the loss, so that half-precision logits are not copied to float32."""
        self._cross_entropies = torch.compile(cross_entropies)

    def loss_sum(self, micro_batch: MicroBatch) -> Tensor:
        """Sum of next-token losses, in nats."""
        hidden = self.model(micro_batch["input_ids"], micro_batch.get("attention_mask"))
        labels, head = micro_batch["labels"], self.model.head.weight
        return next_token_loss(hidden, head, labels, self._cross_entropies)[0]

    def n_targets(self, micro_batch: MicroBatch) -> int:
        """Number of supervised positions."""
        return count_supervised(micro_batch["labels"])

    def validation_step(self, batch: list[MicroBatch], batch_idx: int) -> None:
        """Updates the mean loss, weighted by supervised tokens."""
        for micro_batch, is_own in self.micro_batches(batch):
            loss_sum, n_targets = self.loss_sum(micro_batch), self.n_targets(micro_batch)
            if is_own and n_targets:
                self.loss_mean.update(loss_sum / n_targets, n_targets)

    def on_validation_epoch_end(self) -> None:
        """Logs loss, perplexity and bits per byte."""
        split = "test" if self.trainer.testing else "val"
        nats = self.loss_mean.compute()
        self.loss_mean.reset()
        self.log(f"{split}/loss", nats, prog_bar=True)
        self.log(f"{split}/perplexity", nats.exp())
        if bytes_per_token := getattr(self.data, "val_bytes_per_token", None):
            self.log(f"{split}/bits_per_byte", nats / math.log(2) / bytes_per_token, prog_bar=True)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def predict_step(self, batch: list[MicroBatch], batch_idx: int) -> list[dict[str, Any]]:
        """Loss of every sample: its sum in nats, and over how many tokens."""
        return [
            {"sample_id": int(row["sample_ids"][0]), "nats": self.loss_sum(row).item(), "tokens": n}
            for micro_batch in batch
            for row in rows(micro_batch)
            if (n := self.n_targets(row))
        ]


def rows(micro_batch: MicroBatch) -> list[MicroBatch]:
    """A micro-batch of B rows as B micro-batches of one."""
    n_rows = len(micro_batch["input_ids"])
    return [{key: value[i : i + 1] for key, value in micro_batch.items()} for i in range(n_rows)]  # type: ignore
