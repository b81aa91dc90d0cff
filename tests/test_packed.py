"""A model laid out for decoding says what it said before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipeline.generate import generate
from pipeline.gpt import GPT
from pipeline.packed import PackedLinear, pack
from pipeline.sampling import Sampling

MakeGPT = Callable[..., GPT]
PROMPTS = [[5, 6, 7], [11], list(range(20, 33)), [50, 3]]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_logits(tiny_gpt: MakeGPT, family: str, tied: bool, dtype: torch.dtype) -> None:
    plain, packed = (tiny_gpt(family, tie_embeddings=tied).to(dtype) for _ in range(2))
    assert pack(packed) is packed
    input_ids = torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    with torch.inference_mode():
        ours, theirs = packed.head(packed(input_ids)), plain.head(plain(input_ids))
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-5}[dtype]
    assert (ours - theirs).abs().max() < bound * theirs.abs().max()
    assert torch.equal(packed.head.weight, plain.head.weight)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_same_text(tiny_gpt: MakeGPT, family: str) -> None:
    """Of unequal lengths, over more tokens than the cache grows by at once."""
    plain = tiny_gpt(family, block_size=160)
    settings = Sampling(max_new_tokens=140)
    expected = generate(plain, PROMPTS, settings)
    assert generate(pack(tiny_gpt(family, block_size=160)), PROMPTS, settings) == expected


def test_nothing_is_held_twice(tiny_gpt: MakeGPT) -> None:
    model = pack(tiny_gpt("llama"))
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert layers == []
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    of_block = ["qkv", "o", "up", "down"]
    blocks = range(model.config.n_layer)
    assert {*packed} == {"head", *(f"blocks.{i}.{name}" for i in blocks for name in of_block)}


def test_layers_with_and_without_biases() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8)
    for has_bias in (True, False):
        layers = [nn.Linear(8, n, bias=has_bias) for n in (5, 3)]
        expected = torch.cat([layer(x) for layer in layers], dim=-1)
        packed, residual = PackedLinear(*layers), torch.randn(3, 2, 8)
        torch.testing.assert_close(packed(x), expected)
        torch.testing.assert_close(packed(x, plus=residual), expected + residual)
