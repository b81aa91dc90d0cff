"""LoRA adapters: no effect at the start, an untouched base, exact merges, readable by PEFT."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline import lora
from pipeline.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pipeline.classifier import GPTClassifier
from pipeline.gpt import GPT
from pipeline.layers.fused_lora import FusedLinear
from pipeline.lora import LoRAConfig

MakeGPT = Callable[..., GPT]
PLAIN = LoRAConfig(rank=4, alpha=8.0, dropout=0.0, targets=["q", "v"], rslora=False, dora=False)
VARIANTS = {
    "plain": PLAIN,
    "rslora": replace(PLAIN, rslora=True),
    "dora": replace(PLAIN, dora=True),
    "all-linear": replace(PLAIN, targets=["all-linear"]),
}
INPUT_IDS = torch.arange(24).reshape(2, 12)
# float32: W x + B A x and (W + B A) x round differently; logits are of size 1
TOLERANCE = 1e-5


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def config(request: pytest.FixtureRequest) -> LoRAConfig:
    return request.param


@torch.no_grad()
def logits(model: GPT) -> Tensor:
    return model.head(model(INPUT_IDS))


def train(model: nn.Module, n_steps: int = 3) -> None:
    """A few real optimizer steps, after which the adapters do something."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(n_steps):
        optimizer.zero_grad()
        model(INPUT_IDS).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_life_of_an_adapter(tiny_gpt: MakeGPT, config: LoRAConfig, family: str) -> None:
    model = tiny_gpt(family)
    base, before = {n: t.clone() for n, t in model.tensors().items()}, logits(model)
    lora.attach(model, config)
    parts = {name.split(".lora_")[1].split(".")[0] for name in lora.adapter_state(model)}
    assert parts == {"A", "B"} | ({"magnitude_vector"} if config.dora else set())
    # DoRA divides by the norm that it multiplies with
    assert (logits(model) - before).abs().max() <= (TOLERANCE if config.dora else 0)

    train(model)
    unmerged = logits(model)
    assert (unmerged - before).abs().max() > 0.1
    frozen = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(frozen[name], tensor) for name, tensor in base.items())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if lora.is_adapter_key(name)}

    lora.merge(model)
    assert (logits(model) - unmerged).abs().max() < TOLERANCE
    assert model.tensors().keys() == base.keys()
    assert all(p.requires_grad for p in model.parameters())
    changed = {n.split(".")[-2] for n, t in model.tensors().items() if not torch.equal(t, base[n])}
    everything = {"q", "k", "v", "o", "up", "down"} | ({"gate"} if family != "gpt2" else set())
    assert changed == (everything if config.targets == ["all-linear"] else {"q", "v"})


@pytest.mark.filterwarnings("error")  # PEFT warns of what an earlier adapter left
def test_a_merged_model_takes_the_next_adapter(tiny_gpt: MakeGPT) -> None:
    model = tiny_gpt()
    for config in (PLAIN, replace(PLAIN, rank=2, targets=["o"])):
        lora.attach(model, config)
        train(model)
        after = logits(model)
        lora.merge(model)
        assert (logits(model) - after).abs().max() < TOLERANCE


def test_scales(tiny_gpt: MakeGPT) -> None:
    """The update is B A x times alpha / rank, or alpha / sqrt(rank)."""
    for config, scale in ((PLAIN, 8 / 4), (VARIANTS["rslora"], 8 / 2)):
        model = tiny_gpt()
        weight = model.blocks[1].attention.q.weight.detach().clone()
        lora.attach(model, config)
        train(model)
        state = lora.adapter_state(model)
        a, b = (state[f"base_model.model.blocks.1.attention.q.lora_{x}.weight"] for x in "AB")
        lora.merge(model)
        torch.testing.assert_close(
            model.blocks[1].attention.q.weight.detach(), weight + scale * b @ a
        )


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_is_every_layer_of_the_blocks_and_no_other(
    tiny_gpt: MakeGPT, tied: bool
) -> None:
    model = tiny_gpt("llama", tie_embeddings=tied)
    resolved = lora.attach(model, VARIANTS["all-linear"])
    assert resolved.targets == ["down", "gate", "k", "o", "q", "up", "v"]
    adapted = {name.split(".lora_")[0] for name in lora.adapter_state(model)}
    assert len(adapted) == 2 * 7
    assert all(name.startswith("base_model.model.blocks.") for name in adapted)
    assert type(model.head) is nn.Linear
    assert type(model.token_embedding) is nn.Embedding


