"""MLflow down, slow, full, locked or crowded: training finishes, and everything arrives once."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.request import urlopen

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.runs.journal import read_journal
from pipeline.runs.run_directory import Run
from pipeline.runs.tracking import sync, tracking_uri
from tests.faults.processes import PATIENCE_S, Started, at, go_on, pauses
from tests.journey import said

DELAY_S = 2.0
N_STEPS = 60
FREE = 64 << 10  # bytes that a full disk keeps for the lock file, too few for MLflow


@pytest.fixture
def logging_words(words: list[str]) -> list[str]:
    """The same pretraining; every step is logged."""
    return [*words, "--data.num_workers=0", "--trainer.log_every_n_steps=1"]


class Server:
    """MLflow's server on a store of its own, started by `ui` as users start it."""

    def __init__(self, folder: Path, empty_database: Path) -> None:
        folder.mkdir()
        shutil.copy(empty_database, folder / "mlflow.db")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri, self.folder = f"http://127.0.0.1:{self.port}", folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        environment = {**os.environ, "GPT_PIPELINE_HOME": str(self.folder)}
        environment.pop("MLFLOW_TRACKING_URI", None)
        command = [sys.executable, "-m", "pipeline", "ui", "--port", str(self.port)]
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        wait_for(self._answers)

    def kill(self) -> None:
        """SIGKILL, to it and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the server ended"
        try:
            with urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.fixture
def server(tmp_path: Path, empty_database: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server", empty_database)
    yield server
    server.kill()


class Delay(BaseHTTPRequestHandler):
    """Passes a request on to `server.port_behind`, late; notes when in `server.answered`."""

    protocol_version = "HTTP/1.1"

    def relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(DELAY_S)
        behind = HTTPConnection("127.0.0.1", self.server.port_behind)  # type: ignore[attr-defined]
        behind.request(self.command, self.path, body, dict(self.headers))
        answer = behind.getresponse()
        content = answer.read()
        self.server.answered.append(time.time())  # type: ignore[attr-defined]
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.getheader("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = relay

    def log_message(self, *args: object) -> None:
        """Nothing."""


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def run_in(home: Path, name: str = "pretrain") -> Path:
    (run,) = home.glob(f"default/{name}-*")
    return run


def points_in(run: Path, uri: str, metric: str) -> list[tuple[int, float]]:
    """What the store has of a metric of a run; the run is there once, or not at all."""
    created, _ = next(read_journal(run))
    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`gpt_pipeline.run` = '{created['run']}'")
    assert len(found) <= 1, "it is there twice"
    points = client.get_metric_history(found[0].info.run_id, metric) if found else []
    return sorted((point.step, point.value) for point in points)


def has_step(run: Path, uri: str, step: int) -> bool:
    try:
        return step in dict(points_in(run, uri, "train/loss"))
    except MlflowException:  # locked
        return False


def assert_arrived(run: Path, uri: str) -> None:
    """Every metric of the journal at every step once, and how the run ended."""
    journal = [line for line, _ in read_journal(run)]
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in journal:
        for name, value in line["values"].items() if line["kind"] == "metric" else ():
            expected.setdefault(name, []).append((line["step"], float(value)))
    assert len(expected["train/loss"]) >= 10
    for name, points in expected.items():
        assert points_in(run, uri, name) == sorted(points), name
    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    wanted = f"tags.`gpt_pipeline.run` = '{journal[0]['run']}'"
    (found,) = client.search_runs(experiments, wanted)
    assert found.info.status == "FINISHED"
    assert found.data.params["data.init_args.batch_size"] == "8"
    assert "config.yaml" in {file.path for file in client.list_artifacts(found.info.run_id)}


def synced() -> str:
    """What `ui --sync` says; the second time that nothing is left."""
    code, _, err = said("ui", "--sync")
    assert code == 0, err
    code, _, again = said("ui", "--sync")
    assert (code, again.split(", ")[-1]) == (0, "0 lines sent\n")
    return err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_server_that_is_down_at_the_start_the_middle_and_the_end(
    logging_words: list[str],
    home: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    words = [*logging_words, *at("Pause", 15), *at("Pause", 30), *at("Pause", 45)]
    started = Started(words, tmp_path / "said.txt")
    for step in (15, 30):  # up for a while in the middle, then killed
        started.until(lambda step=step: pauses(home, step))  # type: ignore[misc]
        server.start()
        wait_for(lambda step=step: has_step(run_in(home), server.uri, step - 1))  # type: ignore[misc]
        server.kill()
        go_on(home, step)
    started.until(lambda: pauses(home, 45))
    go_on(home, 45)
    assert started.wait() == 0, started.said()
    assert started.said().count("run 'python -m pipeline ui --sync' or the next run") == 1

    code, _, err = said("ui", "--sync")
    assert code == 2
    assert "unreachable" in err
    server.start()
    synced()
    assert_arrived(run_in(home), server.uri)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_slow_server_slows_no_training(
    logging_words: list[str],
    home: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two seconds a call; the store behind it then gets it all again, by its own name."""
    server.start()
    with ThreadingHTTPServer(("127.0.0.1", 0), Delay) as proxy:
        proxy.port_behind, proxy.answered = server.port, []  # type: ignore[attr-defined]
        Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.server_port}")
        started = Started([*logging_words, *at("Pause", 15)], tmp_path / "said.txt")
        started.until(lambda: pauses(home, 15) and bool(proxy.answered))  # type: ignore[attr-defined]
        go_on(home, 15)
        assert started.wait() == 0, started.said()
        proxy.shutdown()
    ends = [line["time"] for line, _ in read_journal(run_in(home)) if line["kind"] == "status"]
    meanwhile = [t for t in proxy.answered if t < ends[-1]]  # type: ignore[attr-defined]
    assert 0 < len(meanwhile) < N_STEPS / 2, "training waited for answers"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    synced()
    assert_arrived(run_in(home), server.uri)


