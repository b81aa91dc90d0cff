"""What the machine can do; asked once, before anything is built around it."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "32-true", "bf16-true"]  # of a model that only answers


def inference_dtype(precision: Precision) -> torch.dtype:
    """Of the weights: bf16 where it is asked for, or `auto` and the hardware multiplies it."""
    is_half = precision == "bf16-true" or (precision == "auto" and multiplies_bf16())
    return torch.bfloat16 if is_half else torch.float32


def multiplies_bf16() -> bool:
    """Whether bf16 matrix products run in hardware: CUDA since Ampere; AVX-512-BF16 or AMX on CPUs.

    Other hardware emulates them, which is many times slower than float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
