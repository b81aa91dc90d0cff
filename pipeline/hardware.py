"""What the hardware can do: its device, precisions, speed and memory."""

import ctypes
import functools
import platform
import re
import resource
import time
from pathlib import Path

import psutil
import torch

from pipeline.precision import Precision

_STATUS, _CONTAINER = Path("/proc/self/status"), Path("/sys/fs/cgroup")
CEILING_SIZE = 1024  # rows of the square matrices whose product is timed
CEILING_SIZE_OF_GPUS = 8192  # smaller ones do not fill them
CEILING_SECONDS = 0.3
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
_HEAP_STEP = 2**26  # bytes that a heap grows by


def default_device() -> torch.device:
    """The device of models unless another is asked for: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inference_precision(precision: Precision) -> Precision:
    """Resolves `auto` to what answers fastest here: bf16-true, f16-weights or 32-true.

    Decoding takes as long as reading the weights from memory, so they are held in 16 bits where the
    hardware multiplies bf16, or has products of float32 with float16.

    Raises:
        ValueError: f16-weights are asked for and there are no such products.
    """
    device = default_device()
    if precision == "auto":
        if multiplies_bf16(device):
            return "bf16-true"
        return "f16-weights" if multiplies_f16_weights(device) else "32-true"
    if precision == "f16-weights" and not multiplies_f16_weights(device):
        raise ValueError(
            "precision is f16-weights, which takes a CPU with AVX2; give auto, 32-true or "
            "bf16-true."
        )
    return precision


def resolve_precision(precision: str, accelerator: object) -> str:
    """Resolves `auto` to bf16-mixed where the hardware multiplies bf16 matrices, else 32-true.

    Lightning's accelerator is a name, or an object, which is taken for the default one.

    Raises:
        ValueError: 16-mixed on a CPU, which Lightning would take for bf16-mixed.
    """
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    is_on_cpu = accelerator == "cpu" or (accelerator == "auto" and not has_gpu)
    if precision == "16-mixed" and is_on_cpu:
        raise ValueError("precision is 16-mixed, which takes a GPU; give auto.")
    if precision != "auto":
        return precision
    device = torch.device("cpu") if accelerator == "cpu" else default_device()
    return "bf16-mixed" if multiplies_bf16(device) else "32-true"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware: CUDA since Ampere; AVX-512-BF16 or AMX on CPUs.

    Other hardware emulates them, which is many times slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


def multiplies_f16_weights(device: torch.device) -> bool:
    """Whether there are products of float32 with weights in float16: FBGEMM's, on AVX2 and later.

    They round the weights to float16, and nothing else; a row on its own is summed in another order
    than a row among others.
    """
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


@functools.cache
def matrix_product_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of large matrix products, measured once per process."""
    size = CEILING_SIZE_OF_GPUS if device.type == "cuda" else CEILING_SIZE
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, generator=generator, device=device, dtype=dtype)
    n_products, best = 0, 0.0
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < CEILING_SECONDS or (
        n_products < 3 and spent < 3 * CEILING_SECONDS  # an emulated one takes seconds
    ):
        before = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - before))
        n_products += 1
    return best


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
    # on Linux ru_maxrss would be that of the process that started this one, if that is more
    found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found, f"{_STATUS} names no peak"
    return 1024 * int(found[1])


def used_memory_bytes(device: torch.device) -> int:
    """Current memory of this process: on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(psutil.Process().memory_info().rss)


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that this process frees, and reuse it for later allocations.

    Otherwise it returns each large tensor to the kernel and gets new, zeroed pages for the next: up
    to 100,000 page faults per training step. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _HEAP_STEP)):
        mallopt(option, value)


def total_memory_bytes(device: torch.device) -> int:
    """All memory of the GPU, or of the machine or the container, whichever has less."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = int(psutil.virtual_memory().total)
    return min(total, _container_limit() or total)


def available_memory_bytes(device: torch.device) -> int:
    """Free memory of the GPU, or of the machine or the container, whichever has less."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free, limit = int(psutil.virtual_memory().available), _container_limit()
    if limit is not None:
        used, stat = ((_CONTAINER / f"memory.{name}").read_text() for name in ("current", "stat"))
        cached = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)  # freed when needed
        free = min(free, limit - int(used) + (int(cached[1]) if cached else 0))
    return free


def _container_limit() -> int | None:
    """Memory limit of the container in bytes (cgroup v2); None without a limit."""
    path = _CONTAINER / "memory.max"
    text = path.read_text().strip() if path.exists() else "max"
    return None if text == "max" else int(text)
