"""Contestants take turns (A B A B) on equal work; medians, next to the machine's ceiling.

A round measures the ceiling of matrix products in float32 and bf16, then runs each contestant once,
in its own process. Warm-up steps are excluded from the rates and reported separately.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from datamodules.files import sha256
from pipeline.hardware import default_device, multiplies_bf16

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
Precision = Literal["float32", "bf16", "float16", "q8_0"]
CEILINGS = """
import json, torch
from pipeline.hardware import default_device, matrix_product_ceiling, multiplies_bf16
device, types = default_device(), {"float32": torch.float32}
if multiplies_bf16(device):
    types["bf16"] = torch.bfloat16
print(json.dumps({name: matrix_product_ceiling(device, dtype) for name, dtype in types.items()}))
"""


@dataclass(frozen=True)
class Contestant:
    """A command that does the work and writes a record to the path given as `{record}`.

    Attributes:
        name: as shown.
        precision: of its matrix products.
        words: the command line.
        is_ours: whether it is ours, which the ratios compare with its peers.
    """

    name: str
    precision: Precision
    words: Sequence[str]
    is_ours: bool = False


@dataclass(frozen=True)
class Workload:
    """One piece of work, the same for every contestant.

    Attributes:
        key: such as P1.
        title: what is done.
        contestants: who does the work.
        n_warmup: first steps, which do not count.
        flops_per_token: of the model, forward and backward, for the share of the ceiling.
        loss_tolerance: largest relative difference between mean losses for work to be equal.
        data: file that all contestants are given; its digest is kept in the results.
        ends_freely: whether texts may end elsewhere than float32's where a precision rounds.
        unit: of the rates.
    """

    key: str
    title: str
    contestants: Sequence[Contestant]
    n_warmup: int
    flops_per_token: float | None
    loss_tolerance: float
    data: Path
    ends_freely: bool = False
    unit: str = "tokens/s"


@dataclass
class Result:
    """A contestant's results; one value per round."""

    name: str
    precision: str
    is_ours: bool
    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    warmup_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    outputs: list[str | None] = field(default_factory=list)  # digests
    rss: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def add(self, record: dict[str, Any], workload: Workload, ceiling: float | None) -> None:
        """Adds the record of a round."""
        warmup, steps = record["steps"][: workload.n_warmup], record["steps"][workload.n_warmup :]
        seconds, tokens = sum(s["seconds"] for s in steps), sum(s["tokens"] for s in steps)
        self.seconds.append(seconds)
        self.tokens.append(tokens)
        self.rates.append(tokens / seconds)
        self.warmup_seconds.append(sum(s["seconds"] for s in warmup))
        losses = [s["loss"] for s in steps if s["loss"] is not None]
        self.losses += [statistics.mean(losses)] if losses else []
        self.outputs.append(_digest(record["outputs"]) if "outputs" in record else None)
        self.rss.append(record["rss"])
        if workload.flops_per_token and ceiling:
            self.shares.append(self.rates[-1] * workload.flops_per_token / ceiling)

    @property
    def rate(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.rates)


def measure(workload: Workload, n_rounds: int) -> list[Result]:
    """Runs all rounds.

    Raises:
        RuntimeError: if a contestant fails, with the tail of its output.
    """
    results = [Result(c.name, c.precision, c.is_ours) for c in workload.contestants]
    console = Console(stderr=True)
    for round_ in range(1, n_rounds + 1):
        ceilings = json.loads(_run([sys.executable, "-c", CEILINGS]))
        for contestant, result in zip(workload.contestants, results, strict=True):
            record = record_of(contestant)
            result.add(record, workload, ceilings.get(contestant.precision))
            console.print(
                f"{workload.key} round {round_}/{n_rounds}  {contestant.name:34} "
                f"{contestant.precision:8} {result.rates[-1]:9,.1f} {workload.unit}"
            )
    check_equal_work(workload, results)
    return results


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def check_equal_work(workload: Workload, results: Sequence[Result]) -> None:
    """Checks for equal token counts, matching mean losses and, in float32, identical outputs.

    Raises:
        RuntimeError: if a contestant differs.
    """
    ours = next(result for result in results if result.is_ours)
    for result in results:
        is_free = workload.ends_freely and result.precision != "float32"
        if result.tokens != ours.tokens and not is_free:
            raise RuntimeError(f"{result.name} worked on {result.tokens} tokens, {ours.tokens} due")
        pairs = zip(result.losses, ours.losses, strict=True)
        apart = max((abs(theirs - our) / our for theirs, our in pairs), default=0.0)
        if apart > workload.loss_tolerance:
            raise RuntimeError(
                f"{result.name} has mean losses of {result.losses}, {ours.name} {ours.losses}"
            )
    if len({output for r in results if r.precision == "float32" for output in r.outputs}) > 1:
        raise RuntimeError("in float32 not all give the same output")


def record_of(contestant: Contestant) -> dict[str, Any]:
    """Runs a contestant and returns what it measured of itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        _run([word.replace("{record}", str(path)) for word in contestant.words], folder)
        record: dict[str, Any] = json.loads(path.read_text())
        return record


def _run(words: Sequence[str], home: str | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if home is not None:
        environment["GPT_PIPELINE_HOME"] = home
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def machine() -> str:
    """Names what this machine multiplies with, as a folder, so that results do not mix."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    if torch.cpu.get_capabilities().get("amx_bf16"):
        instructions += "-amx"
    elif multiplies_bf16(default_device()):
        instructions += "-bf16"
    return f"{torch.get_num_threads()}-cores-{instructions}"


def results_folder() -> Path:
    """The folder for this machine's results, created if missing."""
    path = RESULTS / machine()
    path.mkdir(parents=True, exist_ok=True)
    return path


def save(workload: Workload, results: Sequence[Result]) -> Path:
    """Writes the results as JSON."""
    path = results_folder() / f"{workload.key}.json"
    facts = {"key": workload.key, "title": workload.title, "unit": workload.unit}
    facts["data"] = sha256(workload.data)
    rows = [asdict(result) for result in results]
    path.write_text(json.dumps({**facts, "results": rows}, indent=1) + "\n")
    return path
