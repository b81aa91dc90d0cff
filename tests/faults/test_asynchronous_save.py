"""Checkpoints written while training continues: what they contain, and what can stop them."""

import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from pipeline import checkpoint as files
from pipeline.training import checkpoint_callback
from pipeline.training.memory import GIB
from tests.faults.processes import Started, at
from tests.faults.test_checkpoint_faults import Keep
from tests.faults.test_exact_resume import assert_equal_checkpoints
from tests.faults.test_stopped import assert_nothing_is_lost, journaled
from tests.faults.test_stopped import whole as whole
from tests.journey import Journey, said
from tests.training import classifier, fit, spam_data

EVERY, N_STEPS = 3, 11


class Gate(pl.Callback):
    """Lets each save begin two steps after the one that it saves."""

    def __init__(self) -> None:
        self.opened = threading.Semaphore(0)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step
        for due in (step > EVERY and step % EVERY == 2, step == N_STEPS):  # the last one at once
            if due:
                self.opened.release()


def test_it_holds_the_step_that_was_saved(
    tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit what a synchronous one holds, though the weights have moved on."""

    def train(name: str, **options: bool) -> Path:
        keep = Keep(keep_last=20, **options)
        data = spam_data(tiny.tokenizer)
        callbacks = [keep, gate]
        options = {"max_steps": N_STEPS, "limit_val_batches": 0, "callbacks": callbacks}
        fit(classifier(), data, tmp_path / name, every_n_steps=EVERY, **options)
        return tmp_path / name / files.CHECKPOINTS

    gate, write = Gate(), files.write_checkpoint
    at_once = train("at-once", asynchronous=False)

    def late(path: Path, writers: files.Writers) -> None:
        assert gate.opened.acquire(timeout=60)
        write(path, writers)

    gate = Gate()
    monkeypatch.setattr(files, "write_checkpoint", late)
    beside = train("beside", asynchronous=True)
    names = sorted(path.name for path in at_once.iterdir())
    assert names == [files.step_name(step) for step in (3, 6, 9, 11)]
    assert sorted(path.name for path in beside.iterdir()) == names
    for name in names:
        files.verify_checkpoint(beside / name)
        assert_equal_checkpoints(beside / name, at_once / name)
        for file in (at_once / name).iterdir():
            if file.name not in (files.TRAINING, files.MANIFEST):  # how torch pickles may differ
                assert (beside / name / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_stopped_while_it_is_written(
    words: list[str], home: Path, whole: Path, tmp_path: Path
) -> None:
    words = [*words, "--checkpoints.asynchronous=true", *at("HangInSave", 8)]
    started = Started(words, tmp_path / "said.txt")
    started.until(lambda: bool(list(home.glob("default/*/hangs"))) and journaled(home) >= 10)
    assert list(home.glob("default/*/checkpoints/.step-00000008-*.draft")), "it is being written"
    started.send(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL

    started = Started(words, tmp_path / "said.txt")
    started.until(lambda: journaled(home) >= 25)
    started.send(signal.SIGTERM)
    assert started.wait() == 143
    assert "checkpoints/step-00000004\n" in started.said(), "it went on from the last whole one"
    (folder,) = home.glob(f"default/*/{files.CHECKPOINTS}")
    newest = files.newest_valid(folder)
    assert newest is not None
    assert f"stopped after step {int(newest.name[5:])};" in started.said(), "and waited for it"

    started = Started(words, tmp_path / "said.txt")
    assert started.wait() == 0, started.said()
    assert not list(folder.glob(".*")), "half of one is left"
    assert_nothing_is_lost(home, whole)


def test_one_that_fails_ends_the_run_before_the_next_is_due(words: list[str], home: Path) -> None:
    options = ["--checkpoints.asynchronous=true", "--checkpoints.every_n_steps=1000"]
    code, _, err = said(*words, *options, *at("LoseFolder", 15), "--data.num_workers=0")
    assert code == 2, err
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert "step-00000020 could not be written" in line
    assert 20 <= journaled(home) < 40, "the next save is due after 40"


@pytest.mark.parametrize(("gib", "is_beside"), [(1.0, True), (0.0001, False)])
def test_a_copy_is_made_unasked_where_there_is_memory(
    gib: float, is_beside: bool, tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checkpoint_callback, "available_memory_bytes", lambda device: int(gib * GIB)
    )
    threads = []
    write = files.write_checkpoint

    def noting(path: Path, writers: files.Writers) -> None:
        threads.append(threading.current_thread())
        write(path, writers)

    monkeypatch.setattr(files, "write_checkpoint", noting)
    options = {"max_steps": 4, "limit_val_batches": 0}
    fit(classifier(), spam_data(tiny.tokenizer), tmp_path, every_n_steps=2, **options)
    assert [thread is not threading.main_thread() for thread in threads] == [is_beside] * 2