@pytest.mark.timeout(900)
def test_a_locked_database_is_waited_for_beside_training(
    logging_words: list[str], home: Path, tmp_path: Path
) -> None:
    """Another writer has it from before the start until half of the run is over."""
    words = [*logging_words, *at("Pause", 30)]
    with closing(sqlite3.connect(home / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        started = Started(words, tmp_path / "said.txt")
        started.until(lambda: pauses(home, 30))
        other.execute("ROLLBACK")
    wait_for(lambda: has_step(run_in(home), tracking_uri(home), 29))
    go_on(home, 30)
    assert started.wait() == 0, started.said()
    synced()
    assert_arrived(run_in(home), tracking_uri(home))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_database_that_stays_locked_ends_no_run(
    logging_words: list[str], home: Path, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(home / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        started = Started(logging_words, tmp_path / "said.txt")
        assert started.wait() == 0, started.said()
        other.execute("ROLLBACK")
    assert "the next run fills it in" in started.said()
    synced()
    assert_arrived(run_in(home), tracking_uri(home))


@pytest.mark.timeout(900)
def test_a_full_disk_of_the_store_is_filled_in_by_the_next_run(
    logging_words: list[str],
    home: Path,
    small_disk: Path,
    empty_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full from the start; the store is elsewhere than the runs."""
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    shutil.copy(empty_database, small_disk / "mlflow.db")
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - FREE))
    uri = f"sqlite:///{small_disk / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    first = Started(logging_words, tmp_path / "said.txt")
    assert first.wait() == 0, first.said()
    assert "the next run fills it in" in first.said()

    filler.unlink()
    second = ["--run.name=second", "--trainer.max_steps=12"]
    code, _, err = said(*logging_words, *second)
    assert code == 0, err
    for name in ("pretrain", "second"):
        assert_arrived(run_in(home, name), uri)
    code, _, err = said("ui", "--sync")
    assert err == "2 runs, 0 lines sent\n"


def test_runs_of_the_same_data_are_sent_at_once(home: Path) -> None:
    """MLflow looks for the data, then adds them: of two that find none, one would fail."""
    for trial in range(2):
        root = home.with_name(f"runs-{trial}")
        paths = [root / "default" / f"run-{i}" for i in range(7)]
        for path in paths:
            run = Run.open(path)
            if path != paths[0]:
                run.log_dataset("SpamDataModule", "d" * 64, {"rows": 5}, "sms.tsv")
            run.finish({}, {}, {})
        sync(paths[0])  # there is a store then
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(sync, paths[1:]))
        client = MlflowClient(tracking_uri(root))
        (experiment,) = client.search_experiments(filter_string="name = 'default'")
        runs = client.search_runs([experiment.experiment_id])
        assert sorted(len(run.inputs.dataset_inputs) for run in runs) == [0] + [1] * 6


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_runs_at_once_make_one_store(
    logging_words: list[str], home: Path, tmp_path: Path
) -> None:
    """The database is not there yet, so that they also race to make it."""
    (home / "mlflow.db").unlink()
    names = [f"run{number}" for number in range(8)]
    every = [
        Started([*logging_words, f"--run.name={name}"], tmp_path / f"{name}.txt") for name in names
    ]
    for started in every:
        assert started.wait() == 0, started.said()
    synced()
    for name in names:
        assert_arrived(run_in(home, name), tracking_uri(home))
    client = MlflowClient(tracking_uri(home))
    experiments = [e.experiment_id for e in client.search_experiments()]
    assert len(client.search_runs(experiments)) == 8
