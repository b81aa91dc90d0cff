import json
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType

from pipeline.runs import stage_run
from pipeline.runs.journal import JOURNAL, read_journal
from pipeline.runs.mlflow_replica import _metric_key
from pipeline.runs.reuse import Attempt
from pipeline.runs.run_directory import Run
from pipeline.runs.tracking import Replica, open_ui, sync, sync_all, tracking_uri
from tests.faults.processes import PATIENCE_S, PROCESSES

Capsys = pytest.CaptureFixture[str]

WRITER = """
import sys, time
from pathlib import Path
from pipeline.runs.run_directory import Run
run = Run.open(Path(sys.argv[1]))
for step in range(50):
    run.log_metrics({"loss": 1 / (step + 1)}, step)
print("written", flush=True)
time.sleep(60)
"""
OPEN_UI = """
import sys
from pathlib import Path
from pipeline.runs.tracking import open_ui
open_ui(Path(sys.argv[1]), port=int(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def no_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def root(tmp_path: Path, empty_database: Path) -> Path:
    root = tmp_path / "pro ject" / "mlruns"
    root.mkdir(parents=True)
    shutil.copy(empty_database, root / "mlflow.db")
    return root


def runs_in(root: Path, uri: str | None = None) -> dict[str, MlflowRun]:
    client = MlflowClient(uri or tracking_uri(root))
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = client.search_runs(experiments, run_view_type=ViewType.ALL)
    by_name = {run.info.run_name: run for run in found}
    assert len(by_name) == len(found), "a run is there twice"
    return by_name


def history(root: Path, run: str, key: str, uri: str | None = None) -> list[tuple[int, float]]:
    run_id = runs_in(root, uri)[run].info.run_id
    points = MlflowClient(uri or tracking_uri(root)).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def contents(root: Path) -> dict[str, list[Any]]:
    """All that MLflow's tables say about runs."""
    queries = {
        "runs": "SELECT run_uuid, name, status, start_time, end_time FROM runs ORDER BY 1",
        "metrics": "SELECT run_uuid, key, step, timestamp, value FROM metrics ORDER BY 1, 2, 3, 4",
        "params": "SELECT run_uuid, key, value FROM params ORDER BY 1, 2",
        "tags": "SELECT run_uuid, key, value FROM tags ORDER BY 1, 2",
        "datasets": "SELECT name, digest, dataset_source, dataset_profile FROM datasets ORDER BY 1",
        "inputs": "SELECT destination_id, source_id FROM inputs ORDER BY 1",
    }
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        return {name: database.execute(query).fetchall() for name, query in queries.items()}


def write_full_run(root: Path) -> Run:
    parent = Run.open(root / "chains" / "all", command="run -c all.yaml")
    parent.log_tags({"git.commit": "abc"})
    run = Run.open(root / "spam" / "one", parent=parent.path, command="fit -c spam.yaml")
    run.log_params({"lr": 0.1, "layers[0]": "q", "long": "x" * 7000, "lora": None})
    run.config({"lr": 0.1})
    run.log_dataset("sms", "ab" * 32, {"train": 3}, "bundled:sms")
    for step in range(1200):
        run.log_metrics({"train/loss": 1 / (step + 1)}, step)
    run.log_metrics({"odd": math.nan}, 1)
    run.log_metrics({"odd": -math.inf}, 2)
    run.log_table([{"text": "中文"}], "samples/step-1.json")
    run.log_text("report", "report.html")
    run.event("skipped", step=3)
    run.finish({"best": "checkpoints/step-1"}, {"val/loss": 0.5}, {})
    parent.finish({}, {}, {})
    return run


