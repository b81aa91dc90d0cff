"""How a training step's time and memory grow with context, batch, model size and LoRA rank.

    python -m benchmarks.growth

Writes growth.json, growth.md and growth.png next to the other results. Every point is measured in
its own process, whose peak memory is reported. The context varies at a constant number of tokens
per step, the batch at a constant context; gradient checkpointing is off and on at the largest
batch. Then `step = fixed + per_token * tokens + per_pair * batch * context^2` is fitted to the
points of the context and batch sweeps; the last term is attention's.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.harness import ROOT, results_folder

N_WARMUP = 2


@dataclass(frozen=True)
class Point:
    """One configuration of a step on random tokens, all supervised; rank 0 trains all weights."""

    n_layer: int
    n_embd: int
    context: int
    batch: int
    rank: int
    gradient_checkpointing: bool = False

    @property
    def n_tokens(self) -> int:
        return self.batch * self.context


@dataclass(frozen=True)
class Measured:
    """Seconds of the fastest, median and slowest step; peak memory of the process."""

    n_parameters: int
    step_s: tuple[float, float, float]
    peak_memory_gib: float


def sweeps(
    base: Point,
    contexts: Sequence[int],
    batches: Sequence[int],
    widths: Sequence[int],
    ranks: Sequence[int],
) -> dict[str, list[Point]]:
    """The points of each table, keyed by what varies in it."""
    tokens = base.batch * max(contexts)
    return {
        "context": [replace(base, context=n, batch=tokens // n) for n in contexts],
        "batch": [replace(base, batch=n) for n in batches],
        "n_embd": [replace(base, n_embd=n) for n in widths],
        "rank": [replace(base, rank=n) for n in ranks],
        "gradient_checkpointing": [
            replace(base, batch=max(batches), gradient_checkpointing=on) for on in (False, True)
        ],
    }


def measure(point: Point, n_steps: int, vocab_size: int) -> Measured:
    """Times steps at a point, in this process."""
    import torch

    from pipeline import lora
    from pipeline.gpt import GPT, GPTConfig
    from pipeline.hardware import default_device, multiplies_bf16, peak_memory_bytes
    from pipeline.loss import next_token_loss

    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=point.n_layer,
        n_head=point.n_embd // 64,
        n_kv_head=point.n_embd // 64,
        n_embd=point.n_embd,
        block_size=point.context,
        vocab_size=vocab_size,
        norm="rmsnorm",
        norm_eps=1e-5,
        position="rope",
        rope_theta=10_000.0,
        mlp="swiglu",
        mlp_hidden=point.n_embd * 8 // 3,
        bias=False,
        tie_embeddings=True,
        dropout=0.0,
        causal=True,
    )
    device = default_device()
    model, is_half = GPT(config), multiplies_bf16(device)
    model.gradient_checkpointing = point.gradient_checkpointing
    if point.rank:
        targets = lora.LoRAConfig(point.rank, 2 * point.rank, 0.0, ["all-linear"], False, False)
        lora.attach(model, targets)
        if is_half:
            lora.hold_base(model, torch.bfloat16)
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    input_ids = torch.randint(vocab_size, (point.batch, point.context), device=device)
    times = []
    for _ in range(N_WARMUP + n_steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=is_half):
            total, n_targets = next_token_loss(model(input_ids), model.head.weight, input_ids)
            (total / n_targets).backward()
        optimizer.step()
        float(total.detach())  # waits for the device
        times.append(time.perf_counter() - start)
    timed = sorted(times[N_WARMUP:])
    return Measured(
        n_parameters=model.n_parameters(),
        step_s=(timed[0], statistics.median(timed), timed[-1]),
        peak_memory_gib=peak_memory_bytes(device) / 2**30,
    )


def in_own_process(point: Point, n_steps: int, vocab_size: int) -> Measured:
    """Does the same in a process of its own."""
    call = json.dumps({"point": asdict(point), "n_steps": n_steps, "vocab_size": vocab_size})
    command = [sys.executable, "-m", "benchmarks.growth", "--call", call]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def fit_cost(points: list[tuple[Point, Measured]]) -> dict[str, float]:
    """Least-squares fit of the terms of a step's time, in seconds, with its R²."""
    terms = np.array([[1, p.n_tokens, p.batch * p.context**2] for p, _ in points], dtype=float)
    times = np.array([measured.step_s[1] for _, measured in points])
    scale = terms.max(axis=0)
    solution, *_ = np.linalg.lstsq(terms / scale, times, rcond=None)
    fixed, per_token, per_pair = solution / scale
    residual = times - terms @ np.array([fixed, per_token, per_pair])
    r_squared = 1 - (residual**2).sum() / ((times - times.mean()) ** 2).sum()
    return {
        "fixed_s": float(fixed),
        "per_token_s": float(per_token),
        "per_pair_s": float(per_pair),
        "r_squared": float(r_squared),
    }


