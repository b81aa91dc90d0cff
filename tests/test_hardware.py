"""What the machine has, in a container as well."""

from __future__ import annotations

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
