"""Runs of the same thing, done again: which of them to use, to go on with, or to start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from pipeline.run_directory import read_outcome

Outcome = Mapping[str, Any]


def find_run(base: Path, holds: Callable[[Outcome], bool]) -> tuple[Path, Outcome | None]:
    """The last attempt if it was interrupted, else the last that still holds, else a new one.

    Args:
        base: run directory of the first attempt.
        holds: whether the outcome of a finished run may be used again.

    Returns:
        The run directory, and its outcome if it may be used.
    """
    made = list(takewhile(Path.exists, _attempts(base)))
    for path in reversed(made):
        outcome = read_outcome(path)
        if outcome is None and path == made[-1]:
            return path, None
        if outcome is not None and holds(outcome):
            return path, outcome
    return new_run(base), None


def new_run(base: Path) -> Path:
    """The directory of the first attempt that was never made."""
    return next(path for path in _attempts(base) if not path.exists())


def _attempts(base: Path) -> Iterator[Path]:
    """`base`, `base-2`, `base-3`, ..."""
    yield base
    for number in count(2):
        yield base.with_name(f"{base.name}-{number}")