def test_a_run_arrives_whole(root: Path) -> None:
    run = write_full_run(root)
    assert sync(run.path) > 1200
    found = runs_in(root)["one"]
    client = MlflowClient(tracking_uri(root))

    tags = found.data.tags
    assert found.info.status == "FINISHED"
    assert found.info.end_time >= found.info.start_time
    assert client.get_experiment(found.info.experiment_id).name == "spam"
    assert tags["mlflow.parentRunId"] == runs_in(root)["all"].info.run_id
    assert tags["mlflow.source.name"] == "fit"
    assert tags["output.best"] == "checkpoints/step-1"
    assert tags["event.skipped"] == '{"step": 3}'
    assert runs_in(root)["all"].data.tags["mlflow.source.git.commit"] == "abc"

    assert (found.data.params["lr"], found.data.params["layers_0_"]) == ("0.1", "q")
    assert "lora" not in found.data.params, "dozens of options are None, and say nothing"
    assert len(history(root, "one", "train/loss")) == 1200
    points = client.get_metric_history(found.info.run_id, "odd")
    assert [math.isnan(point.value) for point in points] == [True, True]
    assert tags["non_finite.odd"] == "-inf at step 2"

    assert found.inputs is not None
    (dataset,) = (used.dataset for used in found.inputs.dataset_inputs)
    assert (dataset.name, dataset.digest) == ("sms", ("ab" * 32)[:36])
    assert json.loads(dataset.profile or "") == {"digest": "ab" * 32, "train": 3}


def test_artifacts_can_be_read_in_mlflow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(root))  # load_table reads it
    run = write_full_run(root)
    sync(run.path)
    found = runs_in(root)["one"]
    client = MlflowClient(tracking_uri(root))
    names = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "report.html", "samples"} <= names
    table = client.load_table(found.info.experiment_id, "samples/step-1.json", [found.info.run_id])
    assert table["text"].tolist() == ["中文"]
    assert found.data.params["long"] == "x" * 6000


def test_an_artifact_that_is_gone_holds_up_nothing(root: Path, capsys: Capsys) -> None:
    run = Run.open(root / "spam" / "one")
    for name in ("gone.txt", "kept.txt"):
        run.log_text("text", name)
    (run.path / "gone.txt").unlink()
    run.finish({}, {}, {})
    sync(run.path)
    assert (
        f"{run.path / 'gone.txt'} was recorded as an artifact but is gone"
        in capsys.readouterr().err
    )
    info = runs_in(root)["one"].info
    assert info.status == "FINISHED"
    shown = MlflowClient(tracking_uri(root)).list_artifacts(info.run_id)
    assert [file.path for file in shown] == ["kept.txt"]


def test_of_many_tables_the_last_are_shown(root: Path) -> None:
    run = Run.open(root / "spam" / "one")
    names = [f"samples/{'x' * 150}-{number}.json" for number in range(50)]
    for name in [*names, names[-1]]:
        run.log_table([{"a": 1}], name)
        if name == names[-1]:
            sync(run.path)
    shown = runs_in(root)["one"].data.tags["mlflow.loggedArtifacts"]
    paths = [table["path"] for table in json.loads(shown)]
    assert 10 < len(paths) < len(names)
    assert paths == names[-len(paths) :], "each once"


