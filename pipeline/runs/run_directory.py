"""Run directories: what a run leaves behind, in plain files, from its first second.

`<root>/<experiment>/<run>/` holds `config.yaml`, `journal.jsonl`, `outcome.json` once the run is
finished, and all that it makes. The journal is the truth, MLflow its replica (`tracking.py`).

One process at a time writes a run (ensured by a file lock); its threads may share the `Run`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from datamodules.files import MALFORMED, write_atomically
from pipeline.arguments import dump_yaml
from pipeline.console import warn
from pipeline.runs.journal import Journal, dumps
from pipeline.runs.provenance import code_digest, redact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
OUTCOME, CONFIG, LOCK = "outcome.json", "config.yaml", "run.lock"
_PARTS = {"outputs": dict, "metrics": dict, "sources": dict, "headline": list, "elapsed_s": float}
_LOCK_TIMEOUT_S = 6  # data workers of a killed process may hold on for five seconds


class AlreadyFinished(ValueError):
    """The run in the directory `path` has an outcome and can no longer be written."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"run {path} is finished; to run it again, give it another name.")
        self.path = path


def check_name(value: str, key: str) -> None:
    """ValueError unless a value is a plain folder name, which cannot lead anywhere else."""
    if not NAME.fullmatch(value):
        raise ValueError(f"{key}: {value!r} is not a name; use letters, digits, - and _.")


class Run:
    """One run, open for writing: made by `Run.open`, ended by `finish` or `fail`."""

    def __init__(self, path: Path, lock: FileLock, parent: Path | None, command: str) -> None:
        self.path, self._lock, self.command = path, lock, redact(command)
        self._code = code_digest()  # before it may change
        self._journal, self._opened = Journal(path), time.monotonic()
        self.reattached = not self._journal.is_new
        facts = {"command": self.command}
        if parent is not None:
            facts["parent"] = os.path.relpath(parent.resolve(), path)  # a project may move
        if self.reattached:
            self.event("resumed", **facts)
        else:
            self.event("created", run=uuid.uuid4().hex, **facts)
        self._journal.append("status", status="RUNNING")

    @classmethod
    def open(cls, path: Path, *, parent: Path | None = None, command: str = "") -> Run:
        """Creates the run directory, or reattaches to one that has not finished.

        In distributed training only rank 0 may open the run. To inspect a run, use `read_outcome`
        and `read_journal`, which change nothing.

        Args:
            path: `<root>/<experiment>/<run>`.
            parent: directory of the run that this one is a part of.
            command: the command line.

        Raises:
            AlreadyFinished: the run has an outcome.
            ValueError: another process has the run open.
        """
        path = path.resolve()
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK, timeout=_LOCK_TIMEOUT_S, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"run {path} is open in another process; wait until it ends, or give another name."
            ) from None
        if (path / OUTCOME).exists():
            lock.release()
            raise AlreadyFinished(path)
        return cls(path, lock, parent, command)

    @property
    def elapsed_s(self) -> float:
        """Seconds that the run has worked, including interrupted attempts."""
        return self._journal.active_s + time.monotonic() - self._opened

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Records parameters; nested ones as `a.b`, secrets masked."""
        self._journal.append("param", values=flat(redact(params)))

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Records numbers (or tensors of one) at a step; NaN and infinities as they are."""
        values = {key: float(value) for key, value in metrics.items()}
        self._journal.append("metric", step=int(step), values=values)

    def log_tags(self, tags: Mapping[str, Any]) -> None:
        """Records tags; the last value of each counts."""
        self._journal.append("tag", values=flat(redact(tags)))

    def log_dataset(self, name: str, digest: str, counts: Mapping[str, Any], source: str) -> None:
        """Records which data the run reads: digest, counts, source."""
        self._journal.append(
            "dataset", name=name, digest=digest, counts=counts, source=redact(source)
        )

    def log_artifact(self, name: str, *, table: bool = False) -> None:
        """Records a file, to be shown with the run, by its path relative to the run directory."""
        self._journal.append("artifact", path=name, table=table)

    def log_text(self, text: str, name: str) -> None:
        """Writes a text file into the run directory and records it."""
        self._log_file(name, text.encode())

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Writes rows as a table (.json) in the form that MLflow's UI shows; overwrites one."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = {"columns": columns, "data": [[row.get(key) for key in columns] for row in rows]}
        self._log_file(name, dumps(table).encode(), table=True)

    def log_figure(self, figure: Figure, name: str) -> None:
        """Writes a figure as PNG and records it."""
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150, bbox_inches="tight")  # labels may be long
        self._log_file(name, png.getvalue())

    def config(self, config: Mapping[str, Any]) -> None:
        """Writes config.yaml, secrets masked; an earlier one that differs is kept, numbered."""
        path = self.path / CONFIG
        text = dump_yaml(redact(config))
        if path.exists() and path.read_bytes() != text.encode():
            number = len(list(self.path.glob("config-*.yaml"))) + 1
            self.log_artifact(path.replace(self.path / f"config-{number}.yaml").name)
        self.log_text(text, CONFIG)

    def event(self, name: str, **facts: Any) -> None:
        """Records something that happened."""
        self._journal.append("event", name=name, **facts)

    def finish(
        self,
        outputs: Mapping[str, str],
        metrics: Mapping[str, float],
        sources: Mapping[str, str],
        headline: Sequence[Mapping[str, Any]] = (),
        *,
        digests: Mapping[str, str] | None = None,
        complete: bool = True,
        elapsed_s: float | None = None,
    ) -> None:
        """Ends the run successfully: writes outcome.json, and the status FINISHED.

        Args:
            outputs: what later stages may use, name -> path.
            metrics: the run's results.
            sources: path -> SHA-256 of the files that it read.
            headline: the run's rows in the chain's table.
            digests: of outputs that others may overwrite, by name; see `directories.path_digest`.
            complete: whether nothing is missing that the same command could still get.
            elapsed_s: how long it took, if the run was not open all that time.
        """
        outcome = {
            "status": "FINISHED",
            "complete": complete,
            "command": self.command,
            "code": self._code,
            "path": str(self.path),
            "outputs": outputs,
            "digests": digests or {},
            "metrics": {key: float(value) for key, value in metrics.items()},
            "sources": sources,
            "headline": headline,
            "elapsed_s": round(self.elapsed_s, 3) if elapsed_s is None else elapsed_s,
        }
        self.log_tags({f"output.{name}": path for name, path in outputs.items()})
        write_atomically(self.path / OUTCOME, dumps(outcome, indent=2).encode())
        self._close(**outcome)

    def fail(self, reason: BaseException | str) -> None:
        """Ends the run as FAILED, or as KILLED if it was interrupted, unless it has ended."""
        interrupted = isinstance(reason, KeyboardInterrupt | SystemExit)  # SIGTERMException, too
        text = f"{type(reason).__name__}: {reason}" if isinstance(reason, BaseException) else reason
        if not self._lock.is_locked:
            return
        try:
            self._close(status="KILLED" if interrupted else "FAILED", reason=redact(text))
        except OSError as error:  # a full disk; the reason is reported all the same
            warn(error)

    def _log_file(self, name: str, content: bytes, *, table: bool = False) -> None:
        write_atomically(self.path / name, content)
        self.log_artifact(name, table=table)

    def _close(self, **facts: Any) -> None:
        self._journal.append("status", **facts)
        self._journal.close()
        self._lock.release()


