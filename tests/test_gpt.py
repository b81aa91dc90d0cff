"""Properties of the model for any weights: causality, invariances, counts, refusals."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from pipeline import lora
from pipeline.decoding.kv_cache import KVCache
from pipeline.gpt import GPT, INIT_STD, GPTConfig
from pipeline.layers.attention_products import attention_products
from pipeline.layers.rms_norm import RMSNorm
from pipeline.layers.swiglu import swiglu
from pipeline.lora import LoRAConfig
from pipeline.loss import next_token_loss
from pipeline.training.flops import flops_per_token

MakeGPT = Callable[..., GPT]
MakeConfig = Callable[..., GPTConfig]
FAMILIES = ["gpt2", "llama", "qwen3"]
ROUNDING = (
    1e-5  # float32: another shape of a product is another order of its sums; values of size 1
)


def tokens(n_rows: int, n_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(96, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


def seen_from(model: GPT, position: int, n_tokens: int = 12) -> list[int]:
    """Positions whose token embedding has a gradient from the hidden state at one position."""
    input_ids = torch.arange(n_tokens)[None]  # every token once, so that rows are positions
    model.zero_grad()
    model(input_ids)[0, position].square().sum().backward()
    gradient = model.token_embedding.weight.grad
    assert gradient is not None
    return gradient.abs().sum(dim=1).nonzero().flatten().tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_position_sees_itself_and_what_is_before_it(tiny_gpt: MakeGPT, family: str) -> None:
    assert seen_from(tiny_gpt(family), 5) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_causality_every_position_sees_all(tiny_gpt: MakeGPT, family: str) -> None:
    assert seen_from(tiny_gpt(family, causal=False), 5) == list(range(12))


@pytest.mark.parametrize("family", FAMILIES)
def test_editing_a_token_leaves_earlier_positions(tiny_gpt: MakeGPT, family: str) -> None:
    model, input_ids = tiny_gpt(family), tokens(2, 30)
    edited = input_ids.clone()
    edited[:, 17] = (edited[:, 17] + 1) % 96
    with torch.inference_mode():
        before, after = model(input_ids), model(edited)
    assert torch.equal(before[:, :17], after[:, :17])
    assert ((before - after)[:, 17:].abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("causal", [True, False])
def test_padding_and_neighbours_do_not_matter(tiny_gpt: MakeGPT, family: str, causal: bool) -> None:
    model, lengths = tiny_gpt(family, causal=causal), [7, 30, 1, 12]
    input_ids = tokens(4, 30)
    mask = torch.arange(30) < torch.tensor(lengths)[:, None]
    with torch.inference_mode():
        batched = model(input_ids, mask)
        reversed_ = model(input_ids.flip(0), mask.flip(0)).flip(0)
        for row, length in enumerate(lengths):
            alone = model(input_ids[row : row + 1, :length])[0]
            assert (batched[row, :length] - alone).abs().max() < ROUNDING
            assert (reversed_[row, :length] - alone).abs().max() < ROUNDING


def rows_that_begin_alike() -> tuple[Tensor, Tensor]:
    """Four rows of 7, 30, 7 and 12 tokens: the same first 5, others, the same again; and mask."""
    input_ids, mask = tokens(4, 30), torch.arange(30) < torch.tensor([7, 30, 7, 12])[:, None]
    input_ids[:, [*range(5), 6]] = input_ids[0, [*range(5), 6]]
    return input_ids, mask


def rows_that_go_on_with_a_pad() -> tuple[Tensor, Tensor]:
    """Rows of 5, 30, 6 and 12 tokens; what comes after the first 5 is the first row's pad."""
    input_ids, mask = tokens(4, 30), torch.arange(30) < torch.tensor([5, 30, 6, 12])[:, None]
    input_ids[:, :6] = input_ids[0, :6]
    return input_ids, mask


