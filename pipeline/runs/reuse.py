"""Finds a run's directory: finished and still valid, interrupted and to be resumed, or new."""

import platform
from collections.abc import Callable, Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.files import cache_dir
from datamodules.sources import PYTHON_DOCS, SOURCES, resolve
from pipeline.directories import CHECKPOINTS, path_digest
from pipeline.runs.journal import JOURNAL, read_journal
from pipeline.runs.run_directory import read_outcome

Outcome = Mapping[str, Any]


class Attempt(NamedTuple):
    """A run directory, with the outcome that can be reused, if any."""

    path: Path
    outcome: Outcome | None  # of a finished run that may be reused; None if it has to run
    why: str = ""  # why the last finished run, if any, may not be reused


def find_run(base: Path, change: Callable[[Outcome], str], *, anew: bool = False) -> Attempt:
    """The last attempt if it was interrupted, else the last that is still valid, else a new one.

    One that was interrupted in training before its first checkpoint is not resumed: starting over,
    on data that may have changed, would add to what it has logged.

    Args:
        base: run directory of the first attempt.
        change: says why an outcome may not be reused; empty if it may.
        anew: start a new one in any case.
    """
    why = ""
    made = list(takewhile(Path.exists, _attempts(base)))
    for path in [] if anew else reversed(made):
        outcome = read_outcome(path)
        if outcome is None and path == made[-1] and not _is_stranded(path):
            return Attempt(path, None)
        if outcome is not None and not (found := change(outcome)):
            return Attempt(path, outcome)
        if outcome is not None:
            why = why or f"{path} is finished, but {found}"
    return Attempt(next(path for path in _attempts(base) if not path.exists()), None, why)


def what_changed(outcome: Outcome, options: Mapping[str, Any]) -> str:
    """What has changed since a run finished; empty if nothing, so that it may be reused.

    If a source among `options` (by dotted key) is a folder, a file that was added is a change; for
    data, so is every file that was not read.
    """
    return next(_changes(outcome, options), "")


def _changes(outcome: Outcome, options: Mapping[str, Any]) -> Iterator[str]:
    recorded = outcome["sources"]
    if not outcome["complete"]:
        yield "some of it could not be done"
    outputs: Mapping[str, str] = outcome["outputs"]
    yield from (f"{path} is gone" for path in outputs.values() if not Path(path).exists())
    for name, written in outcome["digests"].items():
        if path_digest(Path(outputs[name])) != written:
            yield f"{outputs[name]} is not what it wrote"
    yield from (f"{n} has changed" for n, was in recorded.items() if not _is_unchanged(n, was))
    for key, value in options.items():
        if key.rpartition(".")[2] in SOURCES and value is not None:
            for source in value if isinstance(value, list) else [value]:
                if _has_grown(source, set(recorded), of_data=key.startswith("data.")):
                    yield f"{source} has other files"


def _is_stranded(path: Path) -> bool:
    """Whether a run has taken training steps but has no checkpoint to resume from."""
    if any((path / CHECKPOINTS).glob("step-*")) or not (path / JOURNAL).exists():
        return False
    lines = (line for line, _ in read_journal(path))
    return any(line["kind"] == "metric" and line["step"] > 0 for line in lines)


def _attempts(base: Path) -> Iterator[Path]:
    """`base`, `base-2`, `base-3`, ..."""
    yield base
    for number in count(2):
        yield base.with_name(f"{base.name}-{number}")


def _is_unchanged(name: str, recorded: str) -> bool:
    if name.startswith(f"{PYTHON_DOCS}@"):
        return name == f"{PYTHON_DOCS}@{platform.python_version()}"
    path = Path(name)
    if not path.exists():
        return path.is_relative_to(cache_dir())  # pinned, and fetched again when needed
    return path_digest(path) == recorded


def _has_grown(source: str, recorded: set[str], *, of_data: bool) -> bool:
    """Whether a source has files that were not recorded; weights are recorded by other paths."""
    if source.startswith(("bundled:", "download:")):
        return False
    try:
        files = {path.resolve() for path in resolve(source)}
    except OSError:
        return False  # gone: noticed when files are compared
    known = {Path(name).resolve() for name in recorded}
    return bool(files - known) and (of_data or bool(files & known))
