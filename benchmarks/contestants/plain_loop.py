"""The naive reference: GPT-2 in plain PyTorch, AdamW, a loop, as nanoGPT trains.

    python -m benchmarks.contestants.plain_loop RECORD WEIGHTS STEPS N_STEPS PRECISION

In float32 as there on a CPU; in bf16 as there on a GPU: autocast, compiled, AdamW in one kernel.
WEIGHTS is a GPT-2 directory in Hugging Face's form; STEPS an array (steps, B, T) of token ids.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.record import Record

LEARNING_RATE, BETAS, CLIP = 1e-3, (0.9, 0.95), 1.0


class Block(nn.Module):
    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            part.unflatten(2, (self.n_head, -1)).transpose(1, 2)
            for part in self.attn["c_attn"](self.ln_1(x)).chunk(3, dim=2)
        )
        y = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attn["c_proj"](y)
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](hidden)


class PlainGPT2(nn.Module):
    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        width = config["n_embd"]
        self.wte = nn.Embedding(config["vocab_size"], width)
        self.wpe = nn.Embedding(config["n_positions"], width)
        self.h = nn.ModuleList(Block(width, config["n_head"]) for _ in range(config["n_layer"]))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


def load(folder: Path) -> PlainGPT2:
    model = PlainGPT2(json.loads((folder / "config.json").read_text()))
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        is_product = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[name.removeprefix("transformer.")] = tensor.T if is_product else tensor
    model.load_state_dict({k: v for k, v in state.items() if "lm_head" not in k})
    return model


def main(record_path: str, weights: str, steps: str, n_steps: str, precision: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain, is_bf16 = load(Path(weights)).to(device), precision == "bf16"
    model = torch.compile(plain) if is_bf16 else plain
    tokens = torch.from_numpy(np.load(steps)).long().to(device)
    optimizer = torch.optim.AdamW(
        plain.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0, fused=is_bf16
    )
    record = Record(record_path)
    for ids in tokens[: int(n_steps)]:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            logits = model(ids)[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
        optimizer.step()
        record.step(ids.numel(), float(loss.detach()))
    record.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
