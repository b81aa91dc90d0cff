"""Faults while a model is trained: memory, workers, sources, losses."""

import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.checkpoint import newest_valid, read_tensors
from pipeline.directories import CHECKPOINTS
from pipeline.runs.journal import read_journal
from pipeline.training.callbacks import robust_z
from tests.faults.processes import Started, at
from tests.journey import said


def refused(*words: str) -> str:
    """The one line of an error that ends a command with 2."""
    code, _, err = said(*words)
    assert code == 2, err
    assert "Traceback" not in err
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    return line


def events(home: Path, name: str) -> list[dict[str, Any]]:
    (run,) = home.glob("default/*")
    return [line for line, _ in read_journal(run) if line.get("name") == name]


def test_an_allocator_that_refuses_is_one_line(words: list[str], home: Path) -> None:
    line = refused(*words, *at("Allocate", 6), "--data.num_workers=0")
    assert "out of memory" in line
    assert "data.max_tokens (it is 192, and changes no result, but for what dropout draws)" in line
    assert re.search(r"needs about \d+\.\d GiB beside the weights, \d+\.\d GiB are free: l", line)
    (ended,) = (e for e in read_events(home, "status") if e["status"] == "FAILED")
    assert "out of memory" in ended["reason"]
    assert read_events(home, "dataset"), "what it stands on is known of a failed run, too"


def read_events(home: Path, kind: str) -> list[dict[str, Any]]:
    (run,) = home.glob("default/*")
    return [line for line, _ in read_journal(run) if line["kind"] == kind]


def test_too_little_memory_is_said_before(words: list[str], home: Path) -> None:
    options = ["--data.max_tokens=4000000000", "--data.num_workers=0", "--trainer.max_steps=3"]
    code, _, err = said(*words, *options)
    assert code == 0, err
    assert "warning: training needs about" in err
    assert "lower data.max_tokens" in err


def test_a_killed_data_worker_is_named(words: list[str], home: Path, tmp_path: Path) -> None:
    started = Started([*words, *at("Hang", 6)], tmp_path / "said.txt")
    started.until(lambda: bool(list(home.glob("default/*/hangs"))))
    run = psutil.Process(started.process.pid)
    (worker,) = [child for child in run.children() if child.cmdline() == run.cmdline()]
    worker.send_signal(signal.SIGKILL)
    assert started.wait() == 2
    line = started.said().splitlines()[-1]
    assert line.startswith("error: a data worker was killed"), started.said()
    assert "data.num_workers" in line


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A text to be lost or changed."""
    path = tmp_path / "prose.txt"
    path.write_text("".join(f"Line {i} of a text about the number {i * i}.\n" for i in range(900)))
    return path


def test_sources_that_vanish_while_it_trains(words: list[str], home: Path, source: Path) -> None:
    """The tokens are in the cache; a resume without the sources is refused."""
    options = [f"--data.source=[{source}]", "--data.num_workers=0", "--trainer.max_steps=24"]
    code, _, err = said(*words, *options, *at("RemoveSource", 6))
    assert code == 0, err
    assert not source.exists()
    assert str(source) in refused(*words, *options, "--trainer.max_steps=30")


def test_sources_that_change_while_it_trains(words: list[str], home: Path, source: Path) -> None:
    """The tokens are in the cache; a resume is refused, for the rest would be of another text."""
    words = [*words, f"--data.source=[{source}]", "--data.num_workers=0", "--trainer.max_steps=12"]
    words += at("ChangeSource", 6)
    before = source.read_text()
    code, _, err = said(*words)
    assert code == 0, err
    assert source.read_text() != before
    words += at("Allocate", 10)  # it ends before it is finished
    assert "out of memory" in refused(*words)
    line = refused(*words)
    assert f"(changed: {source})" in line
    assert "--run.resume never" in line


def test_a_loss_that_stands_out_is_flagged(words: list[str], home: Path) -> None:
    code, _, err = said(*words, *at("Spike", 41), "--data.num_workers=0")
    assert code == 0, err
    (spike,) = events(home, "loss_spike")
    assert spike["step"] == 41
    assert spike["z"] > 8
    assert len(spike["sample_ids"]) == 8
    counts = [
        line["values"]["train/loss_spikes"]
        for line in read_events(home, "metric")
        if "train/loss_spikes" in line["values"]
    ]
    assert sorted(set(counts)) == [0.0, 1.0]


def test_a_robust_score_by_hand() -> None:
    # median 3, median distance 1: one standard deviation is 1.4826
    assert robust_z(3 + 2 * 1.4826, [1, 2, 3, 4, 5]) == pytest.approx(2)
    assert robust_z(3, [3.0] * 9) == 0
    assert robust_z(0.0, [0.0] * 9) == 0, "losses of an overfitted classifier"
    assert robust_z(1e-6, [0.0] * 9) < 2
    assert robust_z(1000, [1, 2, 3, 4, 5, 900]) > 100  # an outlier before hides none after it


def test_losses_that_are_no_numbers_end_the_run(words: list[str], home: Path) -> None:
    """What is kept is whole, and good to go on from."""
    line = refused(*words, *at("Diverge", 10), "--data.num_workers=0")
    assert "5 steps in a row" in line
    assert [event["step"] for event in events(home, "skipped_step")] == [10, 11, 12, 13, 14]
    (folder,) = home.glob(f"default/*/{CHECKPOINTS}")
    newest = newest_valid(folder)
    assert newest is not None
    assert newest.name == "step-00000012"
    assert all(torch.isfinite(tensor).all() for tensor in read_tensors(newest).values())


def test_steps_that_were_skipped_are_in_the_journal(words: list[str], home: Path) -> None:
    code, _, err = said(*words, *at("Infinite", 7), "--data.num_workers=0")
    assert code == 0, err
    (skipped,) = events(home, "skipped_step")
    assert skipped["step"] == 7
    assert len(skipped["sample_ids"]) == 8
