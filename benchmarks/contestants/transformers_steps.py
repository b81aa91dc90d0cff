"""A record of the steps of a transformers Trainer, of whatever class."""

from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.record import Record

STEADY: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "sequential",
    "use_cpu": not torch.cuda.is_available(),
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}  # the same for all: a constant rate, our order, nothing but training


class _Steps(TrainerCallback):
    def __init__(self, record: Record) -> None:
        self.record, self.tokens, self.loss = record, 0, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.record.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.record.step(self.tokens, self.loss)


def recording(base: Any, path: str) -> Any:
    """The Trainer class with `record`; tokens of a step are those that are not padding."""

    class Recording(base):
        def __init__(self, **options: Any) -> None:
            self.record = Record(path)
            self._steps = _Steps(self.record)
            super().__init__(callbacks=[self._steps], **options)

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            self._steps.tokens = int(inputs["input_ids"].numel() if mask is None else mask.sum())
            loss = super().training_step(model, inputs, *args, **kwargs)
            self._steps.loss = float(loss)
            return loss

    return Recording
