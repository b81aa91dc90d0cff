"""Weights packed for decoding: projections of one input as one matrix, in a fast memory layout.

A decoding step reads every weight for a few tokens, so on a CPU it is bound by memory bandwidth.
Plain matrices are read at 13 GB/s of the 31 that two cores can reach; oneDNN's blocked layout,
with fewer and larger products, comes closer; FBGEMM's float16 weights are half as much to read.
The rest of a step is small operations that take a few microseconds each, however small: so there
are few of them, and some in place.

Shapes: I inputs, O outputs, of several layers concatenated; the rest as in `gpt.py`.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.gpt import GPT, AttentionContext, Block, attend, heads_first
from pipeline.layers.rotary import rotate

ROWS_LAID_OUT_FOR = 16  # good for 1 to 800 rows, as measured (benchmarks/NOTES.md)


class PackedLinear(nn.Module):
    """Linear layers that read the same input, as one. For inference: its weight is no parameter.

    With `in_f16` weights are held in float16, for products with float32; ValueError if one is too
    large for it.
    """

    def __init__(self, *layers: nn.Linear, in_f16: bool = False) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])  # (O, I)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None  # (O,)
        self.in_f16, self.is_blocked = in_f16, not in_f16 and _has_blocks(weight)
        self.matrix: Any = weight
        if in_f16:
            largest = float(weight.abs().max())
            if not largest <= torch.finfo(torch.float16).max:  # false for NaN, too
                raise ValueError(
                    f"a weight is {largest:.3g}, for which f16-weights have no room; give "
                    "--precision 32-true."
                )
            self.matrix = torch.ops.quantized.linear_prepack_fp16(weight, self.bias)
        elif self.is_blocked:
            self.matrix = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_LAID_OUT_FOR)

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """(..., I) -> (..., O), added to `plus` (..., O) where that is given."""
        if self.is_blocked and plus is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, plus, self.matrix, self.bias, "add")
        if self.is_blocked:
            return torch.ops.mkldnn._linear_pointwise(x, self.matrix, self.bias, "none", [], "")
        if self.in_f16:
            y = torch.ops.quantized.linear_dynamic_fp16(x, self.matrix)
        else:
            y = F.linear(x, self.matrix, self.bias)
        return y if plus is None else y.add_(plus)


def _has_blocks(weight: Tensor) -> bool:
    """Whether oneDNN multiplies such a matrix; torch.compile packs it with the same operator."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PackedBlock(nn.Module):
    """A transformer block with few operations, for inference.

    Queries and keys are rotated as one and in place, keys and values cached as one; the output
    projections add to the residual stream themselves.
    """

    def __init__(self, block: Block, *, in_f16: bool) -> None:
        super().__init__()
        attention, mlp = cast(Any, block.attention), cast(Any, block.mlp)
        self.config, self.layer = attention.config, attention.layer
        self.attention_norm, self.mlp_norm = block.attention_norm, block.mlp_norm
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.is_gated = mlp.gate is not None
        ups = (mlp.gate, mlp.up) if self.is_gated else (mlp.up,)
        self.qkv = PackedLinear(attention.q, attention.k, attention.v, in_f16=in_f16)
        self.o = PackedLinear(attention.o, in_f16=in_f16)
        self.up = PackedLinear(*ups, in_f16=in_f16)
        self.down = PackedLinear(mlp.down, in_f16=in_f16)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) -> (B, T, C), or unpadded (1, N, C) -> (1, N, C)."""
        x = self.o(self._attend(self.qkv(self.attention_norm(x)), context), plus=x)
        return self.down(self._activate(self.up(self.mlp_norm(x))), plus=x)

    def _attend(self, qkv: Tensor, context: AttentionContext) -> Tensor:
        n_head, n_kv_head = self.config.n_head, self.config.n_kv_head
        heads = qkv.unflatten(2, (-1, self.config.head_size))  # (B, T, H + 2 G, D)
        qk = heads.narrow(2, 0, n_head + n_kv_head)
        if self.q_norm is not None:
            q, k = qk.split((n_head, n_kv_head), dim=2)
            q.copy_(self.q_norm(q))
            k.copy_(self.k_norm(k))
        if context.rotation is not None:
            rotate(qk, *context.rotation, out=qk)
        heads = heads_first(heads, context)  # (B, H + 2 G, T, D)
        q, kv = heads.split_with_sizes((n_head, 2 * n_kv_head), dim=1)
        k, v = kv.chunk(2, dim=1) if context.cache is None else context.cache.update(self.layer, kv)
        return attend(q, k, v, context, self.config.causal)

    def _activate(self, x: Tensor) -> Tensor:
        if not self.is_gated:
            return F.gelu(x, approximate="tanh")
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


def pack(model: GPT, *, in_f16: bool = False) -> GPT:
    """Packs a plain model for decoding, in place; then it can be neither trained nor saved.

    Weights may be held in float16 where `hardware.multiplies_f16_weights` is true; ValueError if
    one is too large for it.
    """
    for i, block in enumerate(cast("list[Block]", model.blocks)):
        model.blocks[i] = PackedBlock(block, in_f16=in_f16)
    head = cast(Any, PackedLinear(model.head, in_f16=in_f16))
    head.weight = model.head.weight  # used by losses; a tied one is the embedding anyway
    if in_f16:
        head.weight.data = head.weight.data.half().float()  # rounded as in answers
    model.head = head
    return model.eval().requires_grad_(False)
