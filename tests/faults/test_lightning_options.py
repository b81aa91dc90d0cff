"""Lightning's options that clash with this project's own: refused or respected."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

from pipeline.runs.journal import metric_history, read_journal
from pipeline.training.options import check_processes
from tests.faults.processes import at
from tests.journey import CONFIGS, PLAIN, Journey, outcome_of, said


@pytest.fixture
def words(words: list[str], home: Path) -> list[str]:
    """A pretraining of eight steps, logged every five, validated every four."""
    shorter = ["--trainer.max_steps=8", "--trainer.val_check_interval=4"]
    return [*words, *shorter, "--data.num_workers=0", "--checkpoints.every_n_steps=100"]


TWICE = "{class_path: EarlyStopping, init_args: {monitor: val/loss}}"
AVERAGE = "{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.01}}"

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    "option",
    [
        "--trainer.gradient_clip_val=1",
        "--trainer.devices=0",
        "--trainer.strategy=ddp_spawn",
        "--trainer.strategy=ModelParallelStrategy",
        "--trainer.fast_dev_run=true",
        "--trainer.overfit_batches=1",
        "--trainer.reload_dataloaders_every_n_epochs=1",
        "--trainer.val_check_interval=0",
        "--trainer.check_val_every_n_epoch=0",
        "--trainer.devices=0,1",
        "--checkpoints.monitor=train/loss",
        "--trainer.callbacks+={class_path: EarlyStopping, init_args: {monitor: train/loss}}",
        "--trainer.callbacks+={class_path: EarlyStopping, init_args: {monitor: val/lss}}",
        "--trainer.limit_train_batches=0",
        "--ckpt_path=last",
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


@pytest.fixture
def started_in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells the first of two processes."""
    for key, value in {"RUN_ID": "x", "USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{key}", value)
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)


@pytest.mark.usefixtures("started_in_two")
def test_processes_that_would_each_train_alone_are_refused(words: list[str]) -> None:
    code, _, err = said(*words)
    assert code == 2, err
    assert "2 processes were started, but trainer.devices" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"world_size": 2}, None),
        ({"world_size": 2, "_val_check_time_interval": 60}, "val_check_interval is a time"),
        ({"_val_check_time_interval": 60}, None),
        ({"strategy": ModelParallelStrategy()}, "strategy is ModelParallelStrategy"),
        ({"strategy": FSDPStrategy()}, "strategy is FSDPStrategy"),
    ],
)
def test_processes_that_would_go_apart_are_refused(
    facts: dict[str, Any], problem: str | None
) -> None:
    trainer: Any = SimpleNamespace(**{"world_size": 1, "strategy": DDPStrategy(), **facts})
    if problem is None:
        check_processes(trainer)
        return
    with pytest.raises(ValueError, match=problem):
        check_processes(trainer)


@pytest.mark.parametrize("where", ["words", "file"])
def test_a_precision_of_the_trainers_is_not_ignored(
    where: str, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text("trainer: {precision: bf16-mixed}")
    own = {"words": "--trainer.precision=bf16-mixed", "file": f"--config={tmp_path / 'own.yaml'}"}
    code, _, err = said(*words, own[where])
    assert code == 2
    assert err.splitlines()[-1].endswith(
        "trainer.precision is bf16-mixed; set precision, which it follows from."
    )


@pytest.mark.usefixtures("started_in_two")
@pytest.mark.parametrize("command", ["score", "run", "tokenizer train"])
def test_what_needs_one_process_is_not_run_by_two(command: str) -> None:
    code, _, err = said(*command.split(), "--help")
    assert code == 2
    assert err == f"error: {command} needs one process, not 2; leave out what starts more.\n"


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("--trainer.gradient_clip_val=1", "model.optimizer.max_grad_norm"),
        ("--trainer.enable_checkpointing=false", "checkpoints"),
        ("--trainer.default_root_dir=elsewhere", "GPT_PIPELINE_HOME"),
        ("--trainer.logger=false", "journal"),
        ("--trainer.num_nodes=2", "by torchrun, or by srun"),
        ("--trainer.callbacks+=ModelCheckpoint", "checkpoints.monitor"),
        (f"--trainer.callbacks+={AVERAGE}", "the average would be lost"),
        ("--trainer.callbacks+=EMAWeightAveraging", "the average would be lost"),
        ("--trainer.callbacks+=LearningRateFinder", "give model.optimizer.lr"),
        ("--trainer.callbacks+=BatchSizeFinder", "set data.batch_size"),
        ("--trainer.callbacks+=BackboneFinetuning", "set model.trainable"),
        ("--trainer.callbacks+=pipeline.training.callbacks.LossSpikes", "has one anyway"),
        (f"--trainer.callbacks=[{TWICE}, {TWICE}]", "has 2 times EarlyStopping"),
        ("--ckpt_path=nowhere", "give a checkpoint directory"),
    ],
)
def test_what_is_meant_otherwise_is_named_and_leaves_no_run(
    option: str, remedy: str, words: list[str], tmp_path: Path
) -> None:
    code, _, err = said(*words, option)
    assert code == 2, err
    assert remedy in err.splitlines()[-1]
    assert not (tmp_path / "mlruns" / "default").exists()


