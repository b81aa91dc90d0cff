"""GGUF files: metadata and tensors, with every length checked before it is trusted.

The gguf package dequantises, but its reader is not used: it keeps an array for every string (for a
vocabulary of 49,000: 3 s, 200 MB), and a damaged length makes it loop 2^60 times.
Source: the GGUF specification, versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize
from torch import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
# `struct` formats of GGUFValueType: UINT8 to BOOL, then, after STRING and ARRAY, UINT64 to FLOAT64
_FORMS = dict(enumerate("BbHhIif?")) | dict(enumerate("Qqd", start=10))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape as in torch, its type of numbers, and its first byte."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row (innermost dimension); ValueError if it is no whole number of blocks."""
        n_values, n_bytes = GGML_QUANT_SIZES[self.kind]
        if self.shape[-1] % n_values:
            raise ValueError(f"rows of {self.shape[-1]} cannot be {self.kind.name}.")
        return self.shape[-1] // n_values * n_bytes

    @property
    def n_rows(self) -> int:
        """Product of the outer dimensions."""
        return math.prod(self.shape[:-1])

    def read(self, path: Path, rows: slice) -> Tensor:
        """Rows of a matrix, or a whole vector, in float32; ValueError for an unsupported type."""
        shape = (self.n_rows, self.row_bytes)
        # copy-on-write, as torch warns of read-only arrays; nothing is written
        stored = np.memmap(path, mode="c", offset=self.offset, shape=shape)
        try:
            values = dequantize(stored[rows], self.kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.kind.name} cannot be dequantised here; convert it to Q8_0 or F16."
            ) from error
        return torch.from_numpy(values).view(-1, *self.shape[1:])


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata of a GGUF file, and where its tensors are; ValueError if it is damaged."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin as a GGUF file does.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).read()


class _Header:
    """A file's bytes, and the position up to which they have been parsed."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, len(MAGIC)

    def read(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        (version,) = self.numbers("I")
        if version not in VERSIONS:
            raise ValueError(f"its GGUF version is {version}; supported: {VERSIONS}.")
        n_tensors, n_fields = self.numbers("QQ")
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            name = self.text()
            fields[name] = self.value(*self.numbers("I"))
        tensors = dict(self.tensor() for _ in range(n_tensors))
        if len(tensors) < n_tensors:
            raise ValueError("it has two tensors of the same name.")
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its general.alignment is {alignment!r}.")
        start = -(-self.position // alignment) * alignment
        return fields, {name: self.placed(name, tensors[name], start) for name in tensors}

    def take(self, n_bytes: int) -> int:
        """Advances by `n_bytes`, and returns where they begin."""
        start, end = self.position, self.position + n_bytes
        if end > len(self.data):
            raise ValueError(f"it is truncated or damaged: byte {start} asks for {n_bytes} more.")
        self.position = end
        return start

    def numbers(self, forms: str, count: int = 1) -> tuple[Any, ...]:
        """Reads numbers in `struct` formats, `count` times."""
        start = self.take(count * struct.calcsize(f"<{forms}"))
        return struct.unpack_from(f"<{forms * count}", self.data, start)

    def text(self) -> str:
        (n_bytes,) = self.numbers("Q")
        start = self.take(n_bytes)
        return self.data[start : self.position].decode()

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            of, count = self.numbers("IQ")
            if of == GGUFValueType.STRING:
                return [self.text() for _ in range(count)]
            return list(self.numbers(_form(of), count))
        return self.numbers(_form(kind))[0]

    def tensor(self) -> tuple[str, StoredTensor]:
        name = self.text()
        (n_dimensions,) = self.numbers("I")
        if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"its tensor {name} has {n_dimensions} dimensions.")
        shape = self.numbers("Q", n_dimensions)[::-1]
        kind, offset = self.numbers("IQ")
        return name, StoredTensor(shape, GGMLQuantizationType(kind), offset)

    def placed(self, name: str, tensor: StoredTensor, start: int) -> StoredTensor:
        """The tensor with its offset in the file."""
        offset = start + tensor.offset
        if offset + tensor.n_rows * tensor.row_bytes > len(self.data) or 0 in tensor.shape:
            raise ValueError(f"it is truncated or damaged: its tensor {name} is not all there.")
        return StoredTensor(tensor.shape, tensor.kind, offset)


def _form(kind: int) -> str:
    if kind not in _FORMS:
        raise ValueError(f"it is damaged: a field is of kind {kind}.")
    return _FORMS[kind]
