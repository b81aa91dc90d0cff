"""Worker threads that, unlike those of `ThreadPoolExecutor`, do not keep the process alive."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """A pool of `n_threads` daemon threads that start calls in the order of submission."""

    def __init__(self, name: str, n_threads: int = 1) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._n_threads = n_threads
        for _ in range(n_threads):
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Schedules a call for when a thread is free."""
        future: Future[T] = Future()
        self._work.put((future, partial(fn, *args, **kwargs)))
        return future

    def run(self, fn: Callable[..., T], /, *args: Any) -> T:
        """Submits a call and waits for it; wakes every half second, as a lock can miss Ctrl-C."""
        future = self.submit(fn, *args)
        while not future.done():
            wait([future], timeout=0.5)
        return future.result()

    def close(self) -> None:
        """Ends the threads after all submitted calls, without waiting for them."""
        for _ in range(self._n_threads):
            self._work.put(None)

    def _run(self) -> None:
        while given := self._work.get():
            future, work = given
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # raised by `result`
                    future.set_exception(error)
