"""What each GPU optimisation gains by itself, in a bare loop over the pipeline's own modules.

    python -m benchmarks.gpu_levers

Random weights in the shapes of P1, P2, GPT-2 124M with GPU-sized batches, and SmolLM2-135M with
adapters; random tokens. Medians over steps, each synchronised with the GPU; bf16.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import yaml
from torch import Tensor, nn

from benchmarks.harness import ROOT, results_folder
from benchmarks.prepare import GPT2, SMALL, gpt2_config
from pipeline import lora
from pipeline.decoding import step_graph
from pipeline.decoding.packed import pack
from pipeline.decoding.passes import decode, prefill
from pipeline.gpt import GPT, GPTConfig
from pipeline.hardware import default_device, matrix_product_ceiling, peak_memory_bytes
from pipeline.loss import cross_entropies, next_token_loss
from pipeline.training.compiling import compile_blocks
from pipeline.training.flops import flops_per_token
from pipeline.training.memory import GIB
from pipeline.training.optim import OptimizerConfig, make_optimizer
from pipeline.training.training_graph import TrainingGraphs

N_WARMUP, N_TIMED = 8, 20
SHAPE = ROOT / "configs" / "model" / "smollm2-135m.yaml"
ADAMW = OptimizerConfig("adamw", 6e-4, 0.1, 0, 0.1, (0.9, 0.95), 1.0)
LORA = lora.LoRAConfig(16, 32, 0.0, ["all-linear"], rslora=False, dora=False)
SMOLLM2 = GPTConfig(
    **yaml.safe_load(SHAPE.read_text())["model"]["init_args"]["gpt"],
    vocab_size=49152,
    norm_eps=1e-5,
    dropout=0.0,
    causal=True,
)


@dataclass(frozen=True)
class Case:
    """Steps of `n_rows` rows of `n_tokens` tokens; with adapters, of 40 to `n_tokens` tokens."""

    title: str
    config: GPTConfig
    n_rows: int
    n_tokens: int
    has_adapters: bool = False


CASES = [
    Case("6 layers x 384, 32 x 256", gpt2_config(**SMALL, block_size=256), 32, 256),
    Case("GPT-2 124M, 4 x 512", gpt2_config(**GPT2, block_size=512), 4, 512),
    Case("GPT-2 124M, 32 x 1,024", gpt2_config(**GPT2, block_size=1024), 32, 1024),
    Case("LoRA r 16 on SmolLM2-135M, 8 rows of 40 to 200", SMOLLM2, 8, 200, has_adapters=True),
]


def batches(case: Case, device: torch.device) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """Token ids (B, T) and, where rows differ in length, the mask of real tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[Tensor, Tensor | None]:
        size = (case.n_rows, case.n_tokens)
        ids = torch.randint(case.config.vocab_size or 1, size, generator=generator)
        if not case.has_adapters:
            return ids.to(device), None
        lengths = torch.randint(40, case.n_tokens + 1, (case.n_rows, 1), generator=generator)
        longest = int(lengths.max())
        return ids[:, :longest].to(device), (torch.arange(longest) < lengths).to(device)

    return draw


def training(case: Case, *, compiled: bool, captured: bool, optimizer: str = "adamw") -> dict:
    """Milliseconds per step, tokens per second, share of the ceiling, peak memory (GiB)."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    device = default_device()
    torch.cuda.reset_peak_memory_stats()
    model, draw = GPT(case.config).to(device), batches(case, device)
    if case.has_adapters:
        lora.attach(model, LORA)
        lora.hold_base(model, torch.bfloat16)
    each = torch.compile(cross_entropies) if compiled else cross_entropies
    if compiled:
        compile_blocks(model)
    if captured:
        model.forward = TrainingGraphs(model)  # type: ignore[method-assign]
    adamw = make_optimizer(model, replace(ADAMW, name=optimizer))  # type: ignore[arg-type]
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> int:
        ids, mask = draw()
        labels = ids if mask is None else ids.masked_fill(~mask, -100)
        with torch.autocast(device.type, torch.bfloat16):
            loss, count = next_token_loss(model(ids, mask), model.head.weight, labels, each)
        (loss / count).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=not captured)
        return ids.numel() if mask is None else int(mask.sum())

    seconds, tokens = timed(step)
    median, rate = statistics.median(seconds), sum(tokens) / sum(seconds)
    flops = flops_per_token(model, case.n_tokens) * rate
    return {
        "ms": 1e3 * median,
        "tokens_per_s": rate,
        "share_of_ceiling": flops / matrix_product_ceiling(device, torch.bfloat16),
        "peak_gib": peak_memory_bytes(device) / GIB,
    }


def decoding(n_rows: int, *, captured: bool) -> float:
    """Milliseconds per decoding step of `n_rows` rows."""
    step_graph.WARM_UP = 2 if captured else 10**9
    model = pack(GPT(SMOLLM2).to(default_device(), torch.bfloat16))
    prompts = [list(range(5, 45 + row % 7)) for row in range(n_rows)]
    with torch.inference_mode():
        cache = prefill(model, prompts).cache
        cache.reserve(128)
        lengths = list(map(len, prompts))

        def step() -> int:
            lengths[:] = [length + 1 for length in lengths]
            decode(model, [[7]] * n_rows, lengths, cache).argmax(dim=-1).tolist()
            return n_rows

        return 1e3 * statistics.median(timed(step)[0])


def timed(step: Callable[[], int]) -> tuple[list[float], list[int]]:
    """Seconds and token counts of steps, each synchronised with the GPU."""
    seconds, counts = [], []
    for i in range(N_WARMUP + N_TIMED):
        torch.cuda.synchronize()
        start = time.perf_counter()
        count = step()
        torch.cuda.synchronize()
        if i >= N_WARMUP:
            seconds.append(time.perf_counter() - start)
            counts.append(count)
    return seconds, counts


def main() -> None:
    levers = {
        "as it is": {"compiled": False, "captured": False},
        "captured": {"compiled": False, "captured": True},
        "compiled": {"compiled": True, "captured": False},
        "both": {"compiled": True, "captured": True},
    }
    runs: list[tuple[str, str, Callable[[], dict]]] = [
        (case.title, lever, partial(training, case, **own))
        for case in CASES
        for lever, own in levers.items()
    ]
    muon = partial(training, CASES[1], compiled=False, captured=True, optimizer="muon")
    runs.append((CASES[1].title, "captured, Muon", muon))
    for n_rows in (1, 16, 64):
        for captured in (False, True):
            lever = "captured" if captured else "as it is"
            run = partial(decoding, n_rows, captured=captured)
            runs.append((f"decoding, {n_rows} rows", lever, lambda run=run: {"ms": run()}))  # type: ignore[misc]
    found = []
    for title, lever, run in runs:
        found.append({"case": title, "lever": lever, **run()})
        figures = "  ".join(
            f"{key} {value:,.2f}"
            for key, value in found[-1].items()
            if key != "case" and key != "lever"
        )
        print(f"{title:50} {lever:16} {figures}", flush=True)
    path = results_folder() / "levers.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
