"""What a contestant measures of itself: its steps, when the first one ended, its memory.

Needs nothing beyond what the contestant has loaded anyway, so peers can use it in their own
environments.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


class Record:
    """Seconds, tokens and loss of every step.

    Args:
        path: JSON file that `save` writes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.steps = Path(path), []  # type: ignore[var-annotated]
        self.facts: dict[str, Any] = {}
        self.start()

    def start(self) -> None:
        """The first step begins."""
        self.since = time.perf_counter()

    def step(self, tokens: int, loss: float | None) -> None:
        """A step has ended, with its loss if it has one; the next begins."""
        now = time.perf_counter()
        self.facts.setdefault("first_step_at", time.time())
        self.steps.append({"seconds": now - self.since, "tokens": tokens, "loss": loss})
        self.since = now

    def validation(self, loss: float) -> None:
        """A validation after the last step has ended; its time does not count."""
        seconds = sum(step["seconds"] for step in self.steps)
        self.facts.setdefault("validations", []).append({"seconds": seconds, "loss": loss})
        self.start()

    def save(self) -> None:
        """Writes the steps, the facts and the peak memory (bytes)."""
        self.path.write_text(json.dumps({"steps": self.steps, "rss": peak_memory(), **self.facts}))


def peak_memory(pid: int | None = None) -> int:
    """Peak memory of a process in bytes; for this process, of the GPU if there is one.

    For a process given by `pid`, its running child processes are included. Linux only; `ru_maxrss`
    would report the peak of the process that started this one, if that was higher.
    """
    torch = sys.modules.get("torch")
    if pid is None and torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    folder = Path(f"/proc/{pid or 'self'}")
    lines = (folder / "status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    started = _children(folder) if pid is not None else []
    return int(line.split()[1]) * 1024 + sum(map(peak_memory, started))


def _children(folder: Path) -> list[int]:
    tasks = (folder / "task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]
