"""transformers' Trainer on the same weights and tokens as the others.

python -m benchmarks.contestants.transformers_pretrain RECORD WEIGHTS STEPS N_STEPS PRECISION
"""

import sys
import tempfile
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from benchmarks.contestants.transformers_steps import STEADY, recording


def main(record_path: str, weights: str, steps: str, n_steps: str, precision: str) -> None:
    tokens = np.load(steps)[: int(n_steps)]
    rows = [
        {"input_ids": torch.from_numpy(row).long()} for row in tokens.reshape(-1, tokens.shape[2])
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=tokens.shape[1],
            max_steps=int(n_steps),
            learning_rate=1e-3,
            adam_beta2=0.95,
            bf16=precision == "bf16",
            **STEADY,
        )

        def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
            ids = torch.stack([sample["input_ids"] for sample in samples])
            return {"input_ids": ids, "labels": ids}

        model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
        trainer = recording(Trainer, record_path)(
            model=model, args=arguments, train_dataset=rows, data_collator=collate
        )
        trainer.train()
        trainer.record.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
