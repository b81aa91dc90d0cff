"""A bare loop around our own model, optimizer and data: what is left without the framework.

python -m benchmarks.contestants.bare_loop RECORD WEIGHTS N_ROWS N_STEPS PRECISION

The record has the seconds that each step waits for its data, as `data_s`.
"""

import sys
import time

import torch
from torch import nn

from benchmarks import prepare
from benchmarks.record import Record
from pipeline.loss import next_token_loss
from pipeline.models import load
from pipeline.training.optim import OptimizerConfig, make_optimizer

OPTIMIZER = OptimizerConfig(
    name="adamw",
    lr=1e-3,
    final_lr_fraction=1.0,
    warmup_steps=0,
    weight_decay=0.0,
    betas=(0.9, 0.95),
    max_grad_norm=1.0,
)


def main(record_path: str, weights: str, n_rows: str, n_steps: str, precision: str) -> None:
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(weights).gpt.train().to(device)
    data = prepare.prose(model.config.block_size, int(n_rows))
    batches = iter(data.train_dataloader())
    optimizer = make_optimizer(model, OPTIMIZER)
    record = Record(record_path)
    waited = record.facts.setdefault("data_s", [])
    for _ in range(int(n_steps)):
        start = time.perf_counter()
        (micro_batch,) = next(batches)
        waited.append(time.perf_counter() - start)
        ids = micro_batch["input_ids"].to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            total, count = next_token_loss(model(ids), model.head.weight, ids)
            loss = total / count
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        record.step(ids.numel(), float(loss.detach()))
    record.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