def is_open(path: Path) -> bool:
    """Whether a living process has the run open."""
    with contextlib.suppress(Timeout), FileLock(path / LOCK, timeout=0):
        return False
    return True


def read_outcome(path: Path) -> dict[str, Any] | None:
    """The outcome of a run directory, None if it has not finished; ValueError if damaged."""
    if not (path / OUTCOME).exists():
        return None
    try:
        outcome = json.loads((path / OUTCOME).read_text("utf-8"))
        outcome["metrics"] = {key: float(value) for key, value in outcome["metrics"].items()}
        for row in outcome["headline"]:  # NaN is text there
            row |= {key: row[key] and float(row[key]) for key in ("before", "after")}
        is_whole = all(isinstance(outcome[key], kind) for key, kind in _PARTS.items())
    except MALFORMED:
        is_whole = False
    if not is_whole:
        raise ValueError(
            f"{path / OUTCOME} is damaged; remove it, and the command that wrote it goes on with "
            "that run and writes it anew."
        )
    return _moved(outcome, path.resolve())


def _moved(outcome: dict[str, Any], path: Path) -> dict[str, Any]:
    """Updates an outcome's paths into the run and into the root of all runs: both may be moved.

    A path stays as it is if nothing is at its new place, as when a run was copied alone.
    """
    was = Path(outcome.get("path", path))
    if was == path:
        return outcome
    moves = [(was, path), *zip(was.parents[1:2], path.parents[1:2], strict=False)]

    def here(name: str) -> str:
        found = [
            new / Path(name).relative_to(o) for o, new in moves if Path(name).is_relative_to(o)
        ]
        return next((str(place) for place in found if place.exists()), name)

    outputs, sources = outcome["outputs"], outcome["sources"]
    return {
        **outcome,
        "outputs": {name: here(place) for name, place in outputs.items()},
        "sources": {here(place): sha256 for place, sha256 in sources.items()},
    }


def handed_over(path: Path) -> Path:
    """The model that a finished run hands over; any other path as it is."""
    outputs = (read_outcome(path) or {"outputs": {}})["outputs"]
    return Path(outputs.get("best") or outputs.get("exported") or path)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as text by dotted key."""
    texts: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            texts |= flat(value, f"{prefix}{key}.")
        else:
            texts[f"{prefix}{key}"] = str(value)
    return texts


def lines_of(headline: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of the chain's table as lines."""
    lines = []
    for row in headline:
        values = [value for value in (row["before"], row["after"]) if value is not None]
        lines.append(f"{row['metric']}: {' -> '.join(f'{value:.4f}' for value in values)}")
    return lines
