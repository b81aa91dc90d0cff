"""Work beside training, in a thread of its own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """Pieces of work, done one after the other while the caller goes on.

    After a failure, later tasks are skipped until the error was raised. The process waits for
    the work before it ends.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._last: Future[None] | None = None

    def add(self, work: Callable[[], object]) -> None:
        """Does a piece after those before it."""
        before = self._last

        def after_those() -> None:
            if before is not None:
                before.result()
            work()

        self._last = self._thread.submit(after_those)

    def check(self) -> None:
        """Raises the error of a piece that failed, if it is known by now."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Waits until all is done; raises the error of a piece that failed."""
        if last := self._last:
            wait([last])
            self._last = None
            last.result()
