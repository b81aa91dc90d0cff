"""How the next token is chosen: greedily, or by sampling with temperature, top-k and top-p.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-30  # in the division: float32 would round much smaller ones to 0


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int  # length limit of each row
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # only the k likeliest tokens; 0 is all
    top_p: float = 1.0  # only the likeliest that together reach this probability; 1 is all
    num_beams: int = 1  # of beam search, which needs temperature 0; 1 is none
    stop_ids: frozenset[int] = frozenset()  # tokens that end a row; they are not part of the text
    seed: int = 0  # of the draws
    # report each token's log-probability and those of so many likeliest ones; None reports nothing
    n_likeliest: int | None = None
    echo: bool = False  # the same for the prompt's tokens

    def __post_init__(self) -> None:
        for key, ok, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "a probability in (0, 1]"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("n_likeliest", (self.n_likeliest or 0) >= 0, "0 or more, or null"),
        ):
            if not ok:
                raise ValueError(f"{key} is {getattr(self, key)}; give {wanted}.")
        if self.echo and self.n_likeliest is None:
            raise ValueError("echo reports the prompt, but n_likeliest is null; give 0 or more.")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"num_beams is {self.num_beams}, a search for the likeliest text, but temperature "
                f"is {self.temperature}; give temperature 0 with it."
            )


def choose(
    logits: Tensor, settings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> list[int]:
    """The next token of every row, from logits (B, V), with settings and a generator for each."""
    likeliest = logits.argmax(dim=-1).tolist()
    if all(own.temperature == 0 for own in settings):
        return likeliest
    rows = zip(logits.cpu(), likeliest, settings, generators, strict=True)
    return [
        _draw(row, own, generator) if own.temperature > 0 else greedy
        for row, greedy, own, generator in rows
    ]


def _draw(logits: Tensor, settings: Sampling, generator: torch.Generator) -> int:
    p = probabilities(logits[None], settings)[0]
    return int(torch.multinomial(p, 1, generator=generator))


def probabilities(logits: Tensor, settings: Sampling) -> Tensor:
    """Sampling probabilities (B, V) of logits (B, V): temperature, then top-k, then top-p."""
    best = logits.amax(dim=-1, keepdim=True)  # stays finite, however small the temperature
    logits = (logits - best) / max(settings.temperature, MIN_TEMPERATURE)
    if 0 < settings.top_k < logits.shape[1]:
        smallest = logits.topk(settings.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    p = logits.softmax(dim=-1)
    if settings.top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        beyond = before >= settings.top_p  # the one that reaches it stays
        beyond[:, 0] = False  # however small it is
        p = p.masked_fill(beyond.scatter(1, order, beyond), 0.0)
    return p / p.sum(dim=-1, keepdim=True)
