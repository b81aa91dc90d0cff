"""The naive reference of P8: the plain loop at a constant rate, with its validation losses.

    python -m benchmarks.contestants.plain_to_loss RECORD WEIGHTS STEPS VALIDATION EVERY

STEPS is an array (steps, B, T) of token ids, VALIDATION one of rows (N, T); validation's time does
not count.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants.plain_loop import BETAS, CLIP, LEARNING_RATE, PlainGPT2, load
from benchmarks.record import Record


def loss_of(model: PlainGPT2, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: PlainGPT2, rows: Tensor) -> float:
    sums = [float(loss_of(model, some)) * len(some) for some in rows.split(8)]
    return sum(sums) / len(rows)


def main(record_path: str, weights: str, steps: str, validation: str, every: str) -> None:
    model = load(Path(weights))
    tokens, held_out = (torch.from_numpy(np.load(path)).long() for path in (steps, validation))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0
    )
    record = Record(record_path)
    for step, ids in enumerate(tokens, 1):
        loss = loss_of(model, ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        record.step(ids.numel(), float(loss.detach()))
        if step % int(every) == 0:
            record.validation(validation_loss(model, held_out))
    record.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
