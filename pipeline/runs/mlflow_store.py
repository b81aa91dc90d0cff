"""MLflow's store for a root of runs: creates, opens and relocates database and artifacts."""

import functools
import logging
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.runs.tracking import database_uri

REPLICATED = "mlflow.json"  # in a run directory: what a store has of the run
_SQLITE = "sqlite:///"
_ROOT_TAG = "gpt_pipeline.root"
_BUSY_TIMEOUT_S = 20
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
)


@functools.cache
def open_store(uri: str) -> MlflowClient:
    """A client of the store; creates a database that does not exist.

    Concurrent processes wait for each other. In a database that was moved together with its
    artifacts the paths are updated, because MLflow stores absolute ones.
    """
    # it also logs what it raises
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    if database := _database(uri):
        database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{database}.lock"):
            if not database.exists():
                _create(database)
            client = MlflowClient(uri)
            _relocate(database)
            return client
    return MlflowClient(uri)


def _database(uri: str) -> Path | None:
    if not uri.startswith(_SQLITE):
        return None
    return Path(unquote(uri.removeprefix(_SQLITE).partition("?")[0])).resolve()


def _create(database: Path) -> None:
    """Creates a database elsewhere and moves it here: MLflow cannot complete a partial one."""
    with tempfile.TemporaryDirectory(dir=database.parent, prefix=".mlflow-") as folder:
        made = Path(folder) / database.name
        MlflowClient(database_uri(made))
        made.replace(database)
    for remembered in database.parent.glob(f"*/*/{REPLICATED}"):
        remembered.unlink()  # it is about an earlier database


def _relocate(database: Path) -> None:
    """Rewrites the paths of artifacts that were stored when the folder had another path."""
    here = database.parent.as_uri()
    with closing(sqlite3.connect(database, timeout=_BUSY_TIMEOUT_S)) as connection, connection:
        query = "SELECT DISTINCT value FROM experiment_tags WHERE key = ? AND value != ?"
        for (there,) in connection.execute(query, (_ROOT_TAG, here)).fetchall():
            for table, column in _LOCATIONS:
                connection.execute(
                    f"UPDATE {table} SET {column} = ?1 || substr({column}, length(?2) + 1) "
                    f"WHERE substr({column}, 1, length(?2) + 1) = ?2 || '/'",
                    (here, there),
                )
            update = "UPDATE experiment_tags SET value = ? WHERE key = ? AND value = ?"
            connection.execute(update, (here, _ROOT_TAG, there))


def experiment_id(client: MlflowClient, root: Path, uri: str, name: str) -> str:
    """Id of an experiment, which is created if need be, or restored if it was deleted."""
    found = client.get_experiment_by_name(name)
    if found is None:
        database = _database(uri)
        tags = {_ROOT_TAG: root.as_uri()} if database and database.parent == root else {}
        is_server = uri.startswith(("http", "databricks"))  # it chooses where artifacts go
        place = None if is_server else (root / "artifacts" / name).as_uri()
        try:
            return client.create_experiment(name, place, tags=tags)
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id
