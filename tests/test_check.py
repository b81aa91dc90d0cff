"""`check` reports what `fit` would do, takes a few steps, and leaves nothing behind."""

import gc
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.gpt import GPT
from pipeline.hardware import default_device, used_memory_bytes
from pipeline.runs.run_directory import Run
from pipeline.training.steps import validations
from pipeline.training.trial import N_WARMUP, QUANTILES, Epoch, kept_bytes
from tests.faults.processes import Started, at
from tests.journey import CONFIGS, PLAIN, SHORT, TINY, Journey, said
from tests.training import instruction_data, pretraining_data

MakeGPT = Callable[..., GPT]
FIGURES = {
    "memory": r"memory +([\d.]+) of",
    "time": r"time +([\d,]+) s",
    "steps": r"steps +([\d,]+) ",
    "parameters": r"parameters +([\d,]+),",
    "trained": r"trained ([\d,]+)",
}


def figures(out: str) -> dict[str, float]:
    found = {name: re.search(pattern, out) for name, pattern in FIGURES.items()}
    return {name: float(m[1].replace(",", "")) for name, m in found.items() if m}


def pretraining(tiny: Journey) -> list[str]:
    """The options that the journey's model was pretrained with."""
    return [
        f"--config={CONFIGS}/pretrain.yaml",
        *TINY,
        *PLAIN,
        f"--data.source=[{tiny.folder / 'prose'}]",
        f"--data.tokenizer={tiny.tokenizer}",
        "--data.near_duplicates=null",
        "--run.experiment=pretrain",
    ]


def test_a_check_says_what_fit_would_do_and_leaves_nothing(tiny: Journey, tmp_path: Path) -> None:
    code, out, err = said("check", *pretraining(tiny))
    assert code == 0, err
    model = tiny.outcomes["pretrain"]
    found = figures(out)
    assert found.keys() == FIGURES.keys(), out
    assert found["steps"] == 8
    assert found["parameters"] == found["trained"] > 100_000
    used = used_memory_bytes(default_device()) / 2**30
    assert found["memory"] == pytest.approx(used, rel=0.5)
    assert "2 validations" in out
    assert f"{Path(model['outputs']['best']).parents[1].name}, new" in out
    assert list((tmp_path / "mlruns").iterdir()) == []


def test_validations_of_an_epoch_that_does_not_end_are_foreseen(tiny: Journey) -> None:
    """Eight of its eleven steps, a validation after every second one."""
    words = ("--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=2")
    code, out, err = said("check", *pretraining(tiny), *words)
    assert code == 0, err
    assert "4 validations" in out


@pytest.mark.parametrize("every", [None, 1, 2])
@pytest.mark.parametrize("n_between", [2, 3, 10])
def test_steps_that_are_validated(every: int | None, n_between: int) -> None:
    """By a loop over epochs of ten steps, as Lightning takes them; the last one does not end."""
    expected = []
    for step in range(1, 36):
        epoch, at = (step - 1) // 10 + 1, (step - 1) % 10 + 1
        if every is None:
            is_due = step % n_between == 0
        else:
            is_due = epoch % every == 0 and at % n_between == 0
        expected += [step] if is_due else []
    n_and_last = len(expected), max(expected, default=0)
    assert validations(35, n_between, 10, every) == n_and_last


def test_steps_behind_the_last_validation_are_told(tiny: Journey) -> None:
    words = ("--trainer.val_check_interval=5", "--trainer.max_steps=8")
    code, out, err = said("check", *pretraining(tiny), *words)
    assert code == 0, err
    assert "warning: the last 3 steps come after the last validation, so the best" in out
    assert "warning" not in err


def test_validations_by_the_clock_are_foreseen(tiny: Journey) -> None:
    words = ("--trainer.val_check_interval=00:00:10:00", "--trainer.min_steps=8")
    code, out, err = said("check", *pretraining(tiny), *words)
    assert code == 0, err
    assert "0 validations" in out
    assert "warning: the run ends before its first validation" in out


def test_a_time_that_will_be_up_is_said_and_ends_no_trial(tiny: Journey) -> None:
    words = ("--trainer.max_time=00:00:00:00", "--trainer.max_steps=80000")
    code, out, err = said("check", *pretraining(tiny), *words)
    assert code == 0, err
    assert "not measured" not in out
    assert "warning: time is up after about 0 of 80,000 steps (trainer.max_time)" in out
    _, out, _ = said("check", *pretraining(tiny), "--trainer.max_time=00:01:00:00")
    assert "time is up" not in out


