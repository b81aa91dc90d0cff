"""Two processes learn what one does: token-exact means, every sample once, one of them logs."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import ADAPTER_WEIGHTS, read_tensors, verify_checkpoint
from pipeline.journal import read_journal
from tests.faults.processes import TORCHRUN, at, finish, start
from tests.journey import CONFIGS, PLAIN, SHORT, Journey
from tests.training import spam_data

SAME = 1e-6  # float32: the sums over two processes round otherwise


@pytest.fixture(scope="module")
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
        *at("Infinite", 7),
    ]


@pytest.fixture(scope="module")
def one(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process does."""
    home = tmp_path_factory.mktemp("one")
    code, errors = finish(start(words, home))
    assert code == 0, errors
    return home


def losses(run: Path) -> dict[int, float]:
    return {
        line["step"]: line["values"]["train/loss"]
        for line, _ in read_journal(run)
        if line["kind"] == "metric" and "train/loss" in line["values"]
    }


def assert_same(ours: dict[int, float], theirs: dict[int, float]) -> None:
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < SAME


def names(run: Path) -> list[str]:
    """Of the events of a run."""
    return [line["name"] for line, _ in read_journal(run) if line["kind"] == "event"]


def skipped(run: Path) -> list[int]:
    """Ids of the samples of the step that was skipped."""
    (event,) = (line for line, _ in read_journal(run) if line.get("name") == "skipped_step")
    return sorted(event["sample_ids"])


def ids(home: Path, rank: int) -> dict[int, list[int]]:
    (path,) = home.glob(f"default/*/ids-{rank}.jsonl")
    lines = map(json.loads, path.read_text().splitlines())
    return {line["step"]: line["ids"] for line in lines}


def of_two(words: list[str], overlay: str) -> list[str]:
    """The same, by two processes."""
    return [*words, f"--config={CONFIGS}/trainer/{overlay}.yaml", "--trainer.accelerator=cpu"]


def stop_and_go_on(words: list[str], home: Path) -> None:
    """SIGTERM once there is a checkpoint; the same command then ends the run."""
    process = start(words, home)
    while not list(home.glob("default/*/checkpoints/step-*")):
        assert process.poll() is None, finish(process)[1]
    process.send_signal(signal.SIGTERM)
    code, errors = finish(process)
    assert code == 143, errors
    assert not list(home.glob("default/*/outcome.json"))
    code, errors = finish(start(words, home))
    assert code == 0, errors
    assert "resuming from" in errors


@pytest.mark.timeout(900)
@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
def test_two_equal_one_also_when_they_were_stopped(
    overlay: str, words: list[str], one: Path, tmp_path: Path
) -> None:
    """A step with an infinite gradient is skipped by both, whichever of them has it."""
    words = of_two(words, overlay)
    stop_and_go_on(words, tmp_path)

    (run,), (alone,) = (home.glob("default/*") for home in (tmp_path, one))
    assert_same(losses(run), losses(alone))
    shares = [ids(tmp_path, rank) for rank in (0, 1)]
    whole = ids(one, 0)
    assert any(not shares[1][step] for step in whole), "every process had a sample in every step"
    for step, members in whole.items():
        assert sorted(shares[0][step] + shares[1][step]) == sorted(members)
    assert names(run).count("created") == 1
    assert skipped(run) == skipped(alone) == sorted(whole[7]), "the samples of both processes"
    ours, theirs = (read_tensors(max(folder.glob("checkpoints/step-*"))) for folder in (run, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # AdamW divides by the root of what may be near nothing: its rounding is the rate's size
        assert float((ours[name] - tensor).abs().max()) < 1e-4, name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
def test_two_that_were_stopped_equal_two_that_were_not_to_the_last_bit(
    overlay: str, words: list[str], tmp_path: Path
) -> None:
    words = of_two(words, overlay)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    stop_and_go_on(words, stopped)
    code, errors = finish(start(words, whole))
    assert code == 0, errors
    (ours,), (theirs,) = (home.glob("default/*") for home in (stopped, whole))
    assert losses(ours) == losses(theirs)
    ours, theirs = (max(run.glob("checkpoints/step-*")) for run in (ours, theirs))
    assert ours.name == theirs.name
    ours, theirs = read_tensors(ours), read_tensors(theirs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def adapters(tiny: Journey) -> list[str]:
    """Adapters and a tied head shared out, with validation and sample texts."""
    return [
        "fit",
        f"--config={CONFIGS}/instruct.yaml",
        f"--config={CONFIGS}/trainer/fsdp2.yaml",
        *SHORT,
        *PLAIN,
        f"--model.init_from={tiny.best('pretrain')}",
        "--trainer.accelerator=cpu",
    ]


@pytest.mark.timeout(900)
def test_torchrun_starts_one_run_anew(adapters: list[str], tiny: Journey, tmp_path: Path) -> None:
    code, errors = finish(start([*adapters, "--run.resume=never"], tmp_path, TORCHRUN))
    assert code == 0, errors
    (run,) = tmp_path.glob("default/*")
    assert names(run).count("created") == 1
    (path,) = run.glob("checkpoints/step-*")
    verify_checkpoint(path)
    assert (run / "samples/step-00000004.json").is_file()
    ours, theirs = (read_tensors(of, ADAPTER_WEIGHTS) for of in (path, tiny.best("instruct")))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) < 1e-4  # as above


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_of_a_run_that_is_finished(adapters: list[str], tmp_path: Path) -> None:
    for words in (adapters, [*adapters, "--run.resume=never"]):
        code, errors = finish(start(words, tmp_path, TORCHRUN))
        assert code == 0, errors
    first, second = sorted(tmp_path.glob("default/*"))
    assert second.name == f"{first.name}-2"
    code, errors = finish(start(adapters, tmp_path, TORCHRUN))
    assert code == 0, errors
    assert errors.count("already finished") == 1
