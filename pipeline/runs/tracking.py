"""Tracking in MLflow that never fails a run: a replica of the journals, late if it must be."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from pipeline.console import say, warn
from pipeline.ports import listen
from pipeline.runs.journal import JOURNAL
from pipeline.runs.provenance import redact

PATIENCE_S, INTERRUPTED_PATIENCE_S = 20.0, 3.0  # how long a run's end waits for the store
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # by default a server that is down blocks for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI if it is set, else the database in the root of the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or database_uri(root.resolve() / "mlflow.db")


def database_uri(path: Path) -> str:
    """Address of an SQLite database, quoted if SQLAlchemy would read another path otherwise.

    Then slashes are quoted, too: MLflow creates the folder of an address without unquoting it.
    """
    text = str(path)
    is_plain = unquote(text) == text and "?" not in text
    return f"sqlite:///{text if is_plain else quote(text, safe='')}"


def sync(run: Path, uri: str | None = None, *, ask: bool = False) -> int:
    """Sends what the store lacks of a run's journal, its parent's first; returns how many lines.

    A run whose process died is ended as KILLED, or FINISHED if it has an outcome; one that was
    deleted in MLflow is left alone.

    Args:
        run: `<root>/<experiment>/<run>`.
        uri: address of the store; by default `tracking_uri` of the root.
        ask: ask the store for the run even if all was sent, since the store may have lost it.

    Raises:
        ValueError: the journal is damaged.
        OSError: the store cannot be reached, or refuses.
    """
    run = run.resolve()
    root = run.parent.parent
    uri = uri or tracking_uri(root)
    with _reaching(root, uri):
        from pipeline.runs.mlflow_replica import send_missing

        return send_missing(run, uri, ask=ask)


class Replica:
    """Keeps the store up to date while a run is written, from a thread; never blocks or fails it.

    Another thread fills in what the store lacks of earlier runs of the same root.

    Args:
        run, uri: as in `sync`.
        interval_s: seconds between looks at the journal.
        whole_root: follow all runs of the root, as a chain does whose stages are other processes.
    """

    def __init__(
        self,
        run: Path,
        uri: str | None = None,
        interval_s: float = 5.0,
        *,
        whole_root: bool = False,
    ) -> None:
        self.run = run.resolve()
        self.root = self.run.parent.parent
        self.uri = uri or tracking_uri(self.root)
        self.interval_s, self._stop, self._warned = interval_s, threading.Event(), False
        root, own = (sync_all, self.root), (sync, self.run)
        works = [(self._follow, root)] if whole_root else [(self._follow, own), (self._try, root)]
        self._threads = [threading.Thread(target=f, args=args, daemon=True) for f, args in works]
        for thread in self._threads:
            thread.start()

    def close(self, timeout_s: float = PATIENCE_S) -> None:
        """Sends what is left, also of earlier runs, within so many seconds; the run has ended."""
        self._stop.set()
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        if self._threads[0].is_alive():
            self._warn(_unreachable(self.root, self.uri, f"not done within {timeout_s:g} s"))

    def _follow(self, send: Callable[..., Any], path: Path) -> None:
        while not self._stop.is_set():
            self._try(send, path)
            self._stop.wait(self.interval_s)
        self._try(send, path)

    def _try(self, send: Callable[..., Any], path: Path) -> None:
        try:
            send(path, self.uri)
        except Exception as error:  # whatever it is, the run goes on
            self._warn(str(error))

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warn(message)


def sync_all(root: Path, uri: str | None = None, *, ask: bool = False) -> dict[str, int]:
    """Sends what the store lacks of any run below a root, as `sync` does; OSError likewise.

    Returns:
        How many `runs` there are, the `lines` sent, and how many journals are `damaged`,
        each of which is warned about.
    """
    root = root.resolve()
    uri = uri or tracking_uri(root)
    counts = {"runs": 0, "lines": 0, "damaged": 0}
    with _reaching(root, uri):
        from pipeline.runs.mlflow_store import open_store

        open_store(uri)
    for journal in sorted(root.glob(f"*/*/{JOURNAL}")):
        counts["runs"] += 1
        try:
            counts["lines"] += sync(journal.parent, uri, ask=ask)
        except ValueError as error:
            counts["damaged"] += 1
            warn(error)
    return counts


def open_ui(root: Path, host: str = "127.0.0.1", port: int = 5000) -> None:
    """Brings the store up to date and turns this process into MLflow's server on it.

    If the store is a server already, it only prints the address.

    Raises:
        ValueError: the port is taken.
        OSError: the store cannot be reached.
    """
    root = root.resolve()
    uri = tracking_uri(root)
    sync_all(root, uri, ask=True)
    if uri.startswith("http"):
        print(redact(uri))
        return
    listen(host, port).close()
    address = f"http://{host}:{port}"
    print(address, flush=True)
    # MLflow's own start page is the one for GenAI
    say(f"runs: {address}/#/experiments?workflowType=machine_learning")
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": (root / "artifacts").as_uri(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = ["-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]
    os.execve(sys.executable, [sys.executable, *command], environment)  # so signals reach it


@contextmanager
def _reaching(root: Path, uri: str) -> Iterator[None]:
    """Context in which MLflow may be imported; its errors become OSErrors of one line."""
    for key, value in _ENVIRONMENT.items():  # read when MLflow is imported
        os.environ.setdefault(key, value)
    try:
        yield
    except ValueError:  # about the run, not about the store
        raise
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(_unreachable(root, uri, first_line)) from error


def _unreachable(root: Path, uri: str, reason: str) -> str:
    return (
        f"MLflow store {redact(uri)} unreachable ({reason}); {root} holds everything; "
        "run 'python -m pipeline ui --sync' or the next run fills it in."
    )
