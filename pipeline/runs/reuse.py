"""Finds the directory of a run: a finished one whose inputs are unchanged, an interrupted one to go
on with, or a new one.
"""

import platform
from collections.abc import Callable, Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from datamodules.files import cache_dir, digest, sha256
from datamodules.sources import PYTHON_DOCS, SOURCES, resolve
from pipeline.directories import CHECKPOINTS, path_digest
from pipeline.runs.journal import JOURNAL, read_journal
from pipeline.runs.run_directory import read_outcome

Outcome = Mapping[str, Any]


def find_run(
    base: Path, holds: Callable[[Outcome], bool], *, anew: bool = False
) -> tuple[Path, Outcome | None]:
    """The last attempt if it was interrupted, else the last that still holds, else a new one.

    One that was interrupted in training before it had a checkpoint is not gone on with: another
    from the start, of data that may have changed, would be mixed with what is logged of it.

    Args:
        base: run directory of the first attempt.
        holds: whether the outcome of a finished run may be used again.
        anew: a new one in any case.

    Returns:
        The run directory, and its outcome if it may be used.
    """
    made = list(takewhile(Path.exists, _attempts(base)))
    for path in [] if anew else reversed(made):
        outcome = read_outcome(path)
        if outcome is None and path == made[-1] and not _is_stranded(path):
            return path, None
        if outcome is not None and holds(outcome):
            return path, outcome
    return next(path for path in _attempts(base) if not path.exists()), None


def still_holds(outcome: Outcome, options: Mapping[str, Any]) -> bool:
    """Whether a finished run may be used again: complete, outputs and inputs as they were.

    Args:
        outcome: the run's outcome.
        options: by dotted key; where a source is a folder, a file that joined it is a change, and
            of data every file that was not read.
    """
    recorded = outcome["sources"]
    sources = [
        (source, key.startswith("data."))
        for key, value in options.items()
        if key.rpartition(".")[2] in SOURCES and value is not None
        for source in (value if isinstance(value, list) else [value])
    ]
    return (
        outcome["complete"]
        and all(Path(path).exists() for path in outcome["outputs"].values())
        and all(
            path_digest(Path(outcome["outputs"][name])) == recorded
            for name, recorded in outcome["digests"].items()
        )
        and all(_is_unchanged(name, recorded[name]) for name in recorded)
        and not any(_has_grown(source, set(recorded), of_data) for source, of_data in sources)
    )


def code_digest() -> str:
    """SHA-256 of the sources of both packages, templates included."""
    folder = Path(__file__).parents[2]
    files = sorted(
        file
        for name in ("datamodules", "pipeline")
        for file in folder.glob(f"{name}/**/*")
        if file.suffix in (".py", ".j2")
    )
    return digest([[file.relative_to(folder).as_posix(), sha256(file)] for file in files])


def _is_stranded(path: Path) -> bool:
    """Whether a run has taken steps of training, and there is nothing to go on from."""
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
        return path.is_relative_to(cache_dir())  # pinned, and fetched again where it is needed
    return path_digest(path) == recorded


def _has_grown(source: str, recorded: set[str], of_data: bool) -> bool:
    """Whether a source has files besides those recorded; weights are recorded by other paths."""
    if source.startswith(("bundled:", "download:")):
        return False
    try:
        files = {path.resolve() for path in resolve(source)}
    except OSError:
        return False  # gone: seen where its files are compared
    known = {Path(name).resolve() for name in recorded}
    return bool(files - known) and (of_data or bool(files & known))
