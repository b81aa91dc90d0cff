"""Options of Lightning's that meet this project's own: refused, or heeded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.runs.journal import read_journal
from tests.faults.processes import at
from tests.journey import CONFIGS, PLAIN, Journey, outcome_of, said


@pytest.fixture
def words(words: list[str], home: Path) -> list[str]:
    """A pretraining of eight steps, logged every five, validated every four."""
    shorter = ["--trainer.max_steps=8", "--trainer.val_check_interval=4"]
    return [*words, *shorter, "--data.num_workers=0", "--checkpoints.every_n_steps=100"]


without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    "option",
    [
        "--trainer.gradient_clip_val=1",
        "--trainer.devices=0",
        "--trainer.fast_dev_run=true",
        pytest.param("--trainer.accelerator=cuda", marks=without_cuda),
        pytest.param("--model.cuda_graphs=true", marks=without_cuda),
        "--trainer.callbacks+={class_path: EarlyStopping, init_args: {monitor: val/loss, "
        "check_on_train_epoch_end: true}}",
    ],
)
def test_what_cannot_be_is_one_line(option: str, words: list[str]) -> None:
    code, _, err = said(*words, option)
    assert code == 2, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("limit", ["2", "0.5", "0"])
def test_a_test_is_of_the_whole_test_set(limit: str, tiny: Journey) -> None:
    config, ckpt = f"--config={CONFIGS}/spam.yaml", f"--ckpt_path={tiny.best('spam')}"
    code, _, err = said("test", config, ckpt, *PLAIN, f"--trainer.limit_test_batches={limit}")
    assert code == 2
    assert "a test is of the whole test set" in err


def test_nothing_is_logged_where_nothing_is_to_be(words: list[str], tmp_path: Path) -> None:
    code, _, err = said(*words, "--trainer.log_every_n_steps=0")
    assert code == 0, err


def test_a_run_that_is_to_stop_journals_no_value_twice(words: list[str], tmp_path: Path) -> None:
    """Lightning then logs every step, with what it remembers."""
    code, _, err = said(*words, *at("Stop", 6), "--trainer.min_steps=8")
    assert code == 0, err
    (run,) = (tmp_path / "mlruns" / "default").iterdir()
    lines = [line for line, _ in read_journal(run) if line["kind"] == "metric"]
    assert [line["step"] for line in lines if "train/loss" in line["values"]] == [5, 8]


def test_early_stopping_is_remembered_by_a_resume(words: list[str], tmp_path: Path) -> None:
    stopping = [
        "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks.monitor=val/loss",
        "--trainer.callbacks.stopping_threshold=100",
    ]
    code, _, err = said(*words, *stopping)
    assert code == 0, err
    folder = tmp_path / "mlruns" / "default"
    last = outcome_of(folder)["outputs"]["last"]
    assert last.endswith("step-00000004"), "it stopped at the first validation"
    next(folder.glob("*/outcome.json")).unlink()  # killed before its end
    code, _, err = said(*words, *stopping)
    assert code == 0, err
    assert "resuming from" in err
    assert outcome_of(folder)["outputs"]["last"] == last
