"""Commands to be killed, in processes forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "pipeline.cli",
        "pipeline.mlflow_replica",
        "pipeline.lit_language_model",
        "datamodules.pretraining",
        "peft",
    ]
)
PATIENCE_S = 240  # of a machine that does much else


class Started:
    """A running command; what it writes goes to a file."""

    def __init__(
        self, words: Sequence[str], output: Path, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.output = output
        arguments = ([str(word) for word in words], dict(environment), output)
        self.process: Any = PROCESSES.Process(target=_command, args=arguments)
        self.process.start()

    def send(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Its exit code; -n where signal n ended it."""
        self.process.join(PATIENCE_S)
        assert self.process.exitcode is not None, f"it hangs:\n{self.said()}"
        return int(self.process.exitcode)

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


def _command(words: list[str], environment: dict[str, str], output: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    from pipeline.__main__ import main

    sys.exit(main(words))


class Hang(pl.Callback):
    """Stays in a step for ever, once the file that it writes there is removed no more."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step + 1 == self.step:
            (Path(trainer.default_root_dir) / "hangs").touch()
            time.sleep(10 * PATIENCE_S)
