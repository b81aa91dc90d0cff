"""Decoding with a KV cache: continuous batching of many rows, and beam search.

Shapes: B rows, T tokens, V vocabulary; L, G, N and D as in `kv_cache.py`.
"""

from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.decoding.guessing import guess
from pipeline.decoding.kv_cache import KVCache
from pipeline.decoding.logprobs import TokenLogprob, prompt_logprobs, token_logprobs
from pipeline.decoding.passes import Prefilled, decode, prefill
from pipeline.decoding.prefix_cache import PrefixCache, common_length
from pipeline.decoding.sampling import Sampling, choose
from pipeline.gpt import GPT

JOIN_SHARE = 4  # rows join once one place in so many is free, as prefilling single rows is costly


@dataclass(eq=False)
class Row:
    """A text that is being generated."""

    settings: Sampling
    ids: list[int]  # its tokens so far, the prompt's included
    limit: int  # maximum length: its own, or that of the context
    n_cached: int  # tokens of the prompt whose keys and values were reused
    token: int | None = None  # the newest; None after a stop token
    ended: Literal["stop", "length"] | None = None  # why; None while it goes on
    # if the settings ask for them, those of the newest token, even a stop token; at first, with
    # `echo`, those of the prompt come before it
    logprobs: list[TokenLogprob] = field(default_factory=list)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.settings.seed)

    def take(self, token: int) -> None:
        """Appends a token, or ends the row."""
        if token in self.settings.stop_ids:
            self.token, self.ended = None, "stop"
            return
        self.token = token
        self.ids.append(token)
        if len(self.ids) == self.limit:
            self.ended = "length"


