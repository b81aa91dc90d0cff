"""Decoding: batched, KV-cached; greedy, temperature, top-k, top-p, beams.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.gpt import GPT
from pipeline.kv_cache import KVCache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: length limit of each row.
        temperature: 0 is greedy.
        top_k: only the k likeliest tokens; 0 is all.
        top_p: only the likeliest tokens that together reach this probability; 1 is all.
        num_beams: beams of beam search; 1 is none. Needs temperature 0.
        stop_ids: tokens that end a row; they are not part of the text.
        seed: random seed; row i draws with seed + i.
        n_vocab: tokens of the tokenizer, where the model's vocabulary is rounded up; others are
            never chosen.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    n_vocab: int | None = None

    def __post_init__(self) -> None:
        for key, ok, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "a probability in (0, 1]"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
        ):
            if not ok:
                raise ValueError(f"{key} is {getattr(self, key)}; give {wanted}.")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"num_beams is {self.num_beams}, a search for the likeliest text, but temperature "
                f"is {self.temperature}; give temperature 0 with it."
            )


def check_prompt(n_tokens: int, block_size: int) -> None:
    """Refuses a prompt that leaves no room for an answer.

    Raises:
        ValueError: naming both lengths.
    """
    if n_tokens == 0:
        raise ValueError("prompt is empty; give at least one character.")
    if n_tokens >= block_size:
        raise ValueError(
            f"prompt has {n_tokens} tokens but model.gpt.block_size is {block_size}, "
            "the context that it must leave room in; shorten it."
        )


@torch.inference_mode()
def stream(
    model: GPT, prompts: Sequence[Sequence[int]], settings: Sampling
) -> Iterator[list[int | None]]:
    """One list a step: the new token of every row, None for rows that have ended.

    A row ends at a stop token, after `max_new_tokens`, or where the context is full. What a row
    gets does not depend on its neighbours.

    Args:
        model: put into eval mode.
        prompts: token ids, one list a row, of unequal length.
        settings: how tokens are chosen; without beams.

    Raises:
        ValueError: for a prompt that is empty or fills the context.
    """
    lengths = [len(prompt) for prompt in prompts]
    cache, logits = prefill(model, prompts, settings)
    room = [min(settings.max_new_tokens, model.config.block_size - length) for length in lengths]
    generators = [torch.Generator().manual_seed(settings.seed + i) for i in range(len(prompts))]
    positions = torch.tensor(lengths, device=logits.device)  # (B,) where the next token goes
    alive = list(range(len(prompts)))
    for step in range(max(room)):
        chosen = choose(logits, settings, [generators[row] for row in alive])
        new: list[int | None] = [None] * len(prompts)
        kept = []
        for i, (row, token) in enumerate(zip(alive, chosen, strict=True)):
            if token not in settings.stop_ids:
                new[row] = token
                if step + 1 < room[row]:
                    kept.append(i)
        yield new
        if not kept:
            return
        if len(kept) < len(alive):
            rows = torch.tensor(kept, device=logits.device)
            cache.keep(rows)
            positions, alive = positions[rows], [alive[i] for i in kept]
        logits = decode(model, [chosen[i] for i in kept], positions, cache, settings)
        positions = positions + 1


def prefill(
    model: GPT, prompts: Sequence[Sequence[int]], settings: Sampling
) -> tuple[KVCache, Tensor]:
    """Runs prompts through the model: a cache with room for answers, and logits (B, V) after each.

    Raises:
        ValueError: for a prompt that is empty or fills the context.
    """
    model.eval()
    lengths = [len(prompt) for prompt in prompts]
    for length in lengths:
        check_prompt(length, model.config.block_size)
    weight, longest = model.token_embedding.weight, max(lengths)
    cache = KVCache(model.config, len(prompts), like=weight)
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    input_ids = torch.tensor(padded, device=weight.device)  # (B, T), padded on the right
    positions = torch.arange(longest, device=weight.device).expand(len(prompts), -1)
    last = torch.tensor(lengths, device=weight.device) - 1
    is_real = positions <= last[:, None]
    hidden = model(input_ids, is_real, positions=positions, cache=cache)
    ends = hidden[torch.arange(len(last), device=last.device), last]  # (B, C)
    return cache, _logits(model, ends, settings)


def decode(
    model: GPT, tokens: list[int], positions: Tensor, cache: KVCache, settings: Sampling
) -> Tensor:
    """Runs one more token of every row, at positions (B,); logits (B, V) after it."""
    input_ids = torch.tensor(tokens, device=positions.device)[:, None]  # (B, 1)
    hidden = model(input_ids, positions=positions[:, None], cache=cache)
    return _logits(model, hidden[:, 0], settings)


def _logits(model: GPT, hidden: Tensor, settings: Sampling) -> Tensor:
    return model.head(hidden).float()[:, : settings.n_vocab]


def choose(logits: Tensor, settings: Sampling, generators: list[torch.Generator]) -> list[int]:
    """The next token of every row: logits (B, V), one generator a row."""
    if settings.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    rows = zip(probabilities(logits.cpu(), settings), generators, strict=True)
    return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in rows]


def probabilities(logits: Tensor, settings: Sampling) -> Tensor:
    """What tokens are drawn with, (B, V): temperature, then top-k, then top-p of logits (B, V)."""
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[1]:
        smallest = logits.topk(settings.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    p = logits.softmax(dim=-1)
    if settings.top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        beyond = before >= settings.top_p  # the one that reaches it stays
        p = p.masked_fill(beyond.scatter(1, order, beyond), 0.0)
    return p / p.sum(dim=-1, keepdim=True)


def generate(model: GPT, prompts: Sequence[Sequence[int]], settings: Sampling) -> list[list[int]]:
    """New token ids of every prompt, without the stop token."""
    if not prompts:
        return []
    if settings.num_beams > 1:
        return [beam_search(model, prompt, settings) for prompt in prompts]
    rows: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, settings):
        for row, token in zip(rows, new, strict=True):
            if token is not None:
                row.append(token)
    return rows


@torch.inference_mode()
def beam_search(model: GPT, prompt: Sequence[int], settings: Sampling) -> list[int]:
    """The likeliest continuation found, by mean log-probability a token, stop token included.

    Raises:
        ValueError: for a prompt that is empty or fills the context.
    """
    cache, logits = prefill(model, [prompt], settings)
    n_new = min(settings.max_new_tokens, model.config.block_size - len(prompt))
    # so many that num_beams go on however many stop here
    n_candidates = settings.num_beams * (1 + len(settings.stop_ids))
    scores = logits.log_softmax(dim=-1)  # (beams, V) nats of the whole continuation
    beams: list[list[int]] = [[]]
    finished: list[tuple[float, list[int]]] = []
    for n_tokens in range(1, n_new + 1):
        values, flat = scores.flatten().topk(min(n_candidates, scores.numel()))
        going: list[tuple[float, int, int]] = []
        for value, place in zip(values.tolist(), flat.tolist(), strict=True):
            origin, token = divmod(place, scores.shape[1])
            if token in settings.stop_ids:
                finished.append((value / n_tokens, beams[origin]))
            elif len(going) < settings.num_beams:
                going.append((value, origin, token))
        beams = [[*beams[origin], token] for _, origin, token in going]
        if n_tokens == n_new:
            finished += [(going[i][0] / n_new, beam) for i, beam in enumerate(beams)]
        # no beam can end with a higher mean than if all that follows were certain
        if not going or (finished and max(finished)[0] >= going[0][0] / n_new):
            break
        cache.keep(torch.tensor([origin for _, origin, _ in going], device=logits.device))
        positions = torch.full((len(going),), len(prompt) + n_tokens - 1, device=logits.device)
        logits = decode(model, [token for *_, token in going], positions, cache, settings)
        so_far = torch.tensor([value for value, *_ in going], device=logits.device)
        scores = so_far[:, None] + logits.log_softmax(dim=-1)
    return max(finished)[1]
