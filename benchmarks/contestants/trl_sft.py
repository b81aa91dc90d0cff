"""TRL's SFTTrainer with PEFT's LoRA: instructions, loss on the responses alone.

    python -m benchmarks.contestants.trl_sft RECORD WEIGHTS ENTRIES PRECISION RANK TARGETS

ENTRIES is JSON: {prompt, completion} each, in the order in which they are trained.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.contestants.transformers_steps import STEADY, recording


def main(
    record_path: str, weights: str, entries: str, precision: str, rank: str, targets: str
) -> None:
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=8,
            num_train_epochs=1,
            learning_rate=2e-4,
            bf16=precision == "bf16",
            gradient_checkpointing=False,
            max_length=512,
            **STEADY,
        )
        lora = LoraConfig(
            r=int(rank),
            lora_alpha=2 * int(rank),
            target_modules=targets if targets == "all-linear" else targets.split(","),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        # the frozen weights in the precision of the products; PEFT keeps the adapters in float32
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        trainer = recording(SFTTrainer, record_path)(
            model=AutoModelForCausalLM.from_pretrained(weights, dtype=dtype),
            args=arguments,
            train_dataset=Dataset.from_list(json.loads(Path(entries).read_text())),
            processing_class=AutoTokenizer.from_pretrained(weights),
            peft_config=lora,
        )
        trainer.train()
        trainer.record.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
