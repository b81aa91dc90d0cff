"""Two processes learn what one does: token-exact means, every sample once, one of them logs."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from pipeline.journal import read_journal
from tests.faults.processes import finish, start
from tests.journey import CONFIGS, PLAIN, Journey
from tests.training import spam_data

SAME = 1e-6  # float32: the sums over two processes round otherwise


@pytest.fixture
def words(tiny: Journey) -> list[str]:
    """Texts of very unequal length; the last step has one sample, so that a process has none."""
    data = spam_data(tiny.tokenizer, train_fraction=0.12, val_fraction=0.1)
    data.setup("fit")
    n_samples = len(data.train_set)
    batch_size = next(n for n in range(6, n_samples) if n_samples % n == 1)
    return [
        "fit",
        f"--config={CONFIGS}/spam.yaml",
        *PLAIN,
        f"--model.init_from={tiny.best('pretrain')}",
        "--model.optimizer.warmup_steps=2",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=8",
        "--trainer.log_every_n_steps=1",
        "--trainer.limit_val_batches=0",
        "--data.train_fraction=0.12",
        f"--data.batch_size={batch_size}",
        "--data.max_tokens=150",
        "--checkpoints.every_n_steps=5",
        "--trainer.callbacks+=tests.faults.processes.Ids",
    ]


def losses(home: Path) -> dict[int, float]:
    (run,) = home.glob("default/*")
    return {
        line["step"]: line["values"]["train/loss"]
        for line, _ in read_journal(run)
        if line["kind"] == "metric" and "train/loss" in line["values"]
    }


def ids(home: Path, rank: int) -> dict[int, list[int]]:
    (path,) = home.glob(f"default/*/ids-{rank}.jsonl")
    lines = map(json.loads, path.read_text().splitlines())
    return {line["step"]: line["ids"] for line in lines}


@pytest.mark.timeout(900)
def test_ddp_equals_one_process_also_when_it_was_stopped(words: list[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    code, errors = finish(start(words, one))
    assert code == 0, errors

    words = [*words, f"--config={CONFIGS}/trainer/ddp.yaml", "--trainer.accelerator=cpu"]
    process = start(words, two)
    while not list(two.glob("default/*/checkpoints/step-*")):
        assert process.poll() is None, finish(process)[1]
    process.send_signal(signal.SIGTERM)
    code, errors = finish(process)
    assert code == 143, errors
    assert not list(two.glob("default/*/outcome.json"))
    code, errors = finish(start(words, two))
    assert code == 0, errors
    assert "resuming from" in errors

    ours, theirs = losses(two), losses(one)
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < SAME
    shares = [ids(two, rank) for rank in (0, 1)]
    whole = ids(one, 0)
    assert any(not shares[1][step] for step in whole), "every process had a sample in every step"
    for step, members in whole.items():
        assert sorted(shares[0][step] + shares[1][step]) == sorted(members)
    (run,) = two.glob("default/*")
    assert len([1 for line, _ in read_journal(run) if line.get("name") == "created"]) == 1
