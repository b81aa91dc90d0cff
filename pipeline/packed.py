"""Weights laid out for decoding: what reads one input is one product, in oneDNN's own layout.

A step of decoding reads every weight for a few tokens, so on a CPU it takes as long as memory
takes to give them. Rows of a plain matrix give 13 GB/s of the 31 that two cores can read; blocks
as oneDNN wants them, and fewer and larger products, come closer.

Shapes: I inputs, O outputs, of several layers one after the other.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.gpt import GPT, Block

ROWS_LAID_OUT_FOR = 16  # good for 1 to 800 rows, as measured (benchmarks/NOTES.md)


class PackedLinear(nn.Module):
    """Linear layers that read the same input, as one. For inference: its weight is no parameter.

    Args:
        layers: with biases, or without.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])  # (O, I)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None  # (O,)
        self.is_blocked = _has_blocks(weight)
        if self.is_blocked:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_LAID_OUT_FOR)
        self.matrix = weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if not self.is_blocked:
            return F.linear(x, self.matrix, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.matrix, self.bias, "none", [], "")


def _has_blocks(weight: Tensor) -> bool:
    """Whether oneDNN multiplies such a matrix; torch's own compiler lays it out with the same."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(model: GPT) -> GPT:
    """Lays a model out for decoding, in place; it can be neither trained nor saved afterwards.

    Args:
        model: plain, without live adapters.
    """
    for block in cast("list[Block]", model.blocks):
        attention, mlp = cast(Any, block.attention), cast(Any, block.mlp)
        attention.joint = PackedLinear(attention.q, attention.k, attention.v)
        del attention.q, attention.k, attention.v
        attention.o = PackedLinear(attention.o)
        if mlp.gate is None:
            mlp.up = PackedLinear(mlp.up)
        else:
            mlp.joint = PackedLinear(mlp.gate, mlp.up)
            del mlp.gate, mlp.up
        mlp.down = PackedLinear(mlp.down)
    head = cast(Any, PackedLinear(model.head))
    head.weight = model.head.weight  # losses take it; where it is tied it is the embedding anyway
    model.head = head
    return model.eval()
