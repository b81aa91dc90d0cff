"""Greedy decoding with transformers.

python -m benchmarks.contestants.generate_transformers RECORD WEIGHTS PROMPTS N_NEW PRECISION
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.record import Record

N_REPEATS = 2  # the first warms up


def main(record_path: str, weights: str, prompts: str, n_new: str, precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    ids = json.loads(Path(prompts).read_text())
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])  # on the left
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    record = Record(record_path)
    for _ in range(N_REPEATS):
        record.start()
        with torch.inference_mode():
            out = model.generate(
                input_ids=padded.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=int(n_new),
                min_new_tokens=int(n_new),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        record.step(out[:, longest:].numel(), None)
    record.facts["outputs"] = out[:, longest:].tolist()
    record.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
