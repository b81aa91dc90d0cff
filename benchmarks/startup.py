"""How long commands take to start, next to the imports that they cannot avoid.

    python -m benchmarks.startup

Prints medians over five starts, in seconds, and saves all of them as JSON.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.harness import ROOT, results_folder
from benchmarks.prepare import SMOLLM2
from benchmarks.workloads import small_pretraining

N_STARTS = 5
PYTHON = [sys.executable]
ONE_TOKEN = [f"--ckpt={SMOLLM2}", "--prompt=The", "--max_new_tokens=1"]
COMMANDS = {
    "--help": [*PYTHON, "-m", "pipeline", "--help"],
    "generate --help": [*PYTHON, "-m", "pipeline", "generate", "--help"],
    "run --help": [*PYTHON, "-m", "pipeline", "run", "--help"],
    "generate, one token of SmolLM2": [*PYTHON, "-m", "pipeline", "generate", *ONE_TOKEN],
    "fit --help": [*PYTHON, "-m", "pipeline", "fit", "--help"],
    "import torch": [*PYTHON, "-c", "import torch"],
    "import lightning.pytorch": [*PYTHON, "-c", "import lightning.pytorch"],
}
FIRST_STEP = "fit, from the start to the {} of its first step (P1)"


def seconds(words: list[str]) -> list[float]:
    """Wall time of each start."""
    taken = []
    for _ in range(N_STARTS):
        since = time.perf_counter()
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
        taken.append(time.perf_counter() - since)
    return taken


def first_step() -> tuple[list[float], list[float]]:
    """Wall time until P1's first training step begins, and until it ends."""
    (ours, *_) = small_pretraining().contestants
    begins, ends = [], []
    for _ in range(N_STARTS):
        with tempfile.TemporaryDirectory() as home:
            path = Path(home) / "record.json"
            words = [word.replace("{record}", str(path)) for word in ours.words]
            words.append("--trainer.max_steps=1")
            since = time.time()
            environment = {**os.environ, "GPT_PIPELINE_HOME": home}
            subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True)
            record = json.loads(path.read_text())
            ends.append(record["first_step_at"] - since)
            begins.append(ends[-1] - record["steps"][0]["seconds"])
    return begins, ends


def main() -> None:
    starts = {name: seconds(words) for name, words in COMMANDS.items()}
    begins, ends = first_step()
    starts |= {FIRST_STEP.format("beginning"): begins, FIRST_STEP.format("end"): ends}
    table = Table("command", "median, s", "min", "max")
    for name, taken in starts.items():
        values = (statistics.median(taken), min(taken), max(taken))
        table.add_row(name, *(f"{value:.2f}" for value in values))
    Console().print(table)
    (results_folder() / "startup.json").write_text(json.dumps(starts, indent=1) + "\n")


if __name__ == "__main__":
    main()
