"""Names and layouts of tensors in other formats: one table, for import and for export.

Shapes: C n_embd, H heads, D head size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from gguf import MODEL_ARCH, get_tensor_name_map
from torch import Tensor

from pipeline.gpt import GPTConfig

Format = Literal["huggingface", "gguf"]
Family = Literal["llama", "qwen2", "qwen3", "gpt2"]
_LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False, "causal": True}
_GPT2 = {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True, "causal": True}
TRAITS: dict[Family, dict[str, Any]] = {
    "llama": {**_LLAMA, "qkv_bias": False, "qk_norm": False},
    "qwen2": {**_LLAMA, "qkv_bias": True, "qk_norm": False},
    "qwen3": {**_LLAMA, "qkv_bias": False, "qk_norm": True},
    "gpt2": {**_GPT2, "qkv_bias": False, "qk_norm": False},
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, and the parameters that it holds."""

    theirs: str  # its name in the file
    ours: tuple[str, ...]  # parameters, concatenated along the output dimension
    transposed: bool = False  # stored as (in, out), as in GPT-2's Conv1D
    # number of heads of queries or keys (H D, ...), whose halves of D llama.cpp interleaves
    rotary_heads: int | None = None

    @property
    def keeps_rows(self) -> bool:
        """Whether rows of the tensor are the same rows of a single parameter."""
        return len(self.ours) == 1 and not self.transposed and not self.rotary_heads

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Parameters by our names, from the file's tensor."""
        if self.transposed:
            tensor = tensor.T
        if heads := self.rotary_heads:
            tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return dict(zip(self.ours, tensor.chunk(len(self.ours)), strict=True))

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The file's tensor, from parameters by our names."""
        parts = [tensors[name] for name in self.ours]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if heads := self.rotary_heads:
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return (tensor.T if self.transposed else tensor).contiguous()


def family_of(config: GPTConfig) -> Family:
    """The published architecture of a configuration; ValueError if no other tool supports it."""
    is_plain = (
        config.n_kv_head == config.n_head and config.n_head * config.head_size == config.n_embd
    )
    for family, traits in TRAITS.items():
        has_all = all(getattr(config, key) == value for key, value in traits.items())
        if has_all and (family != "gpt2" or is_plain):
            return family
    raise ValueError(
        "only some architectures are known elsewhere: llama (rmsnorm, rope, swiglu, no bias), the "
        "same with qkv_bias (qwen2) or with qk_norm (qwen3), and gpt2 (layernorm, learned, gelu, "
        "bias, as many key/value heads as heads, no head_dim), all causal; model.gpt here is norm "
        f"{config.norm}, position {config.position}, mlp {config.mlp}, bias {config.bias}, "
        f"qkv_bias {config.qkv_bias}, qk_norm {config.qk_norm}."
    )


def head_dim(given: int | None, n_embd: int, n_head: int) -> int | None:
    """A configuration's `head_dim`: the given one, or None if that is the default."""
    return None if given is None or given * n_head == n_embd else given


def entries(config: GPTConfig, form: Format) -> list[Entry]:
    """Every tensor of a model in a file of that format; tied ones appear once."""
    return list(_gguf(config) if form == "gguf" else _TABLES[family_of(config)](config))


def _huggingface_llama(config: GPTConfig) -> Iterator[Entry]:
    names = {"input_layernorm.weight": "attention_norm.weight"}
    names |= {f"self_attn.{part}_proj.weight": f"attention.{part}.weight" for part in "qkvo"}
    if config.qkv_bias:
        names |= {f"self_attn.{part}_proj.bias": f"attention.{part}.bias" for part in "qkv"}
    if config.qk_norm:
        names |= {f"self_attn.{part}_norm.weight": f"attention.{part}_norm.weight" for part in "qk"}
    names["post_attention_layernorm.weight"] = "mlp_norm.weight"
    names |= {f"mlp.{part}_proj.weight": f"mlp.{part}.weight" for part in ("gate", "up", "down")}
    yield Entry("model.embed_tokens.weight", ("token_embedding.weight",))
    for i in range(config.n_layer):
        for theirs, ours in names.items():
            yield Entry(f"model.layers.{i}.{theirs}", (f"blocks.{i}.{ours}",))
    yield Entry("model.norm.weight", ("final_norm.weight",))
    if not config.tie_embeddings:
        yield Entry("lm_head.weight", ("head.weight",))


def _huggingface_gpt2(config: GPTConfig) -> Iterator[Entry]:
    yield Entry("transformer.wte.weight", ("token_embedding.weight",))
    yield Entry("transformer.wpe.weight", ("position_embedding.weight",))
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            is_matrix = kind == "weight"
            qkv = tuple(f"{ours}.attention.{part}.{kind}" for part in "qkv")
            yield Entry(f"{theirs}.ln_1.{kind}", (f"{ours}.attention_norm.{kind}",))
            yield Entry(f"{theirs}.attn.c_attn.{kind}", qkv, is_matrix)
            yield Entry(f"{theirs}.attn.c_proj.{kind}", (f"{ours}.attention.o.{kind}",), is_matrix)
            yield Entry(f"{theirs}.ln_2.{kind}", (f"{ours}.mlp_norm.{kind}",))
            yield Entry(f"{theirs}.mlp.c_fc.{kind}", (f"{ours}.mlp.up.{kind}",), is_matrix)
            yield Entry(f"{theirs}.mlp.c_proj.{kind}", (f"{ours}.mlp.down.{kind}",), is_matrix)
    for kind in ("weight", "bias"):
        yield Entry(f"transformer.ln_f.{kind}", (f"final_norm.{kind}",))
    if not config.tie_embeddings:
        yield Entry("lm_head.weight", ("head.weight",))


def _gguf(config: GPTConfig) -> Iterator[Entry]:
    """Hugging Face's entries under llama.cpp's names, without transposing."""
    family = family_of(config)
    names = get_tensor_name_map(MODEL_ARCH[family.upper()], config.n_layer)
    interleaved = {"q_proj": config.n_head, "k_proj": config.n_kv_head}
    heads = interleaved if family == "llama" else {}
    for entry in _TABLES[family](config):
        theirs = names.get_name(entry.theirs, (".weight", ".bias"))
        assert theirs is not None, f"llama.cpp has no name for {entry.theirs}"
        yield Entry(theirs, entry.ours, rotary_heads=heads.get(entry.theirs.split(".")[-2]))


_TABLES = {**dict.fromkeys(TRAITS, _huggingface_llama), "gpt2": _huggingface_gpt2}