@pytest.mark.parametrize(("causal", "n_tokens"), [(True, 56 - 3 * 5), (False, 56)])
def test_linear_layers_see_no_pad_and_a_common_start_once(
    tiny_gpt: MakeGPT, causal: bool, n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.layers.unpadding.MULTIPLE", 1)  # to the token
    model, seen = tiny_gpt(causal=causal), []
    model.blocks[0].mlp.up.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    model(*rows_that_begin_alike())
    assert seen == [(1, n_tokens, model.config.n_embd)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [rows_that_begin_alike, rows_that_go_on_with_a_pad])
def test_a_common_start_taken_once_changes_nothing(
    tiny_gpt: MakeGPT, family: str, causal: bool, rows: Callable[[], tuple[Tensor, Tensor]]
) -> None:
    """States and gradients are those of every row by itself, where every token is supervised."""
    model, (input_ids, mask) = tiny_gpt(family, causal=causal).double(), rows()
    weights = torch.randn(*mask.shape, model.config.n_embd, dtype=torch.float64)

    def gradients(total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, list(model.blocks.parameters())))

    packed = model(input_ids, mask)
    alone = [model(ids[keep][None])[0] for ids, keep in zip(input_ids, mask, strict=True)]
    assert (packed[mask] - torch.cat(alone)).abs().max() < 1e-12  # the same sums, in float64
    ours = gradients((packed * weights)[mask].sum())
    theirs = gradients((torch.cat(alone) * weights[mask]).sum())
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_by_products_is_attention(groups: int) -> None:
    torch.manual_seed(0)
    heads = (4, groups, groups)
    q, k, v = (torch.randn(3, n, 9, 8, dtype=torch.float64, requires_grad=True) for n in heads)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    future = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)
    ours = attention_products(q, k, v, future.repeat(4 // groups, 1), dropout=0.0)
    assert (ours - fused).abs().max() < 1e-12  # float64: the same sums in another order
    weights = torch.randn_like(fused)
    gradients = [torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (ours, fused)]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*gradients, strict=True))


def test_rms_norm_has_the_gradients_of_torch() -> None:
    """In float64 to the last digits; in bf16 as exact, reduced in float32 as there."""
    torch.manual_seed(0)
    x, grad = (torch.randn(3, 7, 64, dtype=torch.float64) * 5 for _ in range(2))
    weight = torch.randn(64, dtype=torch.float64)
    exact = _normalised(nn.RMSNorm(64, eps=0.1), x, weight, grad)
    ours = _normalised(RMSNorm(64, eps=0.1), x, weight, grad)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, exact, strict=True))
    of_half = [[*map(Tensor.bfloat16, (x, weight, grad))] for _ in range(2)]
    kinds = (RMSNorm, nn.RMSNorm)
    found = [
        _normalised(kind(64, eps=0.1), *half) for kind, half in zip(kinds, of_half, strict=True)
    ]
    assert {tensor.dtype for tensors in found for tensor in tensors} == {torch.bfloat16}
    rounded = _normalised(nn.RMSNorm(64, eps=0.1), *(t.double() for t in of_half[0]))
    errors = [[(a - b).abs().max() for a, b in zip(t, rounded, strict=True)] for t in found]
    assert all(mine <= 1.01 * theirs for mine, theirs in zip(*errors, strict=True))


