"""What the machine can do; asked once, before anything is built around it."""

from __future__ import annotations

import resource
import sys
from typing import Literal

import psutil
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


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has had: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def used_memory_bytes(device: torch.device) -> int:
    """The memory that this process has now."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(psutil.Process().memory_info().rss)


def total_memory_bytes(device: torch.device) -> int:
    """All memory of the GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)
