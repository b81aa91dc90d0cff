"""A store of MLflow that has no room: training ends well, and all arrives once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.journal import read_journal
from tests.faults.processes import Started
from tests.journey import said

FREE = 64 << 10  # bytes that a full disk keeps for the lock file, too few for MLflow


@pytest.fixture
def logging_words(words: list[str]) -> list[str]:
    """The same pretraining; every step is logged."""
    return [*words, "--data.num_workers=0", "--trainer.log_every_n_steps=1"]


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
    assert "disk is full" in first.said()
    assert "the next run fills it in" in first.said()

    filler.unlink()
    second = ["--run.name=second", "--trainer.max_steps=12"]
    code, _, err = said(*logging_words, *second)
    assert code == 0, err
    for name in ("pretrain", "second"):
        assert_arrived(run_in(home, name), uri)
    code, _, err = said("ui", "--sync")
    assert err == "2 runs, 0 lines sent\n"
