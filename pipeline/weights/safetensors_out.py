"""safetensors files written as their tensors come: one of them is in memory at a time."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_BYTES = 4  # of a float32


def write_one_by_one(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes float32 tensors, in any order: the bytes that `safetensors.torch.save_file` writes."""
    facts: dict[str, dict[str, Any]] = {}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + _BYTES * math.prod(shapes[name])
        facts[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": (start, end)}
    header = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in tensors:
            file.seek(8 + len(header) + facts[name]["data_offsets"][0])
            file.write(tensor.numpy().data)
