"""What a checkpoint costs: its size, how long it holds up training, and its time in all.

    python -m benchmarks.save

Trains each model for a few steps through `fit`, with synchronous and asynchronous saves, and reads
the journals. Needs 5 GB of disk and 4 GB of memory.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.harness import ROOT, results_folder
from pipeline.runs.journal import read_journal

EVERY, N_SAVES = 4, 3  # steps between saves; the last save is at the end of the run
DEFAULT_EVERY = 100  # of the configurations
GPT2 = ["--config=configs/pretrain.yaml", "--config=configs/model/gpt2-124m.yaml"]
SHAPE_30M = {"n_layer": 8, "n_head": 8, "n_kv_head": 8, "n_embd": 512, "mlp_hidden": 2048}
ADAMW = ["--model.optimizer.name=adamw", "--model.optimizer.lr=0.0003"]
SMALL_STEPS = ["--data.block_size=128", "--data.batch_size=8", "--data.max_tokens=1024"]


@dataclass(frozen=True)
class Cost:
    """The cost of saving one model.

    Attributes:
        megabytes: size of a checkpoint.
        held_up_s: seconds for which each save held up training.
        in_all_s: seconds that each save added to the steps up to the next one.
        step_s: seconds of a step while nothing is being saved.
    """

    model: str
    asynchronous: bool
    megabytes: float
    held_up_s: list[float]
    in_all_s: list[float]
    step_s: float


def measure(model: str, words: list[str], home: Path, *, asynchronous: bool) -> Cost:
    """Runs `fit` in a folder of its own."""
    options = [
        "--trainer.limit_val_batches=0",
        "--trainer.log_every_n_steps=1",
        f"--trainer.max_steps={EVERY * N_SAVES}",
        "--model.optimizer.warmup_steps=2",
        f"--checkpoints.every_n_steps={EVERY}",
        f"--checkpoints.asynchronous={str(asynchronous).lower()}",
    ]
    command = [sys.executable, "-m", "pipeline", "fit", *words, *options]
    environment = {**os.environ, "GPT_PIPELINE_HOME": str(home)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    (path,) = home.glob("default/*/checkpoints/step-*")
    metrics = [line for line, _ in read_journal(path.parents[1]) if line["kind"] == "metric"]
    ends = {m["step"]: m["time"] for m in metrics if "train/loss" in m["values"]}
    step_s = statistics.median(ends[i] - ends[i - 1] for i in range(2, EVERY + 1))
    saves = range(EVERY, EVERY * N_SAVES, EVERY)  # all but the last have steps after them
    held_up = {m["step"]: m["values"].get("perf/checkpoint_s") for m in metrics}
    return Cost(
        model,
        asynchronous,
        sum(file.stat().st_size for file in path.iterdir()) / 1e6,
        [held_up[step] for step in saves],
        [ends[step + EVERY] - ends[step] - EVERY * step_s for step in saves],
        step_s,
    )


def costs(folder: Path) -> list[Cost]:
    """Two fully trained models, and adapters on the larger one."""
    tokenizer = folder / "tokenizer.json"
    make = ["tokenizer", "train", "--config=configs/tokenizer.yaml", f"--output={tokenizer}"]
    subprocess.run([sys.executable, "-m", "pipeline", *make], cwd=ROOT, check=True)
    full = [*GPT2, *ADAMW, *SMALL_STEPS, f"--data.tokenizer={tokenizer}"]
    small = [f"--model.gpt.{key}={value}" for key, value in SHAPE_30M.items()]
    cases = {
        "30M, all weights": [*full, *small, "--model.gpt.vocab_size=8192"],
        "124M, all weights": [*full, "--model.gpt.vocab_size=50304"],
        "124M, LoRA": ["--config=configs/instruct.yaml"],
    }
    found = []
    for number, (model, words) in enumerate(cases.items()):
        if "LoRA" in model:
            (base,) = folder.glob(f"{number - 1}-False/default/*/checkpoints/step-*")
            words = [*words, f"--model.init_from={base}"]
        for asynchronous in (False, True):
            home = folder / f"{number}-{asynchronous}"
            found.append(measure(model, words, home, asynchronous=asynchronous))
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = costs(Path(folder))
    table = Table("model", "save", "MB", "held up, s", "in all, s", "step, s", "share of the time")
    for cost in found:
        kind = "asynchronous" if cost.asynchronous else "synchronous"
        held_up, in_all = statistics.median(cost.held_up_s), statistics.median(cost.in_all_s)
        share = held_up / (DEFAULT_EVERY * cost.step_s + held_up)
        seconds = (f"{value:.2f}" for value in (held_up, in_all, cost.step_s))
        table.add_row(cost.model, kind, f"{cost.megabytes:,.1f}", *seconds, f"{share:.2%}")
    Console().print(table)
    rows = json.dumps([asdict(c) for c in found], indent=1)
    (results_folder() / "save.json").write_text(rows + "\n")


if __name__ == "__main__":
    main()