def test_loggers_of_the_users_are_kept_beside_the_journal(words: list[str], tmp_path: Path) -> None:
    csv = f"{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}, name: csv, version: one}}}}"
    code, _, err = said("check", *words[1:], f"--trainer.logger={csv}")
    assert code == 0, err
    assert not (tmp_path / "csv").exists(), "a check writes to none"
    code, _, err = said(*words, f"--trainer.logger={csv}")
    assert code == 0, err
    header, *rows = (tmp_path / "csv" / "one" / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "val/loss"} <= set(header.split(","))
    assert len(rows) >= 3
    assert "val/loss" in outcome_of(tmp_path / "mlruns" / "default")["metrics"]


@pytest.mark.parametrize("interval", ["null", "step"])
def test_a_monitor_of_rates_sees_those_of_the_steps(
    interval: str, words: list[str], tmp_path: Path
) -> None:
    """The schedule moves every step, which is the monitor's interval unless another is given; its
    values are told before a step, and are of it."""
    monitor = f"{{class_path: LearningRateMonitor, init_args: {{logging_interval: {interval}}}}}"
    every = "--trainer.log_every_n_steps=2"
    code, _, err = said(*words, every, f"--trainer.callbacks+={monitor}")
    assert code == 0, err
    (run,) = (tmp_path / "mlruns" / "default").iterdir()
    history = metric_history(run)
    (name, *_) = (name for name in history if name.startswith("lr-"))
    assert list(history["train/lr"]) == [2, 4, 6, 8]
    assert history[name] == pytest.approx(history["train/lr"])


@pytest.mark.parametrize("limit", ["2", "0.5", "0"])
def test_a_test_is_of_the_whole_test_set(limit: str, tiny: Journey) -> None:
    config, ckpt = f"--config={CONFIGS}/spam.yaml", f"--ckpt_path={tiny.best('spam')}"
    code, _, err = said("test", config, ckpt, *PLAIN, f"--trainer.limit_test_batches={limit}")
    assert code == 2
    assert "a test is of the whole test set" in err


@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("predict", "predict")])
def test_what_would_see_nothing_is_refused(command: str, split: str, tiny: Journey) -> None:
    """As with the options of a fit that was without validation."""
    limit = f"trainer.limit_{split}_batches"
    code, _, err = said(command, f"--ckpt_path={tiny.best('spam')}", f"--{limit}=0")
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: {limit} is 0")


def test_nothing_is_logged_where_nothing_is_to_be(words: list[str], tmp_path: Path) -> None:
    code, _, err = said(*words, "--trainer.log_every_n_steps=0")
    assert code == 0, err
    (run,) = (tmp_path / "mlruns" / "default").iterdir()
    history = metric_history(run)
    assert not [name for name in history if name.startswith(("train/", "perf/tokens", "perf/mod"))]
    assert "val/loss" in history


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


def test_a_mode_that_takes_the_worst_for_the_best_is_told(words: list[str]) -> None:
    stopping = "{class_path: EarlyStopping, init_args: {monitor: val/loss, mode: max}}"
    modes = ["--checkpoints.monitor=val/perplexity", "--checkpoints.mode=max"]
    told = "warning: {} takes the worst {} for the best: its mode is max."
    code, _, err = said("check", *words[1:], *modes, f"--trainer.callbacks+={stopping}")
    assert code == 0, err
    assert told.format("Checkpoints", "val/perplexity") in err.splitlines()
    assert told.format("EarlyStopping", "val/loss") in err.splitlines()
    code, _, err = said("check", *words[1:])
    assert "for the best" not in err