def test_a_classifier_is_adapted_below_its_head(tiny_gpt: MakeGPT, config: LoRAConfig) -> None:
    torch.manual_seed(0)
    model = GPTClassifier(tiny_gpt("llama"), n_labels=3)
    with torch.no_grad():
        before = model(INPUT_IDS)
        lora.attach(model, config)
        assert (model(INPUT_IDS) - before).abs().max() <= (TOLERANCE if config.dora else 0)
    assert type(model.classifier) is nn.Linear
    train(model)
    state = {name: tensor.clone() for name, tensor in lora.adapter_state(model).items()}
    assert all(name.startswith("base_model.model.gpt.blocks.") for name in state)
    with torch.no_grad():
        unmerged = model(INPUT_IDS)
        lora.merge(model)
        assert (unmerged - before).abs().max() > 1e-3
        assert (model(INPUT_IDS) - unmerged).abs().max() < TOLERANCE


@pytest.fixture
def trained(tiny_gpt: MakeGPT, config: LoRAConfig, tmp_path: Path) -> tuple[GPT, LoRAConfig, Path]:
    """A model with a trained adapter, and the folder of its standard files."""
    model = tiny_gpt("llama")
    resolved = lora.attach(model, config)
    train(model)
    save_file(lora.adapter_state(model), tmp_path / ADAPTER_WEIGHTS)
    (tmp_path / ADAPTER_CONFIG).write_text(lora.adapter_config_json(resolved))
    return model, resolved, tmp_path


def test_peft_reads_our_files(tiny_gpt: MakeGPT, trained: tuple[GPT, LoRAConfig, Path]) -> None:
    from peft import PeftModel, get_peft_model, set_peft_model_state_dict

    model, resolved, folder = trained
    loaded = PeftModel.from_pretrained(tiny_gpt("llama"), str(folder))
    assert torch.equal(logits(loaded.base_model.model), logits(model))

    ours = lora.peft_config(resolved)
    other: Any = get_peft_model(tiny_gpt("llama"), ours)
    report = set_peft_model_state_dict(other, lora.adapter_state(model))
    assert report.unexpected_keys == []
    assert not [key for key in report.missing_keys if "lora_" in key]
    assert torch.equal(logits(other.base_model.model), logits(model))


