"""The journal of a run: append-only JSON lines, flushed one by one, so a killed process keeps them.

A line has `time` (unix seconds), `kind`, and by kind

    param     values {key: text}
    metric    step, values {key: number, or "nan", "inf", "-inf"}
    tag       values {key: text}
    dataset   name, digest, counts, source
    artifact  path, table (true or false)
    event     name, and its facts; the first line is the event "created", with the run's id
    status    status RUNNING | FINISHED | FAILED | KILLED, and its facts
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.files import MALFORMED

JOURNAL = "journal.jsonl"


class Journal:
    """The journal of a run directory, open for writing; threads may share it."""

    def __init__(self, run: Path) -> None:
        path = run / JOURNAL
        path.touch()
        end, self.active_s = _recover(run)  # how long the run has worked before
        os.truncate(path, end)
        self.is_new = end == 0
        self._file = path.open("ab")  # a buffered writer locks itself

    def append(self, kind: str, **facts: Any) -> None:
        """Appends one line and flushes it; a status is on disk before this returns.

        Raises:
            OSError: the disk is full, or fails.
        """
        line = dumps({"time": time.time(), "kind": kind, **facts}).encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            if kind == "status":
                os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(
                f"{self._file.name} could not be written ({error.strerror}); make room, then "
                "repeat the command to resume from the last checkpoint."
            ) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_journal(run: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Lines of a run directory's journal from a byte offset on, each with the offset after it.

    An incomplete last line (the process was killed, or is writing it) is left out.

    Raises:
        ValueError: a line is damaged.
    """
    with (run / JOURNAL).open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                parsed = json.loads(line)
                _ = parsed["time"] + 0, parsed["kind"]
            except MALFORMED:
                raise ValueError(
                    f"{run / JOURNAL} is damaged at byte {offset} ({line[:40]!r}); "
                    "take that line out."
                ) from None
            offset += len(line)
            yield parsed, offset


def _recover(run: Path) -> tuple[int, float]:
    """Bytes of whole lines, and the seconds that they span, without the breaks before a resume."""
    end, active_s, last = 0, 0.0, None
    for line, line_end in read_journal(run):
        if last is not None and line.get("name") != "resumed":
            active_s += max(0.0, line["time"] - last)  # a clock may be set back
        end, last = line_end, line["time"]
    return end, active_s


def dumps(value: Any, indent: int | None = None) -> str:
    """Standard JSON, with NaN and infinities as text, which float() reads back."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def metric_history(run: Path) -> dict[str, dict[int, float]]:
    """Metric -> step -> value, ordered by step; of a step repeated after a resume, the last."""
    history: dict[str, dict[int, float]] = {}
    for line, _ in read_journal(run):
        if line["kind"] == "metric":
            for name, value in line["values"].items():
                history.setdefault(name, {})[line["step"]] = float(value)
    return {name: dict(sorted(values.items())) for name, values in history.items()}