def test_a_run_began_and_ended_when_its_journal_says(root: Path) -> None:
    run = Run.open(root / "spam" / "one")
    run.fail("stop")
    lines = [{**line, "time": line["time"] - 1000} for line, _ in read_journal(run.path)]
    (run.path / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    sync(run.path)
    info = runs_in(root)["one"].info
    times = [int(lines[n]["time"] * 1000) for n in (0, -1)]
    assert [info.start_time, info.end_time] == times


def test_a_run_that_died_after_its_outcome_has_finished(root: Path) -> None:
    run = Run.open(root / "spam" / "one")
    run.finish({}, {}, {})
    lines = (run.path / JOURNAL).read_bytes().splitlines(keepends=True)
    (run.path / JOURNAL).write_bytes(b"".join(lines[:-1]))
    sync(run.path)
    assert runs_in(root)["one"].info.status == "FINISHED"
    assert sync(run.path) == 0


def test_sending_again_doubles_nothing(root: Path) -> None:
    run = write_full_run(root)
    half = (run.path / JOURNAL).read_bytes()
    cut = half.index(b"\n", len(half) // 2) + 1
    (run.path / JOURNAL).write_bytes(half[:cut])
    sync(run.path)
    midway = (run.path / "mlflow.json").read_bytes()
    (run.path / JOURNAL).write_bytes(half)
    sync(run.path)
    before = contents(root)
    assert sync(run.path) == 0

    (run.path / "mlflow.json").write_bytes(midway)  # as if it had died after sending
    assert sync(run.path) > 0
    assert contents(root) == before
    (run.path / "mlflow.json").unlink()
    assert sync(run.path) > 1200
    assert contents(root) == before


def test_runs_that_were_purged_are_made_again(root: Path) -> None:
    run = write_full_run(root)
    sync_all(root)
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        for table in ("tags", "params", "metrics", "latest_metrics", "inputs", "runs"):
            database.execute(f"DELETE FROM {table}")  # as `mlflow gc` does
    (run.path / "mlflow.json").unlink()
    sync_all(root)
    runs = runs_in(root)
    assert len(history(root, "one", "train/loss")) == 1200
    assert runs["one"].data.tags["mlflow.parentRunId"] == runs["all"].info.run_id


def test_a_killed_run_is_ended_and_goes_on_when_resumed(root: Path) -> None:
    path = root / "spam" / "one"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    sync(path)
    assert runs_in(root)["one"].info.status == "RUNNING"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert sync_all(root)["lines"] == 0
    assert runs_in(root)["one"].info.status == "KILLED"

    run = Run.open(path)
    for step in range(40, 60):  # from the checkpoint of step 40 on
        run.log_metrics({"loss": 1 / (step + 1)}, step)
    sync(path)
    assert runs_in(root)["one"].info.status == "RUNNING"
    run.finish({}, {}, {})
    sync(path)
    found = runs_in(root)["one"]
    assert (found.info.status, found.data.tags["resumed"]) == ("FINISHED", "1")
    assert history(root, "one", "loss") == [(step, 1 / (step + 1)) for step in range(60)]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("tokenizer train '--source=[\"a b.txt\"]' --vocab_size=400", "tokenizer train"),
        ("fit -c spam.yaml", "fit"),
        ("ui", "ui"),
    ],
)
def test_a_source_is_named_by_its_command_alone(root: Path, command: str, name: str) -> None:
    run = Run.open(root / "spam" / "one", command=command)
    sync(run.path)
    assert runs_in(root)["one"].data.tags["mlflow.source.name"] == name


def test_names_that_mlflow_does_not_take_arrive_as_others(root: Path) -> None:
    names = {"/a": "_2f/a", "../b": "_2e_2e/b", "c//ham": "c/_2f/ham", "c/ham": "c/ham"}
    names |= {"d/ham?": "d/ham_3f", "e/垃圾": "e/垃圾"}
    run = Run.open(root / "spam" / "one")
    run.log_metrics(dict.fromkeys([*names, "x" * 300], 1.0), 1)
    sync(run.path)
    assert runs_in(root)["one"].data.metrics.keys() == {*names.values(), "x" * 250}


def test_what_is_measured_anew_without_a_step_counts(root: Path) -> None:
    """A stage that has no steps logs at 0; what it says when it was gone on with is its result."""
    path = root / "spam" / "one"
    for value in (1.0, 1.0, 2.0):
        run = Run.open(path)
        run.log_metrics({"score": value}, 0)
        run.fail("stop")
        sync(path)
        assert runs_in(root)["one"].data.metrics == {"score": value}
    assert history(root, "one", "score") == [(0, 1.0), (0, 2.0)]


def test_a_parameter_that_changed_is_a_tag(root: Path) -> None:
    path = root / "spam" / "one"
    for lr in ("0.1", "0.2", "0.1"):
        run = Run.open(path)
        run.log_params({"lr": lr, "seed": 1})
        run.fail("stop")
        sync(path)
        found = runs_in(root)["one"]
        assert found.data.params == {"lr": "0.1", "seed": "1"}
        assert found.data.tags.get("changed.lr", "0.1") == lr
    assert found.data.tags["last_failure"] == "stop"
    assert "changed.seed" not in found.data.tags


def test_what_the_user_deleted_stays_deleted(root: Path) -> None:
    run = Run.open(root / "spam" / "one")
    sync(run.path)
    MlflowClient(tracking_uri(root)).delete_run(runs_in(root)["one"].info.run_id)
    run.log_metrics({"loss": 1.0}, 0)
    assert sync(run.path) == 0
    (run.path / "mlflow.json").unlink()
    assert sync(run.path) == 0
    assert len(runs_in(root)) == 1


def test_a_deleted_experiment_is_restored_for_a_new_run(root: Path) -> None:
    sync(Run.open(root / "spam" / "one").path)
    client = MlflowClient(tracking_uri(root))
    client.delete_experiment(runs_in(root)["one"].info.experiment_id)
    sync(Run.open(root / "spam" / "two").path)
    assert runs_in(root)["two"].info.lifecycle_stage == "active"