def attention_share(point: Point, cost: dict[str, float]) -> float:
    """The share of a step's fitted time that grows with the square of the context."""
    pairs = cost["per_pair_s"] * point.batch * point.context**2
    return pairs / (cost["fixed_s"] + cost["per_token_s"] * point.n_tokens + pairs)


def table(
    results: dict[str, list[tuple[Point, Measured]]], cost: dict[str, float]
) -> Iterator[str]:
    """Markdown: one table per sweep, then the fit."""
    for varied, points in results.items():
        yield f"\n| {varied} | tokens a step | parameters | step, s | tokens/s | peak memory, GiB |"
        yield "|---|---|---|---|---|---|"
        for point, measured in points:
            low, median, high = measured.step_s
            yield (
                f"| {getattr(point, varied)} | {point.n_tokens:,} | {measured.n_parameters:,} "
                f"| {median:.3f} [{low:.3f}, {high:.3f}] | {point.n_tokens / median:,.0f} "
                f"| {measured.peak_memory_gib:.2f} |"
            )
    yield (
        f"\nstep = {cost['fixed_s']:.3g} s + {cost['per_token_s']:.3g} s a token + "
        f"{cost['per_pair_s']:.3g} s a pair of tokens of a row (R² {cost['r_squared']:.3f})"
    )
    for point, _ in results["context"]:
        yield f"- attention's share at context {point.context}: {attention_share(point, cost):.0%}"


def plot(results: dict[str, list[tuple[Point, Measured]]]) -> Figure:
    """Step time on top, peak memory below, one column per sweep."""
    figure = Figure(figsize=(3.2 * len(results), 5.5), layout="constrained")
    axes = figure.subplots(2, len(results), sharex="col", squeeze=False)
    for column, (varied, points) in enumerate(results.items()):
        xs = [getattr(point, varied) for point, _ in points]
        if isinstance(xs[0], bool):
            xs = ["on" if x else "off" for x in xs]
        axes[1, column].set_xlabel(varied)
        rows = (
            [measured.step_s[1] for _, measured in points],
            [measured.peak_memory_gib for _, measured in points],
        )
        for row, ys in enumerate(rows):
            axes[row, column].plot(xs, ys, marker="o")
            axes[row, column].set_ylim(0, 1.1 * max(ys))
            axes[row, column].grid(alpha=0.25, linewidth=0.6)
    axes[0, 0].set_ylabel("step (s)")
    axes[1, 0].set_ylabel("peak memory (GiB)")
    return figure


def main(
    n_layer: int = 6,
    n_embd: int = 384,
    context: int = 256,
    batch: int = 2,
    rank: int = 0,
    contexts: tuple[int, ...] = (128, 256, 512, 1024, 2048),
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
    widths: tuple[int, ...] = (128, 256, 384, 512, 768),
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64),
    vocab_size: int = 4096,
    n_steps: int = 7,
) -> None:
    """Measures all sweeps.

    Args:
        n_layer: layers of the base model.
        n_embd: width of the base model; a multiple of 64, the head size.
        context: tokens per row, where they do not vary.
        batch: rows per step, where they do not vary; also the batch at the longest context.
        rank: rank of the adapters, where it does not vary; 0 trains all weights.
        contexts: contexts to measure.
        batches: batches to measure.
        widths: values of n_embd to measure.
        ranks: LoRA ranks to measure.
        vocab_size: vocabulary of all models.
        n_steps: steps timed at each point.
    """
    base = Point(n_layer, n_embd, context, batch, rank)
    results: dict[str, list[tuple[Point, Measured]]] = {}
    for varied, points in sweeps(base, contexts, batches, widths, ranks).items():
        results[varied] = []
        for point in points:
            print(f"{varied}: {point}", file=sys.stderr)
            results[varied].append((point, in_own_process(point, n_steps, vocab_size)))
    cost = fit_cost(results["context"] + results["batch"])
    rows: dict[str, Any] = {
        varied: [{**asdict(point), **asdict(measured)} for point, measured in points]
        for varied, points in results.items()
    }
    output = results_folder()
    (output / "growth.json").write_text(json.dumps({"sweeps": rows, "cost": cost}, indent=1))
    lines = list(table(results, cost))
    (output / "growth.md").write_text("\n".join(lines).lstrip() + "\n")
    plot(results).savefig(output / "growth.png", dpi=150)
    print("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--call"]:
        call = json.loads(sys.argv[2])
        call["point"] = Point(**call["point"])
        print(json.dumps(asdict(measure(**call))))
    else:
        auto_cli(main)
