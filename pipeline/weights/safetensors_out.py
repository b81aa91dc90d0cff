"""safetensors files written as their tensors come: one of them is in memory at a time."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

_BYTES = 4  # of a float32


def write_one_by_one(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes float32 tensors, the bytes that `safetensors.torch.save_file` writes.

    Args:
        path: the file.
        shapes: shapes of all tensors, by name.
        tensors: each by its name, in any order.
    """
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name in sorted(shapes):
        places[name] = end, end + _BYTES * math.prod(shapes[name])
        _, end = places[name]
    facts = {
        name: {"dtype": "F32", "shape": shapes[name], "data_offsets": place}
        for name, place in places.items()
    }
    header = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in tensors:
            start, _ = places[name]
            file.seek(8 + len(header) + start)
            file.write(tensor.numpy().data)
