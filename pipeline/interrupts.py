"""Signals: training finishes its step and saves; a chain waits for its stage to do so, too."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

FORWARDED = {  # signal -> what the child gets
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}

PARENT_VARIABLE = "GPT_PIPELINE_PARENT"  # run directory of the chain that a stage belongs to
_PARENT_PID = "GPT_PIPELINE_PARENT_PID"
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent() -> None:
    """Makes the kernel send this process SIGTERM when its parent ends, even if killed (Linux)."""
    parent = os.environ.pop(_PARENT_PID, None)  # not for this process's own children
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if parent is not None and int(parent) != os.getppid():  # it had ended before
        os.kill(os.getpid(), signal.SIGTERM)


class StopRequest:
    """SIGTERM, or Ctrl-C, while a model is trained; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None  # the one received

    def listen(self) -> None:
        """Handles both signals from now on; one that is ignored (nohup) stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        # not print(): a handler may interrupt one
        os.write(2, b"\nstopping after this step, which is saved; Ctrl-C again stops at once\n")


class Child:
    """Runs one subprocess after the other; inside its `with` block it forwards signals to them.

    Each child has a process group of its own: Ctrl-C reaches it once, through here. Signals that
    are ignored (nohup) stay ignored; outside the main thread nothing is forwarded.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # the last one; once there is one, nothing is started
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Child:
        if threading.current_thread() is threading.main_thread():
            for number in FORWARDED:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, words: Sequence[str], environment: Mapping[str, str]) -> int:
        """Exit code of a command without stdin; 128 + n, as in shells, where signal n ended it."""
        if self.signal is not None:
            return 128 + self.signal
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            env={**environment, _PARENT_PID: str(os.getpid())},
            process_group=0,
        )
        if self.signal is not None:  # received while the child was starting
            self._forward(self.signal)
        exit_code = self._process.wait()
        return exit_code if exit_code >= 0 else 128 - exit_code

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._forward(number)

    def _forward(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(FORWARDED[signal.Signals(number)])
