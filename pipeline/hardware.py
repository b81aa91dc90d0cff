"""What the machine can do; asked once, before anything is built around it."""

from __future__ import annotations

import torch


def multiplies_bf16() -> bool:
    """Whether bf16 matrix products run in hardware: CUDA since Ampere; AVX-512-BF16 or AMX on CPUs.

    Other hardware emulates them, which is many times slower than float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