def test_autocast_does_not_round_the_backward_pass_of_a_norm() -> None:
    torch.manual_seed(0)
    x, grad, weight = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    plain = _normalised(RMSNorm(64, eps=0.1), x, weight, grad)
    with torch.autocast("cpu", torch.bfloat16):
        cast = _normalised(RMSNorm(64, eps=0.1), x, weight, grad)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def _normalised(norm: nn.RMSNorm, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    norm.weight, x = nn.Parameter(weight), x.clone().requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, (x, norm.weight), grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_has_the_bits_of_autograd_and_keeps_its_inputs_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(4, 33, dtype=dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(4, 33, dtype=dtype)
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = swiglu(gate, up)
    plain = F.silu(gate) * up
    gradients = (torch.autograd.grad(z, (gate, up), grad) for z in (y, plain))
    assert torch.equal(y, plain)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("family", FAMILIES)
def test_word_order_matters(tiny_gpt: MakeGPT, family: str) -> None:
    model, input_ids = tiny_gpt(family, causal=False), tokens(1, 10)
    with torch.inference_mode():
        swapped = model(input_ids.flip(1)).flip(1)
        assert (model(input_ids) - swapped).abs().amax(dim=-1).min() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_knows_nothing(tiny_config: MakeConfig, family: str) -> None:
    torch.manual_seed(0)
    model = GPT(tiny_config(family, n_embd=128, vocab_size=512)).eval()
    input_ids = torch.randint(512, (8, 64))
    total, count = next_token_loss(model(input_ids), model.head.weight, input_ids)
    # logits have a variance of 128 x 0.02^2, half of which is added to ln V: 0.03 nats
    assert float(total.detach() / count) == pytest.approx(math.log(512), abs=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_initialisation(tiny_config: MakeConfig, family: str) -> None:
    torch.manual_seed(0)
    model = GPT(tiny_config(family, n_layer=8, n_embd=128, mlp_hidden=256, vocab_size=512))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("attention.o.weight", "mlp.down.weight"))
            std = INIT_STD / 4 if residual else INIT_STD  # sqrt(2 x 8 layers)
            # 8,192 values or more: their standard deviation is known to 0.8 %
            assert float(parameter.detach().std()) == pytest.approx(std, rel=0.05), name


def test_dropout_acts_in_training_alone(tiny_gpt: MakeGPT) -> None:
    model, input_ids = tiny_gpt(dropout=0.5), tokens(1, 8)
    assert torch.equal(model(input_ids), model(input_ids))
    assert not torch.equal(model.train()(input_ids), model(input_ids))


@pytest.mark.parametrize("of_adapters", [False, True])
def test_rows_with_one_beginning_have_dropout_of_their_own(
    tiny_gpt: MakeGPT, of_adapters: bool
) -> None:
    """As without padding: how a step is cut into micro-batches changes no regularisation."""
    model = tiny_gpt(dropout=0.0 if of_adapters else 0.5)
    if of_adapters:
        config = LoRAConfig(4, 8.0, 0.5, ["all-linear"], rslora=False, dora=False)
        lora.attach(model, config)
        for name, parameter in model.named_parameters():
            if lora.is_adapter_key(name):
                nn.init.normal_(parameter)
    input_ids = tokens(1, 8).repeat(2, 1)
    mask = torch.tensor([[True] * 8, [True] * 7 + [False]])
    states = model(input_ids, mask)
    assert torch.equal(states[0, :7], states[1, :7])  # computed once
    states = model.train()(input_ids, mask)
    assert (states[0, :7] != states[1, :7]).any(dim=1).all()


def test_n_parameters(tiny_gpt: MakeGPT) -> None:
    c = 32
    gpt2 = tiny_gpt("gpt2")
    block = 4 * (c * c + c) + (c * 64 + 64) + (64 * c + c) + 2 * (2 * c)
    assert gpt2.n_parameters() == 96 * c + 64 * c + 2 * block + 2 * c
    llama = tiny_gpt("llama")  # 2 of 4 heads for keys and values, untied
    block = 2 * c * c + 2 * c * (c // 2) + 3 * c * 64 + 2 * c
    assert llama.n_parameters() == 2 * 96 * c + 2 * block + c
    llama.requires_grad_(False)
    llama.head.requires_grad_(True)
    assert llama.n_parameters(trainable_only=True) == 96 * c


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen", [False, True])
def test_flops_per_token(tiny_gpt: MakeGPT, family: str, frozen: bool) -> None:
    """Without causality exactly torch's count; with it, half of attention's operations.

    Blocks that are frozen hand gradients down to the embedding, and need none for their weights.

    The unfused kernel is counted: the fused one computes the scores again in its backward pass,
    and what is computed again is not counted here.
    """
    n_tokens = 48
    model = tiny_gpt(family, causal=False)
    model.blocks.requires_grad_(not frozen)
    unfused = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with unfused, FlopCounterMode(display=False) as counter:
        model.head(model(tokens(2, n_tokens))).sum().backward()
    counted = counter.get_total_flops() / (2 * n_tokens)
    assert flops_per_token(model, n_tokens) == counted

    other = tiny_gpt(family, causal=True)
    other.blocks.requires_grad_(not frozen)
    causal = flops_per_token(other, n_tokens)
    width = 64 if family == "qwen3" else 32  # of all heads
    attention = 3 * 2 * 2 * 2 * width * n_tokens  # 3 passes, 2 products, 2 layers
    assert causal == counted - attention / 2


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_configuration_in_primitives(tiny_config: MakeConfig, family: str) -> None:
    config = tiny_config(family)
    values = json.loads(json.dumps(asdict(config)))
    assert GPTConfig.from_primitives(values) == config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_trained", [0, 1])
def test_flops_end_where_nothing_below_is_trained(
    tiny_gpt: MakeGPT, family: str, n_trained: int
) -> None:
    """Of a classifier that trains its last block, or its head alone."""
    n_tokens = 48
    model = tiny_gpt(family, causal=False)
    model.requires_grad_(False)
    model.blocks[len(model.blocks) - n_trained :].requires_grad_(True)
    model.final_norm.requires_grad_(True)
    unfused = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    del model.head
    with unfused, FlopCounterMode(display=False) as counter:
        model(tokens(2, n_tokens)).sum().backward()
    counted = counter.get_total_flops() / (2 * n_tokens)
    assert flops_per_token(model, n_tokens) == counted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0}, r"model\.gpt\.n_layer is 0; give at least 1"),
        ({"n_head": 0}, r"model\.gpt\.n_head is 0"),
        ({"n_kv_head": 0}, r"model\.gpt\.n_kv_head is 0"),
        ({"n_embd": 0}, r"model\.gpt\.n_embd is 0"),
        ({"block_size": -1}, r"model\.gpt\.block_size is -1"),
        ({"mlp_hidden": 0}, r"model\.gpt\.mlp_hidden is 0"),
        ({"vocab_size": 0}, r"model\.gpt\.vocab_size is 0"),
        ({"norm_eps": 0.0}, r"model\.gpt\.norm_eps is 0\.0; give a positive number"),
        ({"rope_theta": -1.0}, r"model\.gpt\.rope_theta is -1\.0"),
        ({"dropout": 1.0}, r"model\.gpt\.dropout is 1\.0; give a probability in \[0, 1\)"),
        ({"norm": "batchnorm"}, r"model\.gpt\.norm is batchnorm; give layernorm or rmsnorm"),
        ({"position": "rotary"}, r"model\.gpt\.position is rotary; give learned or rope"),
        ({"mlp": "relu"}, r"model\.gpt\.mlp is relu; give gelu or swiglu"),
        ({"head_dim": 0}, r"model\.gpt\.head_dim is 0; give at least 1, or null"),
        ({"n_embd": 34}, r"n_embd is 34, which model\.gpt\.n_head \(4\) does not divide"),
        ({"n_kv_head": 3}, r"n_head is 4, which model\.gpt\.n_kv_head \(3\) does not divide"),
        ({"n_embd": 36, "position": "rope"}, r"even head size, but model\.gpt\.head_dim .* is 9"),
    ],
)
def test_refused_configurations(
    tiny_config: MakeConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_refused_uses(tiny_config: MakeConfig, tiny_gpt: MakeGPT) -> None:
    with pytest.raises(ValueError, match=r"model\.gpt\.vocab_size is null"):
        GPT(tiny_config(vocab_size=None))
    with pytest.raises(ValueError, match=r"65 tokens do not fit in model\.gpt\.block_size 64"):
        tiny_gpt()(tokens(1, 65))
    with pytest.raises(ValueError, match=r"model\.gpt\.causal is false"):
        KVCache(tiny_config(causal=False), 1, like=torch.zeros(()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_there_and_back(tiny_gpt: MakeGPT, family: str, tied: bool) -> None:
    model = tiny_gpt(family, tie_embeddings=tied)
    copy = GPT.from_tensors(model.config, model.tensors()).eval()
    assert ("head.weight" in model.tensors()) != tied
    assert torch.equal(copy(tokens(2, 9)), model(tokens(2, 9)))
    assert torch.equal(copy.head.weight, model.head.weight)
    assert (copy.head.weight is copy.token_embedding.weight) == tied


def test_weights_that_do_not_fit_are_refused_by_name(tiny_gpt: MakeGPT) -> None:
    model = tiny_gpt()
    missing, other = model.tensors(), model.tensors()
    del missing["final_norm.bias"]
    other["blocks.0.mlp.up.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"1 tensors are .* such as final_norm\.bias"):
        GPT.from_tensors(model.config, missing)
    with pytest.raises(ValueError, match=r"1 tensors are .* such as blocks\.0\.mlp\.up\.weight"):
        GPT.from_tensors(model.config, other)
    with pytest.raises(ValueError, match=r"such as head\.bias"):
        GPT.from_tensors(model.config, model.tensors() | {"head.bias": torch.zeros(96)})