def test_what_a_killed_check_left_is_removed_by_the_next(tiny: Journey, tmp_path: Path) -> None:
    home = tmp_path / "mlruns"
    started = Started(["check", *pretraining(tiny), *at("Hang", 1)], tmp_path / "said.txt")
    started.until(lambda: bool(list(home.glob(".check-*/pretrain/*/hangs"))))
    started.send(signal.SIGKILL)
    started.wait()
    going_on = Run.open(home / ".check-other" / "pretrain" / "pretrain")
    assert len(list(home.glob(".check-*"))) == 2
    code, _, err = said("check", *pretraining(tiny))
    assert code == 0, err
    assert [path.name for path in home.iterdir()] == [".check-other"]
    going_on.fail("only a check")


def test_a_run_that_is_there_already_is_named(
    tiny: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tiny.folder / "mlruns"))
    before = sorted((tiny.folder / "mlruns").rglob("*"))
    code, out, err = said("check", *pretraining(tiny))
    assert code == 0, err
    assert "is finished; fit would do nothing" in out
    assert [p for p in sorted((tiny.folder / "mlruns").rglob("*")) if p not in before] == []


def test_a_check_leaves_damaged_checkpoints_where_they_are(
    tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may be training there."""
    shutil.copytree(tiny.folder / "mlruns" / "pretrain", tmp_path / "pretrain")
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path))
    (outcome,) = tmp_path.glob("pretrain/*/outcome.json")
    outcome.unlink()
    folder = outcome.parent / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    (folder / names[-1] / "model.safetensors").write_bytes(b"")
    code, out, err = said("check", *pretraining(tiny))
    assert code == 0, err
    assert f"{outcome.parent}, new" in out or f"would go on from {names[-2]}" in out
    assert sorted(path.name for path in folder.iterdir()) == names


def test_what_would_be_lost_quietly_is_said(tiny: Journey, tmp_path: Path) -> None:
    """Texts cut, a label that a split lacks, an epoch that is not finished, a long sample."""
    table = tmp_path / "texts.csv"
    names = [a + b for a in "bcdfgh" for b in "aeioulrst"]
    rows = [f"ham,a message of some length about {name} and what happened" for name in names]
    rows += [f"spam,win {word} now" for word in ("gold", "silver")]
    table.write_text("\n".join(["label,text", *rows]) + "\n")
    code, out, err = said(
        "check",
        f"--config={CONFIGS}/spam.yaml",
        *SHORT,
        *PLAIN,
        f"--model.init_from={tiny.best('pretrain')}",
        f"--data.source={table}",
        "--data.max_length=12",
        "--data.max_tokens=10",
        "--data.batch_size=4",
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=1",
    )
    assert code == 0, err
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert any(
        re.search(r"ends after \d\d% of the data \(trainer.max_steps\)", line) for line in warnings
    ), out
    assert any("samples are cut to data.max_length 12" in line for line in warnings)
    assert any(re.search("no (val|test) sample of label spam", line) for line in warnings)
    assert any("12 tokens, which is more than data.max_tokens 10" in line for line in warnings)


def test_the_limit_that_ends_a_run_is_named(tiny: Journey) -> None:
    words = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.max_steps=8")
    code, out, err = said("check", *pretraining(tiny), *words, "--trainer.val_check_interval=3")
    assert code == 0, err
    assert "the run ends after 27% of the data (trainer.limit_train_batches)" in out


def test_what_does_not_fit_is_not_tried(tiny: Journey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.trial.total_memory_bytes", lambda _: 2**20)
    stepped = []
    monkeypatch.setattr("torch.optim.AdamW.step", lambda *_, **__: stepped.append(1))
    code, out, err = said("check", *pretraining(tiny), "--model.optimizer.name=adamw")
    assert code == 0, err
    assert "warning: this needs more memory than there is; lower data.max_tokens" in out
    assert not stepped
    assert "time" not in figures(out)


@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
def test_several_processes_are_refused(tiny: Journey, overlay: str) -> None:
    more = [f"--config={CONFIGS}/trainer/{overlay}.yaml", "--trainer.accelerator=cpu"]
    code, out, err = said("check", *pretraining(tiny), *more)
    assert (code, out) == (2, "")
    assert "error: check measures one process, not 2; leave out" in err


def test_an_epoch_is_what_the_loader_yields(tiny: Journey) -> None:
    data = instruction_data(tiny.tokenizer, max_tokens=300, batch_size=7)
    data.setup("fit")
    epoch = Epoch(data)
    batches = list(data.train_dataloader())
    shapes = [mb["input_ids"].shape for batch in batches for mb in batch]
    real = [
        sum(int(mb.get("attention_mask", torch.ones_like(mb["input_ids"])).sum()) for mb in batch)
        for batch in batches
    ]
    assert epoch.step_tokens.tolist() == real
    assert epoch.n_padded == sum(b * t for b, t in shapes) > epoch.n_tokens
    assert epoch.largest == max(shapes, key=lambda shape: (shape[0] * shape[1], shape[1]))
    assert epoch.largest in [tuple(mb["input_ids"].shape) for mb in batches[epoch.heaviest]]
    assert epoch.n_samples == len(data.train_set)


def test_a_trial_begins_with_the_largest_step_and_sees_all_sizes(tiny: Journey) -> None:
    data = instruction_data(tiny.tokenizer, train_fraction=0.9, batch_size=4)
    data.setup("fit")
    epoch = Epoch(data)
    order = epoch.trial_order()
    steps = order.split(4)
    assert len(order) == epoch.n_samples
    assert torch.equal(steps[0], epoch.keys[epoch.heaviest])
    timed = [int(data.train_lengths(step).sum()) for step in steps[N_WARMUP:][: len(QUANTILES)]]
    # nine quantiles, evenly spaced: their mean is that of the epoch to a few percent
    assert sum(timed) / len(timed) == pytest.approx(epoch.n_tokens / len(epoch.keys), rel=0.05)


def test_what_rows_keep_is_counted_to_the_byte(tiny_gpt: MakeGPT) -> None:
    """Linear in equal rows, as `largest_kept_bytes` takes it to be."""
    model = tiny_gpt("llama").train()

    def kept(n_rows: int) -> int:
        input_ids = torch.zeros((n_rows, 16), dtype=torch.int64)
        return kept_bytes(lambda: model(input_ids).sum(), model)

    assert kept(5) == kept(1) + 4 * (kept(2) - kept(1))
    plain = kept(4)
    model.gradient_checkpointing = True
    assert kept(4) < plain / 3


def test_what_was_counted_is_freed(tiny_gpt: MakeGPT) -> None:
    """Of what a pass keeps, nothing outlives the count."""
    model = tiny_gpt("llama").train()

    def n_states() -> int:
        gc.collect()
        tensors = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
        return sum(tensor.grad_fn is not None for tensor in tensors)

    before = n_states()
    assert kept_bytes(lambda: model(torch.zeros((2, 16), dtype=torch.int64)).sum(), model)
    assert n_states() <= before  # others may be freed meanwhile


def test_lengths_of_blocks_are_known_without_reading_them(tiny: Journey) -> None:
    data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
    data.setup("fit")
    keys = data.train_order()(0)
    assert data.train_lengths(keys).tolist() == [
        len(data.train_set[int(key)]["input_ids"]) for key in keys
    ]


class Ended:
    """A command in a process of its own: what it said, its peak memory, how long it took.

    The peak is read while it runs: `ru_maxrss` would be that of this process, where it is more.
    """

    def __init__(self, *words: str) -> None:
        start = time.perf_counter()
        command = [sys.executable, "-m", "pipeline", *words]
        status, peak_kib = "", 0
        with tempfile.TemporaryFile("w+") as out:
            process = subprocess.Popen(command, stdout=out, text=True)
            while process.poll() is None:
                with suppress(OSError):
                    status = Path(f"/proc/{process.pid}/status").read_text()
                found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
                peak_kib = max(peak_kib, int(found[1]) if found else 0)
                time.sleep(0.1)
            out.seek(0)
            self.out = out.read()
        assert process.returncode == 0
        self.elapsed_s = time.perf_counter() - start
        self.peak_gib = peak_kib / 2**20


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", ["pretrain", "spam", "instruct"])
def test_memory_and_time_are_within_a_quarter_of_what_happens(
    stage: str, tiny: Journey, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configurations of the quickstart; instructions with the published model."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("GPT_PIPELINE_CACHE", str(smollm2.parents[1]))
    words = ["-c", f"{CONFIGS}/{stage}.yaml"]
    if stage == "pretrain":
        tokenizer = str(tmp_path / "tokenizer.json")
        Ended("tokenizer", "train", "-c", f"{CONFIGS}/tokenizer.yaml", "--output", tokenizer)
        words += ["--data.tokenizer", tokenizer]
    elif stage == "spam":
        words += ["--model.init_from", str(tiny.best("pretrain"))]
    else:
        words += ["--model.init_from", "smollm2-135m-instruct", "--data.max_tokens=512"]
        words += ["--trainer.max_steps=40", "--trainer.max_epochs=-1"]
    before = psutil.cpu_percent(interval=2)
    said_before, happened = figures(Ended("check", *words).out), Ended("fit", *words)
    print(said_before, happened.peak_gib, happened.elapsed_s)
    assert said_before["memory"] == pytest.approx(happened.peak_gib, rel=0.25)
    if before > 25:
        pytest.skip(f"others use {before} % of this machine: its times say nothing")
    assert said_before["time"] == pytest.approx(happened.elapsed_s, rel=0.25)