def test_a_damaged_journal_holds_up_no_other(root: Path, capsys: Capsys) -> None:
    Run.open(root / "a" / "damaged").fail("stop")
    with (root / "a" / "damaged" / JOURNAL).open("ab") as journal:
        journal.write(b"\0\0\0\n")
    Run.open(root / "b" / "good").fail("stop")
    assert sync_all(root) == {"runs": 2, "lines": 3, "damaged": 1}
    assert "is damaged at byte" in capsys.readouterr().err
    assert runs_in(root)["good"].info.status == "FAILED"


@pytest.mark.parametrize("line", [b"5\n", b'{"time": 1, "jind": "status"}\n'])
def test_a_line_that_is_no_record_is_damage(root: Path, line: bytes, capsys: Capsys) -> None:
    Run.open(root / "a" / "damaged").fail("stop")
    with (root / "a" / "damaged" / JOURNAL).open("ab") as journal:
        journal.write(line)
    Run.open(root / "b" / "good").fail("stop")
    assert sync_all(root) == {"runs": 2, "lines": 3, "damaged": 1}
    assert "is damaged at byte" in capsys.readouterr().err


def test_a_record_without_its_parts_is_damage(root: Path, capsys: Capsys) -> None:
    Run.open(root / "a" / "damaged").fail("stop")
    with (root / "a" / "damaged" / JOURNAL).open("ab") as journal:
        journal.write(b'{"time": 1, "kind": "metric"}\n')
    Run.open(root / "b" / "good").fail("stop")
    assert sync_all(root)["damaged"] == 1
    assert f"{root / 'a' / 'damaged' / JOURNAL} is damaged" in capsys.readouterr().err
    assert runs_in(root)["good"].info.status == "FAILED"


def test_a_run_whose_first_line_was_taken_out(root: Path) -> None:
    Run.open(root / "a" / "b").fail("stop")
    journal = root / "a" / "b" / JOURNAL
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[1:]))
    assert sync_all(root)["damaged"] == 0
    assert runs_in(root)["b"].info.status == "FAILED"


def test_a_journal_that_lost_lines_is_sent_anew(root: Path) -> None:
    """After a power cut it may be shorter than what was sent of it."""
    run = Run.open(root / "a" / "b")
    for step in range(9):
        run.log_metrics({"loss": 1.0 + step}, step)
    assert sync(run.path) > 0
    whole = (run.path / JOURNAL).read_bytes().splitlines(keepends=True)
    (run.path / JOURNAL).write_bytes(b"".join(whole[:-3]))
    run.fail("power cut")  # its line begins elsewhere
    run = Run.open(root / "a" / "b")
    for step in range(6, 12):
        run.log_metrics({"loss": 2.0 + step}, step)
    run.finish({}, {}, {})
    assert sync_all(root)["damaged"] == 0
    assert history(root, "b", "loss")[-1] == (11, 13.0)
    assert runs_in(root)["b"].info.status == "FINISHED"


def test_a_moved_project_keeps_its_artifacts(root: Path, tmp_path: Path) -> None:
    run = write_full_run(root)
    sync_all(root)
    moved = tmp_path / "mo#v ed" / "mlruns"
    moved.parent.mkdir()
    root.rename(moved)
    assert sync_all(moved)["lines"] == 0  # the store is known to be the same
    two = Run.open(moved / "spam" / "two")
    two.log_text("new", "new.txt")
    sync(two.path)

    client = MlflowClient(tracking_uri(moved))
    for name, file in (("one", "report.html"), ("two", "new.txt")):
        info = runs_in(moved)[name].info
        assert info.artifact_uri.startswith(moved.as_uri())
        assert Path(client.download_artifacts(info.run_id, file)).is_file()
    assert not root.exists()
    assert not run.path.exists()