class Batch:
    """Rows that get one token each per step; rows join and leave between steps.

    Continuous batching (Yu et al. 2022). A row's tokens do not depend on the other rows. For a row
    that is alone the next tokens are guessed, so that some steps cost nothing. `prefixes` keeps the
    texts of rows that leave, for prompts with the same beginning. Puts the model into eval mode.
    """

    def __init__(self, model: GPT, prefixes: PrefixCache | None = None) -> None:
        self.model, self.prefixes = model, prefixes or PrefixCache(0)
        self.rows: list[Row] = []  # those not ended
        self._cache: KVCache | None = None  # of `rows`, in their order
        self._ahead: deque[tuple[int, Tensor]] = deque()  # guesses, and logits (1, V) after each

    @property
    def n_tokens(self) -> int:
        """Tokens that the cache has memory for, over all rows."""
        return 0 if self._cache is None else self._cache.n_tokens

    @torch.inference_mode()
    def join(self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling]) -> list[Row]:
        """Adds a row per prompt, of any lengths, and returns them, each with its first token.

        Each has settings of its own, without beams. ValueError for a prompt that is empty, or that
        fills the context.
        """
        different = list(dict.fromkeys(map(tuple, prompts)))
        places = [different.index(tuple(prompt)) for prompt in prompts]
        whole = {place for place, own in zip(places, settings, strict=True) if own.echo}
        read, n_known = self._read(different, whole)
        if len(different) < len(prompts):
            read.cache.keep(torch.tensor(places, device=read.logits.device))
        new = []
        for i, (prompt, own, place) in enumerate(zip(prompts, settings, places, strict=True)):
            limit = min(len(prompt) + own.max_new_tokens, self.model.config.block_size)
            n_cached = len(prompt) - 1 if place in places[:i] else n_known[place]
            new.append(Row(own, [*prompt], limit, n_cached))
        _take(new, read.logits[places])
        for row, prompt, place in zip(new, prompts, places, strict=True):
            if row.settings.echo:
                n_best = row.settings.n_likeliest or 0
                row.logprobs[:0] = prompt_logprobs(self.model, read.hidden[place], prompt, n_best)
        if self._cache is None:
            self._cache = read.cache
        else:
            self._cache.append(read.cache)
        self._ahead.clear()
        self.rows += new
        self._keep(row for row in self.rows if row.ended is None)
        return new

    def n_unread(self, prompt: Sequence[int]) -> int:
        """Tokens of a prompt that would have to be computed if it joined now."""
        kv = self._known(prompt[:-1])
        return len(prompt) - (0 if kv is None else kv.shape[3])

    @torch.inference_mode()
    def read(self, prompt: Sequence[int], n_tokens: int) -> None:
        """Prefills `n_tokens` of a prompt's unread tokens, not all, for when it joins."""
        kv = self._known(prompt[:-1])
        n_read = n_tokens + (0 if kv is None else kv.shape[3])
        cache = prefill(self.model, [prompt[:n_read]], [kv]).cache
        self.prefixes.add(prompt[:n_read], cache.text(0, n_read))

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Gives every row one more token, or ends it at a stop token; returns these rows."""
        assert self._cache is not None, "a step needs rows"
        rows = [*self.rows]
        _take(rows, self._next_logits(self._cache))
        self._keep(row for row in rows if row.ended is None)
        return rows

    def _next_logits(self, cache: KVCache) -> Tensor:
        """Logits (B, V) after the newest tokens: known from a correct guess, or computed."""
        if self._ahead:
            guessed, logits = self._ahead.popleft()
            if guessed == self.rows[0].ids[-1]:
                return logits
            self._ahead.clear()
        tokens = [row.ids[-1:] for row in self.rows]
        if len(self.rows) == 1:
            (row,) = self.rows
            tokens[0] += guess(row.ids, row.limit - len(row.ids) - 1)
        places = [len(row.ids) - 1 for row in self.rows]
        logits = decode(self.model, tokens, places, cache)  # (B, T, V)
        self._ahead.extend(zip(tokens[0][1:], logits.unbind(1)[1:], strict=True))
        return logits[:, 0]

    @torch.inference_mode()
    def leave(self, row: Row) -> None:
        """Removes a row that has not ended."""
        self._keep(other for other in self.rows if other is not row)

    def _read(
        self, prompts: Sequence[tuple[int, ...]], whole: Container[int]
    ) -> tuple[Prefilled, list[int]]:
        """Prefills distinct prompts, those in `whole` entirely; also counts the known tokens."""
        known = [None if i in whole else self._known(ids[:-1]) for i, ids in enumerate(prompts)]
        n_known = [0 if kv is None else kv.shape[3] for kv in known]
        shared = common_length(min(prompts), max(prompts)) * (len(prompts) - 1)
        if shared > sum(n_known):  # computed once for all rows, but only in an empty cache
            known, n_known = [], [0] * len(prompts)
        return prefill(self.model, prompts, known), n_known

    def _known(self, ids: Sequence[int]) -> Tensor | None:
        """Keys and values (L, 2, G, N, D) of the longest known prefix of a text."""
        kv = self.prefixes.find(ids)
        best = 0 if kv is None else kv.shape[3]
        for i, row in enumerate(self.rows):
            if (n_tokens := common_length(ids, row.ids[:-1])) > best:
                assert self._cache is not None
                kv, best = self._cache.text(i, n_tokens), n_tokens
        return kv

    def _keep(self, rows: Iterable[Row]) -> None:
        kept = set(rows)
        if len(kept) == len(self.rows):
            return
        assert self._cache is not None
        for i in reversed(range(len(self.rows))):
            if (row := self.rows[i]) not in kept:  # its newest token may not be cached
                self.prefixes.add(row.ids[:-1], self._cache.text(i, len(row.ids) - 1))
                self._cache.drop(i)
                self.rows[i] = self.rows[-1]
                self.rows.pop()
        if self.rows:
            self._cache.fit(max(len(row.ids) for row in self.rows))
        else:
            self._cache = None


def _take(rows: list[Row], logits: Tensor) -> None:
    chosen = choose(logits, [row.settings for row in rows], [row.generator for row in rows])
    for i, (row, token) in enumerate(zip(rows, chosen, strict=True)):
        if row.settings.n_likeliest is not None:
            row.logprobs = token_logprobs(logits[i : i + 1], [token], row.settings.n_likeliest)
        row.take(token)


def generate(model: GPT, prompts: Sequence[Sequence[int]], settings: Sampling) -> list[list[int]]:
    """New token ids of every prompt, without the stop token; without beams they are one batch."""
    if settings.num_beams > 1:
        return [beam_search(model, prompt, settings) for prompt in prompts]
    done = generate_each(model, prompts, settings, max_rows=len(prompts))
    return [ids for _, ids in sorted(done)]


def generate_each(
    model: GPT, prompts: Sequence[Sequence[int]], settings: Sampling, *, max_rows: int
) -> Iterator[tuple[int, list[int]]]:
    """Yields index and new token ids of every prompt, without the stop token, as each is done.

    At most `max_rows` are decoded at a time, the first ones first; row i samples with seed + i.
    ValueError for a prompt that is empty or fills the context.
    """
    batch = Batch(model)
    waiting = deque(enumerate(prompts))
    numbers: dict[Row, int] = {}
    while waiting or batch.rows:
        n_places = min(max_rows - len(batch.rows), len(waiting))
        if n_places and n_places >= min(max_rows // JOIN_SHARE, len(waiting)):
            places, new = zip(*(waiting.popleft() for _ in range(n_places)), strict=True)
            moved = batch.join(new, [replace(settings, seed=settings.seed + i) for i in places])
            numbers |= dict(zip(moved, places, strict=True))
        else:
            moved = batch.step()
        for row in moved:
            if row.ended:
                i = numbers.pop(row)
                yield i, row.ids[len(prompts[i]) :]


@torch.inference_mode()
def beam_search(model: GPT, prompt: Sequence[int], settings: Sampling) -> list[int]:
    """The likeliest continuation found, by mean log-probability per token, stop token included."""
    cache, logits, _ = prefill(model, [prompt])
    n_new = min(settings.max_new_tokens, model.config.block_size - len(prompt))
    scores = logits.log_softmax(dim=-1)  # (beams, V) nats of the whole continuation
    beams: list[list[int]] = [[]]
    finished: list[tuple[float, list[int]]] = []
    for n_tokens in range(1, n_new + 1):
        stopping, going = _steps(scores, settings)
        finished += [(step.nats / n_tokens, beams[step.beam]) for step in stopping]
        beams = [[*beams[step.beam], step.token] for step in going]
        if n_tokens == n_new:
            finished += [(going[i].nats / n_new, beam) for i, beam in enumerate(beams)]
        # no beam can end with a higher mean than if all that follows were certain
        if not going or (finished and max(finished)[0] >= going[0].nats / n_new):
            break
        cache.keep(torch.tensor([step.beam for step in going], device=logits.device))
        tokens, places = [[step.token] for step in going], [len(prompt) + n_tokens - 1] * len(going)
        logits = decode(model, tokens, places, cache)[:, 0]
        so_far = torch.tensor([step.nats for step in going], device=logits.device)
        scores = so_far[:, None] + logits.log_softmax(dim=-1)
    return max(finished)[1]


class _Step(NamedTuple):
    nats: float  # of the whole continuation
    beam: int  # that it extends
    token: int


def _steps(scores: Tensor, settings: Sampling) -> tuple[list[_Step], list[_Step]]:
    """The likeliest next steps, best first, by the nats (beams, V) of every continuation.

    Returns:
        Those that stop, and num_beams that go on.
    """
    # enough for num_beams to go on, however many stop here
    n_candidates = settings.num_beams * (1 + len(settings.stop_ids))
    values, places = scores.flatten().topk(min(n_candidates, scores.numel()))
    stopping: list[_Step] = []
    going: list[_Step] = []
    for nats, place in zip(values.tolist(), places.tolist(), strict=True):
        step = _Step(nats, *divmod(place, scores.shape[1]))
        (stopping if step.token in settings.stop_ids else going).append(step)
    return stopping, going[: settings.num_beams]
