"""transformers and PEFT on the messages that the others train on: a head on the last token.

python -m benchmarks.contestants.transformers_classify RECORD WEIGHTS STEPS PRECISION
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from benchmarks.contestants.transformers_steps import STEADY, recording

PAD = 0


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [torch.tensor(sample["input_ids"]) for sample in samples]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=PAD),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": torch.tensor([sample["label"] for sample in samples]),
    }


def main(record_path: str, weights: str, steps: str, precision: str) -> None:
    torch.manual_seed(1)
    batches = json.loads(Path(steps).read_text())
    # the frozen weights in the precision of the products; PEFT keeps the adapters in float32
    model = AutoModelForSequenceClassification.from_pretrained(
        weights,
        num_labels=2,
        pad_token_id=PAD,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )
    model.score.float()  # and we the head, which is trained too
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(batches[0]),
            num_train_epochs=1,
            learning_rate=2e-4,
            bf16=precision == "bf16",
            **STEADY,
            label_names=["labels"],
        )
        trainer = recording(Trainer, record_path)(
            model=get_peft_model(model, lora),
            args=arguments,
            train_dataset=[sample for batch in batches for sample in batch],
            data_collator=collate,
        )
        trainer.train()
        trainer.record.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
