"""A chain killed during training, together with its stage, resumes and ends as if uninterrupted."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipeline.directories import CHECKPOINTS
from pipeline.runs.journal import JOURNAL, read_journal
from pipeline.runs.run_directory import read_outcome
from tests.faults.processes import Started, go_on, pauses
from tests.faults.test_exact_resume import assert_equal_checkpoints
from tests.faults.test_stopped import metrics
from tests.journey import CONFIGS, Journey

STEP = 6  # in which it is killed; checkpoints are made every four


@pytest.fixture
def chain(tiny: Journey, tmp_path: Path) -> Path:
    """A vocabulary, and a pretraining on it with dropout and validation."""
    source = [str(tiny.folder / "prose")]
    vocab: dict[str, Any] = {"name": "vocab", "command": "tokenizer train"}
    vocab["set"] = {"source": source, "vocab_size": 400, "min_frequency": 2}
    pretrain: dict[str, Any] = {"name": "pretrain", "command": "fit"}
    pretrain["config"] = [f"{CONFIGS}/pretrain.yaml", f"{CONFIGS}/model/tiny.yaml"]
    pretrain["inputs"] = {"tokenizer": "vocab"}
    pretrain["set"] = {
        "precision": "32-true",
        "model.gpt.dropout": 0.1,
        "model.optimizer.warmup_steps": 2,
        "data.source": source,
        "data.near_duplicates": None,
        "data.block_size": 64,
        "trainer.max_steps": 12,
        "trainer.val_check_interval": 8,
        "trainer.enable_progress_bar": False,
        "trainer.log_every_n_steps": 1,
        "trainer.callbacks+": "tests.faults.processes.Pause",
        "trainer.callbacks.step": STEP,
        "checkpoints.every_n_steps": 4,
    }
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump({"experiment": "default", "stages": [vocab, pretrain]}))
    return path


def start(chain: Path, home: Path) -> Started:
    environment = {**os.environ, "GPT_PIPELINE_HOME": str(home)}
    return Started(["run", f"--config={chain}"], home.with_suffix(".txt"), environment)


def kill(started: Started) -> None:
    """The chain and its stage, so that neither can save anything."""
    chain = psutil.Process(started.process.pid)
    (stage,) = (child for child in chain.children() if "fit" in child.cmdline())
    chain.kill()
    stage.kill()
    assert started.wait() == -signal.SIGKILL


def run_of(home: Path, name: str) -> Path:
    """The only run of a stage, or of the chain."""
    (journal,) = home.glob(f"default/{name}-*/{JOURNAL}")
    return journal.parent


def stages(home: Path) -> list[tuple[str, str]]:
    """What became of the stages, by the journal of the chain."""
    lines = [line for line, _ in read_journal(run_of(home, "chain"))]
    return [(line["stage"], line["state"]) for line in lines if line.get("name") == "stage"]


@pytest.mark.slow
def test_a_killed_chain_ends_as_one_that_was_not(
    chain: Path, tmp_path: Path, empty_database: Path
) -> None:
    homes = [tmp_path / name for name in ("killed", "whole")]
    for home in homes:
        home.mkdir()
        shutil.copy(empty_database, home / "mlflow.db")
    running = [start(chain, home) for home in homes]
    for started, home in zip(running, homes, strict=True):
        started.until(lambda home=home: pauses(home, STEP))  # type: ignore[misc]
    kill(running[0])
    for home in homes:
        go_on(home, STEP)
    running[0] = start(chain, homes[0])
    for started in running:
        assert started.wait() == 0, started.said()

    killed, whole = homes
    assert "checkpoints/step-00000004\n" in running[0].said(), "it went on from the last one"
    begun = [("vocab", "started"), ("vocab", "finished"), ("pretrain", "started")]
    assert stages(whole) == [*begun, ("pretrain", "finished")]
    assert stages(killed) == [*begun, ("vocab", "reused"), *stages(whole)[2:]]
    ours, theirs = (run_of(home, "pretrain") for home in homes)
    names = sorted(path.name for path in (theirs / CHECKPOINTS).iterdir())
    assert sorted(path.name for path in (ours / CHECKPOINTS).iterdir()) == names
    for name in names:
        assert_equal_checkpoints(ours / CHECKPOINTS / name, theirs / CHECKPOINTS / name)
    assert metrics(ours) == metrics(theirs)
    outcomes = [read_outcome(run_of(home, "chain")) for home in homes]
    assert outcomes[0] is not None
    assert outcomes[1] is not None
    assert outcomes[0]["metrics"] == outcomes[1]["metrics"]
