"""One thread runs the model for all who ask: requests wait, join the batch, and leave it."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.decoding.generate import Batch, Row
from pipeline.decoding.logprobs import TokenLogprob
from pipeline.decoding.passes import check_prompt
from pipeline.decoding.prefix_cache import PrefixCache
from pipeline.decoding.sampling import Sampling
from pipeline.failures import is_out_of_memory
from pipeline.gpt import GPT
from pipeline.workers import Workers

READ_AT_A_TIME = 256  # tokens of prompts that are computed between two steps of other texts
READ_ALONE = 1024  # likewise of one prompt, where nothing else is written
READ_TOGETHER = 4096  # of several: who comes or hangs up meanwhile is not seen


class EngineError(Exception):
    """The model could not go on with a request."""


class Busy(EngineError):
    """Too many requests are waiting already."""


class Piece(NamedTuple):
    """What became of a request in a step."""

    token: int | None  # one more, if any
    ended: Literal["stop", "length"] | EngineError | None  # why no more come; None while they do
    n_cached: int = 0  # tokens of the prompt that were not computed for it; with the first piece
    logprobs: Sequence[TokenLogprob] = ()  # as `Row` has them


@dataclass(frozen=True)
class Limits:
    """How much is done at a time; it decides memory and waiting, and no answer."""

    max_rows: int  # written at the same time; as many that ended are kept, for those begun alike
    max_tokens: int  # that all of them hold, the longest one's room counted for each being written
    max_waiting: int = 256  # texts; more are turned away

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{key} is {value}; give at least 1.")


@dataclass(eq=False)
class Request:
    """A text to be written."""

    prompt: Sequence[int]
    settings: Sampling
    deliver: Callable[[Piece], None]  # called in the engine's thread
    row: Row | None = None  # its place in the batch, once it has one
    n_read: int = 0  # tokens that were computed before it had one
    is_cancelled: bool = False


class Engine:
    """Writes many texts at a time, in the thread of a worker, which it keeps until it is closed.

    Whoever comes is taken into the batch between two steps, in the order of coming, as soon as
    there is room. A long prompt is read in pieces, so that the others go on meanwhile (chunked
    prefill, Agrawal et al. 2023), and no more of it than is wanted if its reader hangs up.
    """

    def __init__(self, worker: Workers, model: GPT, limits: Limits) -> None:
        self.limits, self.block_size = limits, model.config.block_size
        self._new_batch = lambda: Batch(model, PrefixCache(limits.max_rows))
        self._batch = self._new_batch()
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._closing = False
        self._changed = threading.Condition()  # guards _waiting and _closing
        self.ended = worker.submit(self._run)  # done by an error, or when it is closed

    def submit(
        self, prompt: Sequence[int], settings: Sampling, deliver: Callable[[Piece], None]
    ) -> Request:
        """Asks for a text.

        ValueError for one that does not fit, Busy where too many wait, EngineError at the end.
        """
        check_prompt(len(prompt), self.block_size)
        request = Request(prompt, settings, deliver)
        if not self._fits([request]):
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and may get {settings.max_new_tokens} more, "
                f"but there is room for {self.limits.max_tokens}; ask for fewer, or start the "
                "server with more --max_tokens."
            )
        with self._changed:
            if self._closing:
                raise EngineError("the server has ended.")
            n_waiting = sum(not request.is_cancelled for request in self._waiting)
            if n_waiting >= self.limits.max_waiting:
                raise Busy(f"{n_waiting} texts are waiting; try again later.")
            self._waiting.append(request)
            self._changed.notify()
        return request

    def cancel(self, request: Request) -> None:
        """Gives a request up; nothing more is delivered to it from the next step on."""
        request.is_cancelled = True

    def close(self) -> None:
        """Comes to an end after the step at hand; whoever is not done is told so."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        wait([self.ended])

    def _run(self) -> None:
        try:
            while self._has_work():
                try:
                    self._advance()
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    self._give_up("out of memory; ask for less, or start with fewer --max_tokens.")
        finally:
            with self._changed:
                self._closing = True
                self._running += self._waiting
                self._waiting.clear()
            self._give_up("the server has ended.")

    def _has_work(self) -> bool:
        """Waits for some; false where the thread is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self._running)
            return not self._closing

    def _advance(self) -> None:
        """Takes in who waits and fits; then everybody in the batch gets a step."""
        for request in [r for r in self._running if r.is_cancelled]:  # looked at once
            self._running.remove(request)
            if request.row:
                self._batch.leave(request.row)
        if new := self._admit():
            settings = [request.settings for request in new]
            rows = self._batch.join([request.prompt for request in new], settings)
            for request, row in zip(new, rows, strict=True):
                request.row = row
                n_cached = max(row.n_cached - request.n_read, 0)
                request.deliver(_newest(row)._replace(n_cached=n_cached))
        self._running = [r for r in self._running if r.row and r.row.ended is None]
        if self._running:
            self._batch.step()
            for request in self._running:
                assert request.row
                request.deliver(_newest(request.row))
        self._running = [r for r in self._running if r.row and r.row.ended is None]

    def _admit(self) -> list[Request]:
        """Who waited and has a place now; beside others in pieces, of which this reads one."""
        admitted: list[Request] = []
        at_a_time, left = READ_ALONE, READ_TOGETHER
        if self._running:
            at_a_time = left = READ_AT_A_TIME
        while request := self._first():
            is_whole = request.settings.echo
            n_unread = len(request.prompt) if is_whole else self._batch.n_unread(request.prompt)
            if admitted and n_unread > min(left, at_a_time):
                break
            free = self._free([*self._running, request])  # then: what is read has to stay
            if n_unread > at_a_time and not is_whole and len(request.prompt) <= free:
                self._batch.prefixes.shrink(free - at_a_time)
                try:
                    self._batch.read(request.prompt, at_a_time)
                except Exception:
                    self._take_first()  # is told of it, and not tried for ever
                    raise
                request.n_read += at_a_time
                break
            self._take_first()
            admitted.append(request)
            left -= n_unread
        for request in admitted:
            self._batch.prefixes.find(request.prompt)  # what it begins with is given up last
        self._batch.prefixes.shrink(self._free(self._running))
        return admitted

    def _first(self) -> Request | None:
        """Who has waited longest, if there is room."""
        with self._changed:
            while self._waiting and self._waiting[0].is_cancelled:
                self._waiting.popleft()
            first = self._waiting[0] if self._waiting else None
        return first if first and self._fits([*self._running, first]) else None

    def _take_first(self) -> None:
        with self._changed:
            self._running.append(self._waiting.popleft())

    def _free(self, requests: list[Request]) -> int:
        """Tokens of texts that may be kept beside those that are written, and to be written."""
        return self.limits.max_tokens - max(self._room(requests), self._batch.n_tokens)

    def _fits(self, requests: list[Request]) -> bool:
        is_room = self._room(requests) <= self.limits.max_tokens
        return is_room and len(requests) <= self.limits.max_rows

    def _room(self, requests: list[Request]) -> int:
        """Tokens that there is to be memory for; a row has as much as the longest."""
        wanted = [len(r.prompt) + r.settings.max_new_tokens for r in requests]
        return len(requests) * min(max(wanted, default=0), self.block_size)

    def _give_up(self, why: str) -> None:
        for request in self._running:
            request.deliver(Piece(None, EngineError(why)))
        self._running, self._batch = [], self._new_batch()


def _newest(row: Row) -> Piece:
    return Piece(row.token, row.ended, logprobs=row.logprobs)