@pytest.fixture
def other(words: list[str], tmp_path: Path) -> Path:
    """The last checkpoint of a run whose best is the one before."""
    code, out, err = said(*words, "--checkpoints.mode=max", "--run.experiment=other")
    assert code == 0, err
    best = Path(out.strip())
    assert best.name == "step-00000004"
    return best.with_name("step-00000008")


def test_a_run_that_begins_in_another_goes_on_from_its_own(
    words: list[str], other: Path, tmp_path: Path
) -> None:
    longer = [f"--ckpt_path={other}", "--trainer.max_steps=14", "--checkpoints.every_n_steps=2"]
    for begins in (other, tmp_path / "mlruns" / "default"):
        code, _, err = said(*words, *longer, *at("Allocate", 14))
        assert code == 2
        (line,) = (line for line in err.splitlines() if line.startswith("resuming from "))
        assert line.startswith(f"resuming from {begins}")
    assert line.endswith("step-00000012")


def test_the_best_of_another_run_is_not_handed_over(words: list[str], other: Path) -> None:
    longer = [f"--ckpt_path={other}", "--trainer.max_steps=10", "--checkpoints.mode=max"]
    code, out, err = said(*words, *longer)
    assert code == 0, err
    assert Path(out.strip()).name == "step-00000010"
    assert Path(out.strip()).is_dir()
    code, _, err = said(*words, f"--ckpt_path={other}")
    assert code == 2
    assert "nothing was trained: the run begins and ends at step 8" in err


def test_what_ended_another_run_does_not_end_this_one(words: list[str], tmp_path: Path) -> None:
    ended = [*at("Stop", 4), "--trainer.max_steps=8", "--run.experiment=ended"]
    code, _, err = said(*words, *ended)
    assert code == 0, err
    last = outcome_of(tmp_path / "mlruns" / "ended")["outputs"]["last"]
    assert last.endswith("step-00000004")
    code, out, err = said(*words, f"--ckpt_path={last}")
    assert code == 0, err
    assert Path(out.strip()).name == "step-00000008"


def test_a_run_whose_time_was_up_before_it_began_is_none(words: list[str], tmp_path: Path) -> None:
    """The clock of the run that it goes on from goes on as well."""
    timed = ["--trainer.max_steps=9999", "--trainer.max_time=00:00:00:01"]
    code, _, err = said(*words, *timed, "--run.experiment=timed")
    assert code == 0, err
    last = outcome_of(tmp_path / "mlruns" / "timed")["outputs"]["last"]
    for _ in range(2):
        code, _, err = said(*words, *timed, f"--ckpt_path={last}")
        assert code == 2, err
        assert "nothing was trained: the run begins and ends at step" in err
        assert "or max_epochs, max_time" in err


def test_another_checkpoint_in_its_place_is_another_run(
    words: list[str], other: Path, tmp_path: Path
) -> None:
    start = shutil.copytree(other, tmp_path / "start")
    longer = [*words, f"--ckpt_path={start}", "--trainer.max_steps=10"]
    first = said(*longer)
    assert first[0] == 0, first
    assert "already finished" in said(*longer)[2]
    shutil.rmtree(start)
    shutil.copytree(other.with_name("step-00000004"), start)
    code, out, err = said(*longer)
    assert code == 0, err
    assert "already finished" not in err
    assert out != first[1]


def test_a_resume_logs_no_validation_that_was_not(words: list[str], tmp_path: Path) -> None:
    words = [*words, "--checkpoints.mode=max", "--trainer.max_steps=10"]
    for changes in ([], ["--data.max_tokens=128"]):
        code, _, err = said(*words, *changes)
        assert code == 0, err
        (run,) = (tmp_path / "mlruns" / "default").iterdir()
        (run / "outcome.json").unlink()  # killed before its end
    lines = [line for line, _ in read_journal(run)]
    metrics = [line for line in lines if line["kind"] == "metric"]
    assert [line["step"] for line in metrics if "val/loss" in line["values"]] == [4, 8]
    params = [line["values"] for line in lines if line["kind"] == "param"]
    assert [values["data.init_args.max_tokens"] for values in params] == ["192", "128"]
