"""Threads that hold up nobody who ends the process, as those of `ThreadPoolExecutor` do."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """Pieces of work, begun in the order in which they come, by as many threads as are given."""

    def __init__(self, name: str, n_threads: int = 1) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._n_threads = n_threads
        for _ in range(n_threads):
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Does it when a thread is free."""
        future: Future[T] = Future()
        self._work.put((future, partial(fn, *args, **kwargs)))
        return future

    def run(self, fn: Callable[..., T], /, *args: Any) -> T:
        """The same, waited for; a look every half second, as a lock can miss Ctrl-C."""
        future = self.submit(fn, *args)
        while not future.done():
            wait([future], timeout=0.5)
        return future.result()

    def close(self) -> None:
        """Has the threads end, when what was given to them is done; nobody waits for it."""
        for _ in range(self._n_threads):
            self._work.put(None)

    def _run(self) -> None:
        while given := self._work.get():
            future, work = given
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # whoever waits for the result gets it
                    future.set_exception(error)
