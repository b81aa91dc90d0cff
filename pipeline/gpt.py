"""The model: one decoder-only transformer that is configured as GPT-2, Llama or Qwen.

Sources: GPT-2 (Radford et al. 2019), RoPE (Su et al. 2021), RMSNorm (Zhang & Sennrich 2019),
SwiGLU (Shazeer 2020), grouped-query attention (Ainslie et al. 2023), norms of queries and keys
(Henry et al. 2020). Parity with transformers is shown in tests/test_gpt_parity.py.

Shapes: B rows, T tokens, S keys seen so far, C n_embd, H query heads, G key/value heads,
D head size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.layers.attention_products import additive_mask, attention_products, product_dtype
from pipeline.layers.meta_device import WithoutInit
from pipeline.layers.rms_norm import RMSNorm
from pipeline.layers.rotary import RopeScaling, rotary_frequencies, rotary_table, rotate
from pipeline.layers.swiglu import swiglu
from pipeline.layers.unpadding import Unpadding, widened

if TYPE_CHECKING:
    from pipeline.decoding.kv_cache import KVCache

INIT_STD = 0.02  # GPT-2


@dataclass(frozen=True)
class GPTConfig:
    """Everything that decides the shape and the mathematics of a model.

    Args:
        n_layer: transformer blocks.
        n_head: query heads.
        n_kv_head: key/value heads; as many as n_head for multi-head attention, 1 for multi-query,
            between them for grouped-query.
        n_embd: width of the residual stream.
        block_size: the longest context, in tokens.
        vocab_size: rows of the embedding; null takes the tokenizer's size, rounded up to a
            multiple of 64.
        norm: layernorm (GPT-2) or rmsnorm (Llama).
        norm_eps: added to the variance.
        position: learned embedding (GPT-2) or rotary (Llama).
        rope_theta: base of the rotary frequencies; unused with learned positions.
        mlp: gelu (GPT-2, tanh form) or swiglu (Llama).
        mlp_hidden: width inside the MLP.
        bias: biases in linear layers and layernorms.
        tie_embeddings: use the token embedding as the output head.
        dropout: dropout probability, on embeddings, attention weights and both residual branches.
        causal: tokens attend only to themselves and to earlier ones.
        rope_scaling: how rotary frequencies are stretched; null if they are not.
        head_dim: width of a head; null for n_embd / n_head.
        qkv_bias: biases in the projections of queries, keys and values, even without bias (Qwen2).
        qk_norm: RMS-normalise the queries and keys of every head (Qwen3).
    """

    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    block_size: int
    vocab_size: int | None
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    position: Literal["learned", "rope"]
    rope_theta: float
    mlp: Literal["gelu", "swiglu"]
    mlp_hidden: int
    bias: bool
    tie_embeddings: bool
    dropout: float
    causal: bool
    rope_scaling: RopeScaling | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        counts = ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "mlp_hidden")
        checks = {key: (getattr(self, key) >= 1, "at least 1") for key in counts}
        checks["vocab_size"] = (self.vocab_size is None or self.vocab_size >= 1, "at least 1")
        checks["head_dim"] = (self.head_dim is None or self.head_dim >= 1, "at least 1, or null")
        checks["norm_eps"] = (self.norm_eps > 0, "a positive number")
        checks["rope_theta"] = (self.rope_theta > 0, "a positive number")
        checks["dropout"] = (0 <= self.dropout < 1, "a probability in [0, 1)")
        for key in ("norm", "position", "mlp"):
            choices = get_args(get_type_hints(type(self))[key])
            checks[key] = (getattr(self, key) in choices, " or ".join(choices))
        for key, (ok, wanted) in checks.items():
            if not ok:
                raise ValueError(f"model.gpt.{key} is {getattr(self, key)}; give {wanted}.")
        widths = [] if self.head_dim else [("n_embd", "n_head")]
        for whole, part in [*widths, ("n_head", "n_kv_head")]:
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"model.gpt.{whole} is {getattr(self, whole)}, which model.gpt.{part} "
                    f"({getattr(self, part)}) does not divide; change one of them."
                )
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(
                "rotary positions need an even head size, but model.gpt.head_dim (if null, "
                f"model.gpt.n_embd / model.gpt.n_head) is {self.head_size}; change one of them."
            )

    @classmethod
    def from_primitives(cls, values: dict[str, Any]) -> GPTConfig:
        """Makes a configuration from its `asdict`, as checkpoints store it."""
        scaling = values.get("rope_scaling")
        return cls(**{**values, "rope_scaling": RopeScaling(**scaling) if scaling else None})

    @property
    def head_size(self) -> int:
        """Width D of a head."""
        return self.head_dim or self.n_embd // self.n_head


@dataclass(frozen=True)
class AttentionContext:
    """What attention must know about its rows, the same in every block."""

    rotation: tuple[Tensor, Tensor] | None = None  # cosines and sines of x's positions, if rotary
    mask: Tensor | None = None  # what may be attended to, if not just causal; (B, 1, T, S)
    additive: Tensor | None = None  # the same for `attention_products`, (B G, H/G T, S)
    cache: KVCache | None = None  # keys and values of earlier tokens
    unpadding: Unpadding | None = None  # from rows to the tokens that the other layers see


class Attention(nn.Module):
    """Causal (or full) self-attention with grouped keys and values."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        size, bias = config.head_size, config.bias or config.qkv_bias
        self.q = nn.Linear(config.n_embd, config.n_head * size, bias=bias)
        self.k = nn.Linear(config.n_embd, config.n_kv_head * size, bias=bias)
        self.v = nn.Linear(config.n_embd, config.n_kv_head * size, bias=bias)
        self.o = nn.Linear(config.n_head * size, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(size, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) -> (B, T, C), or unpadded (1, N, C) -> (1, N, C)."""
        size = self.config.head_size
        # once, where autocast would for each layer, and sum their gradients in float32
        x = x.to(product_dtype(x))
        q, k, v = (layer(x).unflatten(2, (-1, size)) for layer in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rotation is not None:
            q, k = rotate(q, *context.rotation), rotate(k, *context.rotation)
        q, k, v = (heads_first(each, context) for each in (q, k, v))
        if context.cache is not None:
            k, v = context.cache.update(self.layer, torch.cat((k, v), dim=1))
        dropout = self.config.dropout if self.training else 0.0
        return self.o(attend(q, k, v, context, self.config.causal, dropout))


def heads_first(x: Tensor, context: AttentionContext) -> Tensor:
    """(B, T, H, D), or unpadded (1, N, H, D), -> (B, H, T, D), for however many heads there are."""
    x = x if context.unpadding is None else context.unpadding.restore(x)
    return x.transpose(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, causal: bool, dropout: float = 0.0
) -> Tensor:
    """Attention of q (B, H, T, D) to k and v (B, G, S, D): (B, T, H D), or (1, N, H D), for o."""
    if context.additive is not None:
        y = attention_products(q, k, v, context.additive, dropout)
    else:
        is_causal, is_grouped = causal and context.mask is None, q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(
            q, k, v, context.mask, dropout, is_causal, enable_gqa=is_grouped
        )  # (B, H, T, D)
    y = y.transpose(1, 2).flatten(2)  # (B, T, H D)
    return y if context.unpadding is None else context.unpadding.drop(y)


class MLP(nn.Module):
    """The position-wise network: up, activation, down; with a gate where it is SwiGLU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.mlp_hidden, bias=config.bias)
        self.down = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)
        self.gate = None
        if config.mlp == "swiglu":
            self.gate = nn.Linear(config.n_embd, config.mlp_hidden, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.gate is not None:
            x = x.to(product_dtype(x))  # once, as above
            return self.down(swiglu(self.gate(x), self.up(x)))
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def make_norm(config: GPTConfig) -> nn.Module:
    """The normalisation that the configuration names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = make_norm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) -> (B, T, C), or unpadded (1, N, C) -> (1, N, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), context))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """Token ids to hidden states; `head` turns those into logits."""

    cos: Tensor
    sin: Tensor
    n_tokens: int | None = None  # rows of the head that are tokens, if it is rounded up; None: all
    draws_dropout: bool  # in training, in the model or in an adapter on it
    # keep only the inputs of blocks for the backward pass, and recompute the rest there (Chen et
    # al. 2016): less memory, a second forward pass, the same numbers
    gradient_checkpointing = False

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.gpt.vocab_size is null; resolve it from the tokenizer first.")
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = None
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout, self.draws_dropout = nn.Dropout(config.dropout), config.dropout > 0
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = make_norm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        if config.position == "rope":
            theta, scaling = config.rope_theta, config.rope_scaling
            frequencies = rotary_frequencies(theta, config.head_size, scaling)
            cos, sin = rotary_table(frequencies, config.block_size)  # (block_size, D)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    @classmethod
    def skeleton(cls, config: GPTConfig) -> GPT:
        """A model whose parameters have shapes but no memory."""
        with torch.device("meta"), WithoutInit():
            return cls(config)

    @classmethod
    def from_tensors(cls, config: GPTConfig, tensors: dict[str, Tensor]) -> GPT:
        """A model around given weights, which are taken as they are, not copied.

        Needs every parameter by name, without `head.weight` if it is tied; ValueError for tensors
        that are missing, unexpected or of another shape.
        """
        model = cls.skeleton(config)
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            wrong = sorted(dict(expected.items() ^ found.items()))
            raise ValueError(
                f"the weights do not fit the model's configuration: {len(wrong)} tensors are "
                f"missing, unexpected or of another shape, such as {wrong[0]}."
            )
        model.load_state_dict(tensors, strict=False, assign=True)
        if config.tie_embeddings:
            model.head.weight = model.token_embedding.weight
        return model

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter by name, a tied one once: what `from_tensors` takes."""
        return {name: p.detach() for name, p in self.named_parameters()}

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), its std / sqrt(2 n_layer) in residual projections."""
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                residual = name.endswith(("attention.o.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=residual_std if residual else INIT_STD)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Final hidden states.

        Rows are padded on the right, so in a causal model no real token ever sees a pad. With
        `attention_mask`, pads and repeats of a beginning that all rows share (unless a cache holds
        tokens, or dropout is drawn) take part in attention only; other layers work without them.

        Args:
            input_ids: (B, T) int64, T <= block_size.
            attention_mask: (B, T) bool, true where a token is real.
            positions: (B, T) int64 position of each token in its row; 0 to T-1 if None.
            cache: filled at `positions`, which are then required, and attended to.

        Returns:
            (B, T, C), normalised, without meaning at pads; see `logits`.

        Raises:
            ValueError: where the rows are longer than the context.
        """
        n_tokens = input_ids.shape[1]
        if n_tokens > self.config.block_size:
            raise ValueError(
                f"{n_tokens} tokens do not fit in model.gpt.block_size {self.config.block_size}; "
                "shorten the text or use a model with a longer context."
            )
        if attention_mask is not None and positions is None:
            limit = self.config.block_size
            input_ids, attention_mask = widened(input_ids, limit), widened(attention_mask, limit)
        places = slice(0, input_ids.shape[1]) if positions is None else positions
        x, rotation = self._embed(input_ids, places)
        mask, unpadding, is_first = None, None, True
        if cache is not None:
            assert positions is not None, "a cache needs positions"
            is_first, mask = cache.is_empty, cache.seek(positions)
        elif attention_mask is not None and not self.config.causal:
            mask = attention_mask[:, None, None, :]  # (B, 1, 1, T)
        additive = additive_mask(x, mask, self.config)
        if attention_mask is not None:
            shares = self.config.causal and is_first and not (self.training and self.draws_dropout)
            unpadding = Unpadding(input_ids, attention_mask, shares_beginning=shares)
            x, rotation = unpadding.drop(x), unpadding.drop_rotation(rotation)
        x, context = self.dropout(x), AttentionContext(rotation, mask, additive, cache, unpadding)
        x = self.final_norm(self._through_blocks(x, context))
        return x if unpadding is None else unpadding.restore(x)[:, :n_tokens]

    def _through_blocks(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) -> (B, T, C), or unpadded (1, N, C) -> (1, N, C)."""
        recomputes = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if recomputes:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return x

    def _embed(
        self, input_ids: Tensor, places: slice | Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Embeddings (B, T, C), with learned positions; also (cos, sin) of rotary ones, or None."""
        x = self.token_embedding(input_ids)
        if self.position_embedding is not None:
            return x + self.position_embedding.weight[places], None
        dtype = product_dtype(x)
        cos, sin = self.cos[places].to(dtype), self.sin[places].to(dtype)  # (T, D) or (B, T, D)
        return x, (cos.unsqueeze(-2), sin.unsqueeze(-2))

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states (..., C) -> float32 logits (..., V), of the tokenizer's ids only."""
        return self.head(hidden).float()[..., : self.n_tokens]

    def n_parameters(self, *, trainable_only: bool = False) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)
