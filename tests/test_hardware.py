"""Detection of the machine's hardware, in containers too."""

import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from pipeline import hardware

CPU = torch.device("cpu")


def test_a_container_has_the_memory_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_CONTAINER", tmp_path)
    machine = psutil.virtual_memory().total
    assert hardware.total_memory_bytes(CPU) == machine, "there is no container"
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.total_memory_bytes(CPU) == machine, "it has no limit"
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**28}\n")
    (tmp_path / "memory.stat").write_text(f"anon 7\ninactive_file {2**20}\n")
    assert hardware.total_memory_bytes(CPU) == 2**30
    assert hardware.available_memory_bytes(CPU) == 2**30 - 2**28 + 2**20


@pytest.mark.parametrize(
    ("has_bf16", "has_f16_products", "auto"),
    [
        (True, True, "bf16-true"),
        (False, True, "f16-weights"),
        (True, False, "bf16-true"),
        (False, False, "32-true"),
    ],
)
def test_what_answers_takes_the_smallest_weights_that_are_fast(
    has_bf16: bool, has_f16_products: bool, auto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = {"avx512_bf16": has_bf16, "amx_bf16": False}
    engines = ["qnnpack", "fbgemm"] if has_f16_products else ["qnnpack"]
    monkeypatch.setattr(hardware, "default_device", lambda: CPU)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", engines)
    assert hardware.inference_precision("auto") == auto
    assert hardware.inference_precision("32-true") == "32-true"
    assert hardware.inference_precision("bf16-true") == "bf16-true"
    if has_f16_products:
        assert hardware.inference_precision("f16-weights") == "f16-weights"
        return
    with pytest.raises(ValueError, match="give auto, 32-true or bf16-true"):
        hardware.inference_precision("f16-weights")


def test_a_gpu_has_no_products_with_f16_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert hardware.inference_precision("auto") == "32-true"
    with pytest.raises(ValueError, match="a CPU with AVX2"):
        hardware.inference_precision("f16-weights")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_freed_memory_is_kept_for_what_comes_next() -> None:
    """Large tensors, freed and asked for again: their pages come in the first steps alone."""
    program = """
import resource, torch
from pipeline.hardware import keep_freed_memory

def step():
    torch.ones(2**24) + torch.ones(2**23).repeat(2)  # 64 MiB and more: the kernel's, page by page

def faults():
    for _ in range(5):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
keep_freed_memory()
print(plain, faults())
"""
    said = subprocess.check_output([sys.executable, "-c", program], text=True)
    plain, kept = map(int, said.split())
    assert kept < plain / 10
