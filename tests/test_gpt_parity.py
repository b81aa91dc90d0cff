"""The model matches GPT-2, Llama and Qwen in transformers: logits, loss, gradients, tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.decoding.generate import generate
from pipeline.decoding.sampling import Sampling
from pipeline.gpt import GPT
from pipeline.loss import IGNORE, next_token_loss
from tests.published import CLASSES

LOGITS_TOLERANCE = 1e-5  # float32: logits are of size 1, and 32-term sums round at some 1e-6
N_NEW = 20
CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2, untied": ("gpt2", {"tie_embeddings": False}),
    "llama, multi-head": ("llama", {"n_kv_head": 4}),
    "llama, grouped": ("llama", {}),
    "llama, multi-query, tied": ("llama", {"n_kv_head": 1, "tie_embeddings": True}),
    "llama, wide heads": ("llama", {"head_dim": 12}),
    "qwen2": ("qwen2", {}),
    "qwen3, tied": ("qwen3", {"tie_embeddings": True}),
    "llama, grouped, tied": ("llama", {"tie_embeddings": True, "rope_theta": 500.0}),
}
GPT2_NAMES = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "blocks": "transformer.h",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attention.o": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
LLAMA_NAMES = {
    "token_embedding": "model.embed_tokens",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "final_norm": "model.norm",
    "head": "lm_head",
    **{f"attention.{name}": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"attention.{name}_norm": f"self_attn.{name}_norm" for name in "qk"},
    **{f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def as_theirs(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Our parameters, or their gradients, by transformers' names and in its layout."""
    if family != "gpt2":
        return {rename(name, LLAMA_NAMES): tensor for name, tensor in tensors.items()}
    fused: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():  # q, k and v follow one another
        for part in "qkv":
            name = name.replace(f"attention.{part}.", "attn.c_attn.")
        name = rename(name, GPT2_NAMES)
        transposed = tensor.dim() == 2 and ".h." in name  # Conv1D stores (in, out)
        fused.setdefault(name, []).append(tensor.T if transposed else tensor)
    return {name: torch.cat(parts, dim=-1) for name, parts in fused.items()}


def rename(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = f".{name}".replace(f".{ours}.", f".{theirs}.")[1:]
    return name


def reference(model: GPT, family: str) -> Any:
    """transformers' model with our weights; eager attention, so that it shares no kernel."""
    c = model.config
    common: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_embeddings,
        "attn_implementation": "eager",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,  # a padding row would get no gradient
    }
    if family == "gpt2":
        gpt2 = GPT2Config(
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_embd=c.n_embd,
            n_positions=c.block_size,
            n_inner=c.mlp_hidden,
            layer_norm_epsilon=c.norm_eps,
            **common,
        )
        theirs: Any = GPT2LMHeadModel(gpt2)
    else:
        config_class, model_class = CLASSES[family]
        llama = config_class(
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            hidden_size=c.n_embd,
            head_dim=c.head_size,
            intermediate_size=c.mlp_hidden,
            max_position_embeddings=c.block_size,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            **common,
        )
        theirs = model_class(llama)
    state = {
        name: tensor.contiguous() for name, tensor in as_theirs(model.tensors(), family).items()
    }
    keys = theirs.load_state_dict(state, strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys == (["lm_head.weight"] if c.tie_embeddings else [])
    return theirs.eval()


@pytest.fixture(params=CASES.values(), ids=CASES.keys(), scope="module")
def pair(request: Any, tiny_gpt: Callable[..., GPT]) -> tuple[GPT, Any, str]:
    family, changes = request.param
    model = tiny_gpt(family, **changes)
    return model, reference(model, family), family


def tokens(n_rows: int, n_tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(96, (n_rows, n_tokens), generator=generator)


def test_logits(pair: tuple[GPT, Any, str]) -> None:
    ours, theirs, _ = pair
    input_ids = tokens(3, ours.config.block_size)
    with torch.inference_mode():
        difference = ours.head(ours(input_ids)) - theirs(input_ids).logits
    assert difference.abs().max() < LOGITS_TOLERANCE


def test_loss_and_every_gradient(pair: tuple[GPT, Any, str]) -> None:
    ours, theirs, family = pair
    input_ids = tokens(3, 40)
    labels = input_ids.masked_fill(tokens(3, 40, seed=1) < 30, IGNORE)
    total, count = next_token_loss(ours(input_ids), ours.head.weight, labels)
    expected = theirs(input_ids, labels=labels).loss
    torch.testing.assert_close(total / count, expected, rtol=1e-6, atol=0)

    ours.zero_grad()
    theirs.zero_grad()
    (total / count).backward()
    expected.backward()
    gradients = as_theirs({n: p.grad for n, p in ours.named_parameters()}, family)  # type: ignore[misc]
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        # sums over 120 positions of float32 products round at some 1e-7 of the largest gradient
        bound = 1e-6 + 1e-5 * float(wanted[name].abs().max())
        assert float((gradient - wanted[name]).abs().max()) < bound, name


@pytest.mark.parametrize("their_cache", [True, False])
def test_greedy_tokens(pair: tuple[GPT, Any, str], their_cache: bool) -> None:
    ours, theirs, _ = pair
    prompts = tokens(2, 9)
    expected = theirs.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=N_NEW,
        use_cache=their_cache,
    )[:, 9:].tolist()
    assert len({*expected[0], *expected[1]}) > 5, "a text that repeats one token shows nothing"
    assert generate(ours, prompts.tolist(), Sampling(max_new_tokens=N_NEW)) == expected
    assert [without_cache(ours, prompt) for prompt in prompts.tolist()] == expected


def test_beams(pair: tuple[GPT, Any, str]) -> None:
    ours, theirs, _ = pair
    prompts = tokens(2, 9, seed=2)
    expected = [
        theirs.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            do_sample=False,
            max_new_tokens=N_NEW,
            num_beams=3,
        )[0, 9:].tolist()
        for prompt in prompts
    ]
    settings = Sampling(max_new_tokens=N_NEW, num_beams=3)
    assert generate(ours, prompts.tolist(), settings) == expected


@torch.inference_mode()
def without_cache(model: GPT, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(N_NEW):
        ids.append(int(model.head(model(torch.tensor([ids]))[0, -1]).argmax()))
    return ids[len(prompt) :]
