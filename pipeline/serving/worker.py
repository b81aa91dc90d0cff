"""The one thread that runs a model."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """Runs and loads a model, one piece of work after the other, in one thread.

    OpenMP has threads for every thread that computes. Where that makes more of them than there are
    cores they sleep between any two operations: a step of decoding then takes 1.3 times as long.
    Other than those of `ThreadPoolExecutor`, this thread holds up nobody who ends the process.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name="model", daemon=True).start()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Does it when what came before is done."""
        future: Future[T] = Future()
        self._work.put((future, partial(fn, *args, **kwargs)))
        return future

    def run(self, fn: Callable[..., T], /, *args: Any) -> T:
        """The same, waited for; a look every half second, as a lock can miss Ctrl-C."""
        future = self.submit(fn, *args)
        while not future.done():
            wait([future], timeout=0.5)
        return future.result()

    def _run(self) -> None:
        while True:
            future, work = self._work.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # whoever waits for the result gets it
                    future.set_exception(error)
