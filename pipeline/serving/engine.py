"""One thread runs the model for all requests: they wait, join the batch, and leave it."""

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

READ_AT_A_TIME = 256  # prompt tokens that are prefilled between two decoding steps
READ_ALONE = 1024  # the same for one prompt while nothing is being decoded
READ_TOGETHER = 4096  # and for several; new or cancelled requests go unnoticed meanwhile


class EngineError(Exception):
    """The engine could not complete a request."""


class Busy(EngineError):
    """Too many requests are waiting already."""


class Piece(NamedTuple):
    """What a step adds to a request's text."""

    token: int | None  # the new one, if any
    ended: Literal["stop", "length"] | EngineError | None  # why it ended; None while it goes on
    n_cached: int = 0  # prompt tokens that were not computed for it; only in the first piece
    logprobs: Sequence[TokenLogprob] = ()  # as in `Row`


@dataclass(frozen=True)
class Limits:
    """How much is done at a time; this decides memory and waiting times, but not the texts."""

    max_rows: int  # texts generated at a time; the prefix cache keeps as many finished ones
    max_tokens: int  # of all these; each text being generated counts as long as the longest
    max_waiting: int = 256  # texts in the queue; more are refused

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{key} is {value}; give at least 1.")


@dataclass(eq=False)
class Request:
    """A text to generate."""

    prompt: Sequence[int]
    settings: Sampling
    deliver: Callable[[Piece], None]  # called in the engine's thread
    row: Row | None = None  # its place in the batch, once it has one
    n_read: int = 0  # prompt tokens that were prefilled before it had one
    is_cancelled: bool = False


class Engine:
    """Generates many texts at a time in a worker's thread, which it occupies until it is closed.

    Requests join the batch between two steps, in their order of arrival, as soon as there is room.
    A long prompt is prefilled in pieces, so that the others go on meanwhile (chunked prefill,
    Agrawal et al. 2023), and so that the rest is skipped if its client disconnects.
    """

    def __init__(self, worker: Workers, model: GPT, limits: Limits) -> None:
        self.limits, self.block_size = limits, model.config.block_size
        self._new_batch = lambda: Batch(model, PrefixCache(limits.max_rows))
        self._batch = self._new_batch()
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._closing = False
        self._changed = threading.Condition()  # guards _waiting and _closing
        self.ended = worker.submit(self._run)  # done after an error, or when closed

    def submit(
        self, prompt: Sequence[int], settings: Sampling, deliver: Callable[[Piece], None]
    ) -> Request:
        """Queues a text to generate.

        ValueError if it does not fit, Busy if too many are waiting, EngineError after the end.
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
        """Cancels a request; nothing more is delivered to it from the next step on."""
        request.is_cancelled = True

    def close(self) -> None:
        """Ends after the current step; unfinished requests are delivered an error."""
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
        """Waits for work; false if the thread is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self._running)
            return not self._closing

    def _advance(self) -> None:
        """Lets waiting requests that fit join the batch, then runs a step of all its rows."""
        for request in [r for r in self._running if r.is_cancelled]:  # other threads set it
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
        """Requests that join now; one with a long prompt only gets its next piece prefilled."""
        admitted: list[Request] = []
        at_a_time, left = READ_ALONE, READ_TOGETHER
        if self._running:
            at_a_time = left = READ_AT_A_TIME
        while request := self._first():
            is_whole = request.settings.echo
            n_unread = len(request.prompt) if is_whole else self._batch.n_unread(request.prompt)
            if admitted and n_unread > min(left, at_a_time):
                break
            free = self._free([*self._running, request])  # the pieces must stay cached
            if n_unread > at_a_time and not is_whole and len(request.prompt) <= free:
                self._batch.prefixes.shrink(free - at_a_time)
                try:
                    self._batch.read(request.prompt, at_a_time)
                except Exception:
                    self._take_first()  # gets the error, and is not retried forever
                    raise
                request.n_read += at_a_time
                break
            self._take_first()
            admitted.append(request)
            left -= n_unread
        for request in admitted:
            self._batch.prefixes.find(request.prompt)  # makes its prefix the last to be dropped
        self._batch.prefixes.shrink(self._free(self._running))
        return admitted

    def _first(self) -> Request | None:
        """The request that has waited longest, if there is room for it."""
        with self._changed:
            while self._waiting and self._waiting[0].is_cancelled:
                self._waiting.popleft()
            first = self._waiting[0] if self._waiting else None
        return first if first and self._fits([*self._running, first]) else None

    def _take_first(self) -> None:
        with self._changed:
            self._running.append(self._waiting.popleft())

    def _free(self, requests: list[Request]) -> int:
        """Tokens that the prefix cache may hold beside these requests."""
        return self.limits.max_tokens - max(self._room(requests), self._batch.n_tokens)

    def _fits(self, requests: list[Request]) -> bool:
        is_room = self._room(requests) <= self.limits.max_tokens
        return is_room and len(requests) <= self.limits.max_rows

    def _room(self, requests: list[Request]) -> int:
        """Tokens to have memory for: every row takes as much as the longest."""
        wanted = [len(r.prompt) + r.settings.max_new_tokens for r in requests]
        return len(requests) * min(max(wanted, default=0), self.block_size)

    def _give_up(self, why: str) -> None:
        for request in self._running:
            request.deliver(Piece(None, EngineError(why)))
        self._running, self._batch = [], self._new_batch()


def _newest(row: Row) -> Piece:
    return Piece(row.token, row.ended, logprobs=row.logprobs)