@pytest.mark.parametrize("name", ["a%41b", "really?x=1", "50% of 7 %25", "Größe #1 +"])
def test_any_path_can_hold_the_database(name: str, tmp_path: Path) -> None:
    root = tmp_path / name / "mlruns"
    run = Run.open(root / "spam" / "one")
    run.log_text("new", "new.txt")
    run.finish({}, {}, {})
    assert sync_all(root)["lines"] > 0
    assert sync_all(root, ask=True)["lines"] == 0, "it is found again"
    assert (root / "mlflow.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    client, info = MlflowClient(tracking_uri(root)), runs_in(root)["one"].info
    assert Path(client.download_artifacts(info.run_id, "new.txt")).read_text() == "new"


def test_a_path_that_always_worked_keeps_its_address(tmp_path: Path) -> None:
    """It is how runs know the store that they were sent to."""
    for name in ("a b", "#1", "Größe", "50% x"):
        assert tracking_uri(tmp_path / name) == f"sqlite:///{tmp_path / name / 'mlflow.db'}"


def test_a_lost_database_is_filled_anew_by_whoever_comes(root: Path) -> None:
    for number in range(3):
        run = Run.open(root / "spam" / f"run-{number}")
        for step in range(300):
            run.log_metrics({"loss": step}, step)
        run.finish({}, {}, {})
    sync_all(root)
    root = root.rename(root.parent / "elsewhere")  # to which this process has no connection
    (root / "mlflow.db").unlink()

    arguments = (root, tracking_uri(root))
    killed = PROCESSES.Process(target=sync_all, args=arguments)
    killed.start()
    wait_for(lambda: bool(list(root.glob(".mlflow-*/mlflow.db"))), PATIENCE_S)
    killed.kill()  # while it makes the database
    killed.join()
    assert not (root / "mlflow.db").exists()
    both = [PROCESSES.Process(target=sync_all, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(runs_in(root)) == 3
    for number in range(3):
        assert history(root, f"run-{number}", "loss") == [(s, float(s)) for s in range(300)]


def test_a_store_elsewhere_that_lost_its_runs_is_filled_when_asked(
    root: Path, tmp_path: Path
) -> None:
    run = Run.open(root / "spam" / "one")
    run.log_metrics({"loss": 1.0}, 3)
    run.finish({}, {}, {})
    uri = f"sqlite:///{tmp_path / 'elsewhere' / 'mlflow.db'}"
    assert sync_all(root, uri)["lines"] > 0
    client = MlflowClient(uri)
    database = sqlite3.connect(tmp_path / "elsewhere" / "mlflow.db")
    with closing(database), database:  # as where a server was set up anew
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table}")
    assert sync_all(root, uri)["lines"] == 0
    assert sync_all(root, uri, ask=True)["lines"] > 0
    assert len(client.search_runs([client.get_experiment_by_name("spam").experiment_id])) == 1
    assert history(root, "one", "loss", uri) == [(3, 1.0)]
    assert sync_all(root, uri, ask=True)["lines"] == 0


def test_a_replica_follows_and_fills_in(root: Path) -> None:
    earlier = Run.open(root / "spam" / "earlier")
    earlier.log_metrics({"loss": 1.0}, 0)
    earlier.finish({}, {}, {})
    run = Run.open(root / "spam" / "one")
    replica = Replica(run.path, interval_s=0.05)
    run.log_metrics({"loss": 2.0}, 0)
    wait_for(lambda: {"one", "earlier"} <= runs_in(root).keys(), 20)
    wait_for(lambda: history(root, "one", "loss") == [(0, 2.0)], 20)
    wait_for(lambda: runs_in(root)["earlier"].info.status == "FINISHED", 20)
    run.log_metrics({"loss": 1.0}, 1)
    run.finish({}, {}, {})
    replica.close()
    assert history(root, "one", "loss") == [(0, 2.0), (1, 1.0)]
    assert runs_in(root)["one"].info.status == "FINISHED"


def test_a_server_that_hangs_holds_up_nothing(root: Path, capsys: Capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}"
        run = Run.open(root / "spam" / "one")
        replica = Replica(run.path, uri)
        run.finish({}, {}, {})
        start = time.monotonic()
        replica.close(timeout_s=0.5)
        assert time.monotonic() - start < 2
    err = capsys.readouterr().err
    assert "unreachable (not done within 0.5 s)" in err
    assert "secret" not in err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(130), ValueError()])