def test_we_read_what_peft_writes(
    tiny_gpt: MakeGPT, trained: tuple[GPT, LoRAConfig, Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    model, resolved, folder = trained
    PeftModel.from_pretrained(tiny_gpt("llama"), str(folder)).save_pretrained(tmp_path / "theirs")
    again = tiny_gpt("llama")
    lora.attach(again, resolved)
    lora.load_adapter(again, load_file(tmp_path / "theirs" / ADAPTER_WEIGHTS))
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_that_does_not_fit_is_refused(tiny_gpt: MakeGPT) -> None:
    model = tiny_gpt()
    lora.attach(model, PLAIN)
    state = {name: torch.ones_like(tensor) for name, tensor in lora.adapter_state(model).items()}
    name = "base_model.model.blocks.0.attention.q.lora_A.weight"
    before = logits(model)
    with pytest.raises(ValueError, match=rf"missing \['{name}'\], unexpected \[\]"):
        lora.load_adapter(model, {k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match=r"missing \[\], unexpected \['extra'\]"):
        lora.load_adapter(model, state | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 32\), the model's is \(4, 32\)"):
        lora.load_adapter(model, state | {name: torch.zeros(2, 32)})
    assert torch.equal(logits(model), before), "a refused adapter leaves the model as it was"


@pytest.mark.parametrize(
    ("targets", "wrong"),
    [
        (["w"], "'w'"),
        (["q_proj"], "'q_proj'"),
        (["q", "head"], "'head'"),
        (["token_embedding"], "'token_emb"),
        ([], ""),
    ],
)
def test_targets_that_match_nothing_are_refused(
    tiny_gpt: MakeGPT, targets: list[str], wrong: str
) -> None:
    model = tiny_gpt()
    message = rf"model\.lora\.targets \[{wrong}.*\] match no layer .* \['down', 'k', 'o', 'q'"
    with pytest.raises(ValueError, match=message) as caught:
        lora.attach(model, replace(PLAIN, targets=targets))
    assert ("(q_proj is q here)" in str(caught.value)) is (targets == ["q_proj"])
    assert all(p.requires_grad for p in model.parameters()), "a refusal changes nothing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"dropout": 1.0}, "dropout is 1"),
    ],
)
def test_refused_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.lora\.{message}"):
        replace(PLAIN, **changes)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_fused_layer_is_pefts(tiny_gpt: MakeGPT, family: str, rslora: bool) -> None:
    """Outputs and all gradients, also where a layer's input needs none; gpt2 has biases."""
    config = replace(VARIANTS["all-linear"], rslora=rslora)
    results = []
    for dropout in (0.0, 0.5):  # with dropout PEFT's own layer is used; in eval mode it drops none
        model = tiny_gpt(family).double()
        lora.attach(model, replace(config, dropout=dropout))
        assert any(isinstance(m, FusedLinear) for m in model.modules()) == (dropout == 0)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if lora.is_adapter_key(name):
                parameter.data.normal_(0, 0.1, generator=generator)
        output = model.double().eval()(INPUT_IDS)
        output.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((output.detach(), gradients))
        assert torch.equal(model.train()(INPUT_IDS), output) == (dropout == 0)
    (ours, our_gradients), (theirs, their_gradients) = results
    assert (ours - theirs).abs().max() < 1e-10  # float64: the same sums in another order
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert gradient is not None
        assert (gradient - their_gradients[name]).abs().max() < 1e-8, name


def test_a_base_held_in_bf16_is_what_autocast_computes_with(tiny_gpt: MakeGPT) -> None:
    """The weights are cast once instead of at every step; adapters stay as they are."""
    model, input_ids = tiny_gpt("llama"), torch.randint(96, (2, 9))
    lora.attach(model, VARIANTS["all-linear"])
    with torch.autocast("cpu", torch.bfloat16):
        before = model(input_ids).float()
        lora.hold_base(model, torch.bfloat16)
        after = model(input_ids)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert after.dtype == torch.bfloat16
    # the residual stream is bf16 now, of 8 significant bits, in values up to 4
    assert (after.float() - before).abs().max() < 0.1
    after.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_dora_takes_its_norms_in_float32(tiny_gpt: MakeGPT) -> None:
    """On a base in bf16, whatever comes in: it would start with another scale of every output."""
    torch.manual_seed(0)
    model, x = tiny_gpt("llama"), torch.randn(4000, 32).bfloat16()
    lora.attach(model, VARIANTS["dora"])
    lora.hold_base(model, torch.bfloat16)
    layer: Any = model.blocks[0].attention.q
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain, adapted = layer.base_layer(x).float(), layer(x).float()
    scale = (adapted * plain).sum(0) / plain.square().sum(0)  # of each output, freed of rounding
    assert (scale - 1).abs().max() < 4e-4


def test_merging_in_half_precision_is_refused(tiny_gpt: MakeGPT) -> None:
    model = tiny_gpt().bfloat16()
    lora.attach(model, PLAIN)
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.q is torch\.bfloat16; merge in"):
        lora.merge(model)
