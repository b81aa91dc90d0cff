"""Runs commands that tests can kill, in processes forked from one that has imported everything."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from pipeline import checkpoint as files
from tests.journey import ROOT

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "pipeline.cli",
        "pipeline.runs.mlflow_replica",
        "pipeline.training.lit_language_model",
        "datamodules.pretraining",
        "mlflow.store.tracking.sqlalchemy_store",
        "peft",
    ]
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
PATIENCE_S = 240  # of a machine that does much else


class Started:
    """A running command; what it writes goes to a file.

    Its data workers start as they do in this Python, or else as `workers` says.
    """

    def __init__(
        self,
        words: Sequence[str],
        output: Path,
        environment: Mapping[str, str] = os.environ,
        *,
        workers: str | None = None,
    ) -> None:
        self.output = output
        arguments = ([str(word) for word in words], dict(environment), output, workers)
        self.process: Any = PROCESSES.Process(target=_command, args=arguments)
        self.process.start()

    def send(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Its exit code; -n where signal n ended it."""
        self.process.join(PATIENCE_S)
        code = self.process.exitcode
        self.process.kill()  # one that hangs would keep the tests from ending
        assert code is not None, f"it hangs:\n{self.said()}"
        return int(code)

    def said(self) -> str:
        """What it has written so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that it brings about."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.is_alive(), f"it ended with {self.process.exitcode}:\n{self.said()}"
            assert time.monotonic() < end, f"waited in vain:\n{self.said()}"
            time.sleep(0.005)


def at(callback: str, step: int) -> list[str]:
    """Options that add one of the callbacks below."""
    name = f"tests.faults.processes.{callback}"
    return [f"--trainer.callbacks+={name}", f"--trainer.callbacks.step={step}"]


def _command(
    words: list[str], environment: dict[str, str], output: Path, workers: str | None
) -> None:
    multiprocessing.set_start_method(workers, force=True)  # else as this process was started
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    from pipeline.__main__ import main

    sys.exit(main(words))


def start(words: Sequence[str], home: Path, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A command as a shell starts it: where processes start others, forking does not do."""
    environment = {**os.environ, "GPT_PIPELINE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, *launcher, "-m", "pipeline", *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and what it wrote to stderr."""
    try:
        _, errors = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, errors


class At(pl.Callback):
    """Does something in a step, after its gradients are there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step + 1 == self.step:
            self.act(trainer, module)

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        raise NotImplementedError


class Hang(At):
    """Stays in the step for long, and writes a file there."""

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        (Path(trainer.default_root_dir) / "hangs").touch()
        end = time.monotonic() + 10 * PATIENCE_S
        while time.monotonic() < end:  # a signal just before a sleep is answered after it
            time.sleep(0.02)


class Pause(At):
    """Stays in the step until `go_on` is called."""

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        folder = Path(trainer.default_root_dir)
        (folder / f"pauses-{self.step}").touch()
        while not (folder / f"goes-on-{self.step}").exists():
            time.sleep(0.02)


def pauses(home: Path, step: int) -> bool:
    """Whether the run below a folder has come to a `Pause`."""
    return bool(list(home.glob(f"default/*/pauses-{step}")))


def go_on(home: Path, step: int) -> None:
    """Ends a `Pause`."""
    (path,) = home.glob(f"default/*/pauses-{step}")
    path.with_name(f"goes-on-{step}").touch()


class HangInSave(At):
    """The next save writes one file and stays there for ever, the first time that it is used."""

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        hangs = Path(trainer.default_root_dir) / "hangs"

        def write_one(draft: Path, writers: files.Writers) -> Any:
            name = min(writers)
            writers[name](draft / name)
            hangs.touch()
            time.sleep(10 * PATIENCE_S)

        if not hangs.exists():
            files.write_files = write_one


class SlowSave(At):
    """Saves take two seconds from here on."""

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        write = files.write_files

        def write_slowly(draft: Path, writers: files.Writers) -> Any:
            time.sleep(2)
            return write(draft, writers)

        files.write_files = write_slowly


class HangInReport(At):
    """Stays for ever in what is made of a trained model, the first time that it is made."""

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        from pipeline import cli

        reports = Path(trainer.default_root_dir) / "reports"

        def hang(*args: Any) -> Any:
            reports.touch()
            time.sleep(10 * PATIENCE_S)

        if not reports.exists():
            cli.report_fit = hang  # type: ignore[assignment]


class LoseFolder(At):
    """Puts a file where the folder of checkpoints was."""

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        folder = Path(trainer.default_root_dir) / files.CHECKPOINTS
        if folder.is_dir():
            folder.rename(folder.with_name("away"))
        folder.touch()


class Allocate(At):
    """Asks for more memory than there is."""

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        torch.empty(1 << 48)


class RemoveSource(At):
    """Removes the files that were trained on."""

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        for name in module.data.fingerprint["sources"]:
            Path(name).unlink()


class ChangeSource(At):
    """Adds a line to the files that are trained on."""

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        for name in module.data.fingerprint["sources"]:
            with Path(name).open("a") as file:
                file.write("One more line.\n")


class Diverge(At):
    """Makes the loss of a step, and of those after it, no number."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step + 1 == self.step:
            module.loss_sum = lambda batch: torch.nan * type(module).loss_sum(module, batch)

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        """The guard has to see it first."""


class Spike(At):
    """Makes the loss of one step a hundred times what it is."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step + 1 == self.step:
            module.loss_sum = lambda micro_batch: 100 * type(module).loss_sum(module, micro_batch)

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        del module.loss_sum


class Stop(At):
    """Asks Lightning to end the run, as early stopping does."""

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        trainer.should_stop = True


class Infinite(At):
    """Makes a gradient of the step infinite, in one process alone."""

    def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.is_global_zero and trainer.global_step + 1 == self.step:
            next(p for p in module.parameters() if p.grad is not None).grad.fill_(torch.inf)

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        """The guard has to see it first."""


class Ids(pl.Callback):
    """Writes which samples each process trained on in each step, and what it drew by."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        ids = [i for micro_batch in batch for i in micro_batch["sample_ids"].tolist()]
        seed = torch.initial_seed()
        line = json.dumps({"step": trainer.global_step, "ids": ids, "seed": seed})
        path = Path(trainer.default_root_dir) / f"ids-{trainer.global_rank}.jsonl"
        with path.open("a") as file:
            file.write(line + "\n")
        time.sleep(0.05)  # so that a signal can come in between
