"""What a contestant measures of itself: its steps, when they began, its memory.

Needs the standard library alone, so that peers can use it in environments of their own.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any


class Record:
    """Seconds, tokens and loss of every step.

    Args:
        path: JSON that `save` writes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.steps = Path(path), []  # type: ignore[var-annotated]
        self.facts: dict[str, Any] = {}
        self.start()

    def start(self) -> None:
        """The first step begins."""
        self.since = time.perf_counter()

    def step(self, tokens: int, loss: float) -> None:
        """A step has ended; the next begins."""
        now = time.perf_counter()
        self.facts.setdefault("first_step_at", time.time())
        self.steps.append({"seconds": now - self.since, "tokens": tokens, "loss": loss})
        self.since = now

    def save(self) -> None:
        """Writes the steps, the facts and the peak memory (bytes)."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.path.write_text(json.dumps({"steps": self.steps, "rss": peak, **self.facts}))
