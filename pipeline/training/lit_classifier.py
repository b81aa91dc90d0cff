"""LitClassifier: trains a head on the last real token, and as much of the model as configured."""

import math
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.utilities import dim_zero_cat

from datamodules.batching import MicroBatch
from pipeline.classifier import GPTClassifier
from pipeline.gpt import GPT
from pipeline.models import Loaded
from pipeline.training.lit_step import LitStep


class LitClassifier(LitStep):
    """Text classifier, trained by cross-entropy on the labels.

    Args:
        trainable: what to train besides the head: nothing (head), the last block and the final
            norm (last_block), everything (all), or adapters (lora, see `lora`).
        **options: those of `LitStep`.
    """

    kind = "classifier"
    model: GPTClassifier

    def __init__(
        self, trainable: Literal["head", "last_block", "all", "lora"], **options: Any
    ) -> None:
        super().__init__(**options)
        if (trainable == "lora") != (self.lora_config is not None):
            raise ValueError(
                f"model.trainable is {trainable} but model.lora is "
                f"{'given' if self.lora_config else 'not given'}; give both or neither."
            )
        self.trainable = trainable
        self.predictions: list[dict[str, Tensor]] = []

    def wrap(self, gpt: GPT, loaded: Loaded | None) -> nn.Module:
        """The transformer with a head; freezes what is not trained below the head."""
        names = self.data.meta()["label_names"]
        if loaded is not None and isinstance(loaded.model, GPTClassifier):
            if loaded.meta["label_names"] != names:
                raise ValueError(
                    f"data.label_names are {names}, those of {self.init_from} are "
                    f"{loaded.meta['label_names']}; they must be the same, in the same order."
                )
            model = loaded.model
        elif loaded is not None and self.trainer.state.fn != TrainerFn.FITTING:
            raise ValueError(f"{self.init_from} is not a classifier; tune one with fit first.")
        else:
            model = GPTClassifier(gpt, n_labels=len(names))
        self.metrics = make_metrics(len(names))
        self.loss_mean = MeanMetric(nan_strategy=math.nan)  # "disable" drops weights, others NaN
        model.requires_grad_(self.trainable == "all")
        if self.trainable == "last_block":
            model.gpt.blocks[-1].requires_grad_(True)
            model.gpt.final_norm.requires_grad_(True)
        return model

    def build(self) -> nn.Module:
        """Builds the model and unfreezes its head, which attaching adapters freezes."""
        model: Any = super().build()
        model.classifier.requires_grad_(True)
        return model

    def loss_sum(self, micro_batch: MicroBatch) -> Tensor:
        """Sum of cross-entropies, in nats."""
        logits = self._logits(micro_batch)
        return F.cross_entropy(logits.float(), micro_batch["label"], reduction="sum")

    def n_targets(self, micro_batch: MicroBatch) -> int:
        """One target per text."""
        return len(micro_batch["label"])

    def _logits(self, micro_batch: MicroBatch) -> Tensor:
        return self.model(micro_batch["input_ids"], micro_batch.get("attention_mask"))  # (B, K)

    def validation_step(self, batch: list[MicroBatch], batch_idx: int) -> None:
        """Updates loss and metrics."""
        for micro_batch, is_own in self.micro_batches(batch):
            logits, labels = self._logits(micro_batch).float(), micro_batch["label"]
            if is_own:
                self.loss_mean.update(F.cross_entropy(logits, labels), len(labels))
                self.metrics.update(logits.softmax(dim=-1), labels)

    def on_validation_epoch_end(self) -> None:
        """Logs loss, accuracy, precision, recall, F1 and AUROC."""
        auroc: Any = self.metrics["auroc"]
        auroc.fill_up(self.device)
        self.log("val/loss", self.loss_mean.compute(), prog_bar=True)
        for name, value in self.metrics.compute().items():
            number = value[1] if value.dim() else value  # with two labels that of the second (spam)
            self.log(f"val/{name}", number, prog_bar=name == "accuracy")
        self.loss_mean.reset()
        self.metrics.reset()

    def test_step(self, batch: list[MicroBatch], batch_idx: int) -> None:
        """Collects probabilities; scored in one go at the end, with intervals."""
        self.predictions += self.predict_step(batch, batch_idx)

    def predict_step(self, batch: list[MicroBatch], batch_idx: int) -> list[dict[str, Tensor]]:
        """Probabilities (B, K), labels (B,) and sample ids (B,) of every micro-batch."""
        return [
            {
                "sample_ids": micro_batch["sample_ids"],
                "label": micro_batch["label"],
                "probabilities": self._logits(micro_batch).float().softmax(dim=-1),
            }
            for micro_batch in batch
        ]


def make_metrics(n_labels: int) -> MetricCollection:
    """Validation metrics; with two labels, precision, recall and F1 are (2,), one value per label.

    With more labels these three, and AUROC always, are means over labels that occur, as in a test.
    """
    average: Literal["none", "macro"] = "none" if n_labels == 2 else "macro"
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(n_labels, average="micro"),
            "auroc": MeanAUROC(n_labels, average="none"),
            "precision": MulticlassPrecision(n_labels, average=average),
            "recall": MulticlassRecall(n_labels, average=average),
            "f1": MulticlassF1Score(n_labels, average=average),
        },
        compute_groups=False,
    )


class MeanAUROC(MulticlassAUROC):
    """Mean AUROC over the labels that some texts have and others do not.

    torchmetrics' own mean counts other labels as 0.
    """

    def fill_up(self, device: torch.device) -> None:
        """Gives a rank that saw no text empty tensors, without which gathering would fail."""
        if not self.preds:
            self.preds.append(torch.zeros((0, self.num_classes), device=device))
            self.target.append(torch.zeros(0, dtype=torch.int64, device=device))

    def compute(self) -> Tensor:  # type: ignore[override]
        """Scalar mean; NaN if there is no such label."""
        targets = dim_zero_cat(self.target)
        counts = targets.bincount(minlength=self.num_classes)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of absent labels
            each = super().compute()
        return each[(counts > 0) & (counts < len(targets))].mean()