def test_whoever_interrupts_waits_less_for_it(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit that took steps ends by SystemExit."""
    waited: list[float] = []

    class Waiting:
        close = waited.append

    monkeypatch.setattr(stage_run, "Replica", lambda _, **__: Waiting)
    attempt = Attempt(tmp_path / "mlruns" / "default" / "one", None)
    with pytest.raises(type(error)), stage_run.open_run(attempt, {}):
        raise error
    assert waited == [20.0 if isinstance(error, ValueError) else 3.0]


@pytest.fixture
def server(tmp_path: Path, empty_database: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """The address of a server, and what starts it, through `open_ui`."""
    root = tmp_path / "server"
    root.mkdir()
    shutil.copy(empty_database, root / "mlflow.db")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started: list[subprocess.Popen[str]] = []

    def start() -> None:
        command = [sys.executable, "-c", OPEN_UI, str(root), str(port)]
        own = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=own))
        assert started[0].stdout is not None
        assert started[0].stdout.readline() == f"http://127.0.0.1:{port}\n"
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"), 90)

    yield f"http://127.0.0.1:{port}", start
    for process in started:
        process.terminate()
        process.wait(30)


def test_a_server_that_is_down_is_filled_in_later(
    root: Path,
    server: tuple[str, Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capsys,
) -> None:
    uri, start_server = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    Run.open(root / "spam" / "earlier").fail("stop")
    run = Run.open(root / "spam" / "one")
    replica = Replica(run.path, interval_s=0.1)
    for step in range(1500):
        run.log_metrics({"loss": step, "odd": math.nan}, step)
    run.log_params({"lr": 1, "empty": ""})
    run.log_dataset("sms", "ab" * 32, {"train": 3}, "bundled:sms")
    run.log_table([{"text": "中文"}], "samples/x.json")
    run.finish({}, {}, {})
    start = time.monotonic()
    replica.close()
    assert time.monotonic() - start < 20
    (warning,) = re.findall("^warning: .*", capsys.readouterr().err, re.MULTILINE)
    assert "run 'python -m pipeline ui --sync' or the next run fills it in" in warning
    with pytest.raises(OSError, match=r"MLflow store http.* unreachable"):
        sync_all(root)

    start_server()
    assert sync_all(root)["lines"] > 1500
    (run.path / "mlflow.json").unlink()
    assert sync_all(root)["lines"] > 1500  # the same again
    found = runs_in(root, uri)["one"]
    assert history(root, "one", "loss", uri) == [(step, float(step)) for step in range(1500)]
    assert len(history(root, "one", "odd", uri)) == 1500
    assert (found.info.status, found.data.params["lr"]) == ("FINISHED", "1")
    assert found.inputs is not None
    assert len(found.inputs.dataset_inputs) == 1
    assert not (root / "artifacts").exists()
    assert runs_in(root, uri)["earlier"].info.status == "FAILED"
    shown = MlflowClient(uri).list_artifacts(found.info.run_id, "samples")
    assert [file.path for file in shown] == ["samples/x.json"]


def test_the_ui_says_that_its_port_is_taken(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on 127.0.0.1:{port} .* --port"):
            open_ui(root, port=port)


def test_the_ui_of_a_server_is_the_server(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:secret@mlflow.example")
    open_ui(root)
    assert capsys.readouterr().out == "https://***@mlflow.example\n"


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_names_that_mlflow_does_not_take_stay_apart(root: Path) -> None:
    run = Run.open(root / "a" / "b")
    values = {
        "test/f1/:)": 0.1,
        "test/f1/:(": 0.2,
        "test/f1/C+": 0.3,
        "test/f1/C#": 0.4,
        "plain": 1.0,
    }
    run.log_metrics(values, step=3)
    run.finish({}, {}, {})
    sync_all(root)
    found = runs_in(root)["b"].data.metrics
    assert sorted(found.values()) == sorted(values.values())
    assert found["plain"] == 1.0
    assert all(name == "plain" or name.startswith("test/f1/") for name in found)


def test_labels_that_look_like_paths_stay_apart() -> None:
    labels = ("a", "a/", "a//", "a/b", "a//b", "a/./b", "a/../b", ".", "..", "", "A", "a b", "é")
    keys = {_metric_key(f"test/f1/{label}") for label in labels}
    assert len(keys) == len(labels)
    assert all(key.startswith("test/f1/") for key in keys)
    assert {"test/f1/a", "test/f1/a/b", "test/f1/é"} <= keys, "as they are, where they can be"
