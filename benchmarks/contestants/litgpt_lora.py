"""litgpt's own `fit` of `litgpt finetune_lora`, unmodified: instructions, loss on the responses.

    python -m benchmarks.contestants.litgpt_lora RECORD WEIGHTS ENTRIES PRECISION RANK TARGETS

WEIGHTS is a directory of `litgpt convert_to_litgpt`; ENTRIES JSON: {prompt, completion} each, in
the order in which they are trained; PRECISION one of Fabric's. The rate is constant, as for all:
the scheduler of the recipe always warms up. The recipe does not clip gradients.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.loggers.logger import Logger
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import SFTDataset, get_sft_collate_fn
from litgpt.finetune.lora import fit
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer
from litgpt.utils import load_checkpoint
from torch.utils.data import DataLoader, Dataset, SequentialSampler, Subset

from benchmarks.record import Record

BATCH, MAX_LENGTH = 8, 512


class Clock(Logger, SequentialSampler):  # type: ignore[misc]
    """Hears of every step, as a logger, and of the beginning of the epoch, as a sampler."""

    name, version = "clock", 0

    def __init__(self, path: str, dataset: Dataset[Any]) -> None:
        SequentialSampler.__init__(self, dataset)
        self.record, self.n_tokens = Record(path), 0

    def __iter__(self) -> Any:
        self.record.start()
        return super().__iter__()

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if "loss" in metrics:  # the others are of litgpt's throughput monitor
            n_tokens = int(metrics["tokens"])
            self.record.step(n_tokens - self.n_tokens, metrics["loss"])
            self.n_tokens = n_tokens

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def main(
    record_path: str, weights: str, entries: str, precision: str, rank: str, targets: str
) -> None:
    everything = targets == "all-linear"
    config = Config.from_file(
        Path(weights) / "model_config.yaml",
        lora_r=int(rank),
        lora_alpha=2 * int(rank),
        lora_dropout=0.0,
        lora_query=True,
        lora_key=everything,
        lora_value=True,
        lora_projection=everything,
        lora_mlp=everything,
    )
    rows = [
        {"instruction": entry["prompt"], "output": entry["completion"]}
        for entry in json.loads(Path(entries).read_text())
    ]
    dataset = SFTDataset(rows, Tokenizer(weights), Default(), MAX_LENGTH)
    clock = Clock(record_path, dataset)
    options: Any = {"batch_size": BATCH, "collate_fn": get_sft_collate_fn(MAX_LENGTH)}
    fabric = L.Fabric(devices=1, precision=precision, loggers=clock)  # type: ignore[arg-type]
    loaders = fabric.setup_dataloaders(
        DataLoader(dataset, sampler=clock, **options), DataLoader(Subset(dataset, [0]), **options)
    )
    fabric.seed_everything(1)
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0)
    )
    load_checkpoint(fabric, model, Path(weights) / "lit_model.pth", strict=False)
    with tempfile.TemporaryDirectory() as folder:
        fit(
            fabric=fabric,
            model=model,
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
            train_dataloader=loaders[0],
            val_dataloader=loaders[1],
            devices=1,
            checkpoint_dir=Path(weights),
            out_dir=Path(folder),
            train=TrainArgs(
                save_interval=None,
                global_batch_size=BATCH,
                micro_batch_size=BATCH,
                epochs=1,
                max_steps=len(loaders[0]),
                max_seq_length=MAX_LENGTH,
            ),
            eval=EvalArgs(interval=len(loaders[0]) + 1),
            data=None,
        )
    clock.record.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
