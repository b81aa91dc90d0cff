"""Rotary position embeddings (Su et al. 2021), also stretched to longer contexts.

Shapes: B rows, H heads, T tokens, D head size.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for a longer context than the original one.

    Args:
        kind: linear (every frequency divided by factor), or llama3 (only low ones, smoothly).
        factor: how much the context is stretched.
        low_freq_factor: for llama3: waves longer than original_context / this are stretched fully.
        high_freq_factor: for llama3: waves shorter than original_context / this are left alone.
        original_context: for llama3: the context before stretching, in tokens.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if not (self.factor > 0 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(
                f"rope scaling has factor {self.factor}, low_freq_factor {self.low_freq_factor}, "
                f"high_freq_factor {self.high_freq_factor}; give positive ones, high above low."
            )
        if self.original_context < 1:
            raise ValueError(f"rope scaling has original_context {self.original_context}.")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotates x (B, T, H, D) by its positions, halves paired as in Llama; cos, sin broadcast to it.

    `out` may be x itself, if there is no backward pass.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin, out=out)


def rotary_table(frequencies: Tensor, n_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, (positions, D) float32 each, from frequencies (D / 2,).

    Always on the CPU. Sines of the first half are negated, as the rotation subtracts there and
    `rotate` only adds.
    """
    angles = torch.outer(torch.arange(n_positions, device="cpu"), frequencies)
    cos, sin = angles.cos(), angles.sin()  # (positions, D / 2)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotary_frequencies(theta: float, head_size: int, scaling: RopeScaling | None = None) -> Tensor:
    """Radians per token that each pair of a head's channels turns, (D / 2,) float32, on the CPU."""
    pairs = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / theta ** (pairs / head_size)
    return frequencies if scaling is None else stretched(frequencies, scaling)


def stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies (D / 2,) for a longer context.

    Sources: linear, Chen et al. 2023; llama3, Grattafiori et al. 2024 (parity with transformers in
    tests/test_weights_huggingface.py).
    """
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    waves = scaling.original_context * frequencies / (2 * math.pi)  # that fit in that context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((waves - low) / (high - low)).clamp(0, 1)  # share of the frequency that stays
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def stretch_factors(theta: float, head_size: int, scaling: RopeScaling) -> Tensor:
    """What llama.cpp divides rotary frequencies by, (D / 2,)."""
    frequencies = rotary_frequencies(theta, head_size)
    return frequencies / stretched(frequencies, scaling)
