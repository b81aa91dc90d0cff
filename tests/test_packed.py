"""A model packed for decoding gives the same outputs as before."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipeline.decoding.generate import generate
from pipeline.decoding.packed import PackedLinear, pack
from pipeline.decoding.sampling import Sampling
from pipeline.gpt import GPT
from tests.machine import needs_f16_products

MakeGPT = Callable[..., GPT]
PROMPTS = [[5, 6, 7], [11], list(range(20, 33)), [50, 3]]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
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


@needs_f16_products
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_in_f16_the_weights_alone_are_rounded(tiny_gpt: MakeGPT, family: str, tied: bool) -> None:
    packed, plain = (tiny_gpt(family, tie_embeddings=tied) for _ in range(2))
    assert pack(packed, in_f16=True) is packed
    unrounded = plain.head(plain(torch.tensor([PROMPTS[2]])))
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.half().float()
    assert torch.equal(packed.head.weight, plain.head.weight)
    assert (packed.head.weight is packed.token_embedding.weight) == tied
    with torch.inference_mode():
        hidden = packed(torch.tensor([PROMPTS[2]]))
        ours, theirs = packed.head(hidden), plain.head(plain(torch.tensor([PROMPTS[2]])))
    assert ours.dtype == hidden.dtype == torch.float32
    bound = 1e-5 * theirs.abs().max()
    assert (ours - theirs).abs().max() < bound < (unrounded - theirs).abs().max()


@needs_f16_products
@pytest.mark.parametrize(("weight", "said"), [(-65536.0, "6.55e+04"), (torch.nan, "nan")])
def test_what_f16_has_no_room_for_is_refused(weight: float, said: str) -> None:
    """FBGEMM would take the largest number instead."""
    layer = nn.Linear(8, 5)
    layer.weight.data[3, 5] = weight
    with pytest.raises(ValueError, match=rf"a weight is {re.escape(said)}, .*--precision 32-true"):
        PackedLinear(layer, in_f16=True)
    assert PackedLinear(layer)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
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


@pytest.mark.parametrize("in_f16", [False, pytest.param(True, marks=needs_f16_products)])
def test_layers_with_and_without_biases(in_f16: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8)
    for has_bias in (True, False):
        layers = [nn.Linear(8, n, bias=has_bias) for n in (5, 3)]
        for layer in layers:
            layer.weight.data = layer.weight.data.half().float()
        expected = torch.cat([layer(x) for layer in layers], dim=-1)
        packed, residual = PackedLinear(*layers, in_f16=in_f16), torch.randn(3, 2, 8)
        torch.testing.assert_close(packed(x), expected)
        torch.testing.assert_close(packed(x, plus=residual), expected + residual)
