"""Import of GGUF files: hyperparameters, tokenizer and (dequantised) tensors known to `names`."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.sentencepiece import Prefix
from datamodules.tokenizer import Tokenizer
from pipeline.gpt import GPTConfig
from pipeline.layers.rotary import RopeScaling, rotary_frequencies, stretch_factors, stretched
from pipeline.weights.foreign import Foreign
from pipeline.weights.gguf_file import read_header
from pipeline.weights.names import TRAITS, head_dim
from pipeline.weights.sentencepiece import make_sentencepiece, merges_of_scores
from pipeline.weights.vocabulary import Special, make_tokenizer

ROPE_FACTORS = "rope_freqs.weight"  # what llama.cpp divides rotary frequencies by
ENDS = ("eot", "eom")  # end of turn and of message, which end a text as EOS does
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # GGUF's types of tokens
_KINDS = {
    "gpt2": (_NORMAL, _CONTROL, _USER, _UNUSED),
    "llama": (_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE),  # SentencePiece's
}
# llama.cpp's other names of the same pre-tokenizers
_SAME = {**dict.fromkeys(("llama3", "llama-v3"), "llama-bpe"), "deepseek-r1-qwen": "qwen2"}


def open_gguf(path: Path) -> Foreign:
    """Opens a GGUF file and reads its metadata; ValueError if it is damaged or not supported."""
    fields, tensors = read_header(path)
    if (n_parts := fields.get("split.count", 1)) > 1:
        raise ValueError(
            f"it is part {fields.get('split.no', 0) + 1} of {n_parts}; join them with llama.cpp's "
            "llama-gguf-split --merge, and give the file that comes of it."
        )
    shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def read(name: str, rows: slice) -> Tensor:
        try:
            return tensors[name].read(path, rows)
        except ValueError as error:  # OSErrors pass: the file is unreadable
            raise ValueError(f"its tensor {name}: {error}") from error

    factors = read(ROPE_FACTORS, slice(None)) if ROPE_FACTORS in tensors else None
    skipped = {} if factors is None else {ROPE_FACTORS: "part of the configuration"}
    is_tied = "output.weight" not in tensors
    vocab_size = shapes.get("token_embd.weight", (0,))[0]
    return Foreign(
        _config(fields, vocab_size, is_tied, factors),
        _tokenizer(fields),
        {name: shape for name, shape in shapes.items() if name not in skipped},
        read,
        "gguf",
        skipped=skipped,
        license=fields.get("general.license"),
    )


def _config(
    fields: dict[str, Any], vocab_size: int, is_tied: bool, factors: Tensor | None
) -> GPTConfig:
    if (family := fields["general.architecture"]) not in TRAITS:
        raise ValueError(f"its architecture is {family}; supported: {', '.join(TRAITS)}.")
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(sizes := fields.get(f"{family}.{key}"), list):
            raise ValueError(
                f"its {key} is of each layer ({sizes[:3]}...), which is not supported."
            )
    n_head, n_embd = fields[f"{family}.attention.head_count"], fields[f"{family}.embedding_length"]
    eps = "layer_norm_epsilon" if family == "gpt2" else "layer_norm_rms_epsilon"
    rope_theta = float(fields.get(f"{family}.rope.freq_base", 10000.0))
    size = fields.get(f"{family}.attention.key_length", n_embd // n_head)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := fields.get(f"{family}.{key}", size)) != size:
            raise ValueError(f"its heads are {size} wide, but its {key} is {other}.")
    if fields.get(f"{family}.expert_count"):
        raise ValueError("it is a mixture of experts, which is not supported.")
    if not fields.get(f"{family}.attention.causal", True):
        raise ValueError("its attention sees later tokens too, which is not supported.")
    return GPTConfig(
        n_layer=fields[f"{family}.block_count"],
        n_head=n_head,
        n_kv_head=fields.get(f"{family}.attention.head_count_kv", n_head),
        n_embd=n_embd,
        block_size=fields[f"{family}.context_length"],
        vocab_size=vocab_size,
        norm_eps=_shortest(fields[f"{family}.attention.{eps}"]),
        rope_theta=rope_theta,
        mlp_hidden=fields[f"{family}.feed_forward_length"],
        tie_embeddings=is_tied,
        dropout=0.0,
        rope_scaling=_rope_scaling(fields, rope_theta, size, factors),
        head_dim=head_dim(size, n_embd, n_head),
        **TRAITS[family],
    )


def _llama3_scaling(factors: Tensor, rope_theta: float, head_size: int) -> RopeScaling:
    """Llama 3's scaling: its factor by the lowest frequency, all else as in every Llama 3."""
    known = RopeScaling("llama3", math.inf)
    lowest = rotary_frequencies(rope_theta, head_size)[-1:]
    kept = float(stretched(lowest, known) / lowest)  # share of it that is not divided
    factor = (1 - kept) / (1 / float(factors[-1]) - kept) if kept < 1 else 1.0
    return replace(known, factor=round(factor, 3))


def _rope_scaling(
    fields: dict[str, Any], rope_theta: float, head_size: int, factors: Tensor | None
) -> RopeScaling | None:
    """Linear scaling is stated in metadata; Llama 3's is a tensor of factors without a formula."""
    if factors is not None:
        scaling = _llama3_scaling(factors, rope_theta, head_size)
        expected = stretch_factors(rope_theta, head_size, scaling)
        if factors.shape == expected.shape and torch.allclose(expected, factors, rtol=1e-3):
            return scaling
        raise ValueError(
            f"its {ROPE_FACTORS} are those of no known Llama; take its Hugging Face directory, or "
            "the checkpoint that it was exported from."
        )
    rope = f"{fields['general.architecture']}.rope"
    kind = fields.get(f"{rope}.scaling.type", "linear")  # llama.cpp's default
    factor = fields.get(f"{rope}.scaling.factor") or fields.get(f"{rope}.scale_linear") or 1.0
    if kind == "none" or factor == 1.0:
        return None
    if kind != "linear":
        raise ValueError(f"its rope scaling is {kind}; supported: linear, Llama 3's.")
    return RopeScaling("linear", float(factor))


def _shortest(value: float) -> float:
    """The number that a float32 stands for: 1e-5, not 9.999999747378752e-06."""
    return float(f"{value:.6g}")


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    model = fields["tokenizer.ggml.model"]
    if model not in _KINDS:
        raise ValueError(f"its tokenizer is {model!r}; supported: {', '.join(_KINDS)}.")
    pre = fields["tokenizer.ggml.pre"] if model == "gpt2" else ""
    pre = _SAME.get(pre, pre)
    is_llama3 = pre == "llama-bpe"  # for which llama.cpp has its own defaults
    names: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    if len(names) != len(kinds):
        raise ValueError(f"it has {len(names)} tokens, but kinds of {len(kinds)}.")
    odd = [name for name, kind in zip(names, kinds, strict=True) if kind not in _KINDS[model]]
    if odd:
        raise ValueError(f"its token {odd[0]!r} is of a kind that is not supported.")
    used = [i for i, kind in enumerate(kinds) if kind != _UNUSED]
    tokens = {names[i]: i for i in used}
    if len(tokens) < len(used):
        raise ValueError("its tokenizer has a token twice.")
    ids = {key: fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "bos", *ENDS)}
    for key, i in ids.items():
        if i is not None and i >= len(names):
            raise ValueError(f"its {key}_token_id is {i}, but it has {len(names)} tokens.")
    marks = {key: names[i] for key, i in ids.items() if i is not None}
    adds_bos = fields.get("tokenizer.ggml.add_bos_token", is_llama3 or model == "llama")
    special = Special(
        {names[i]: i for i in used if kinds[i] in (_CONTROL, _UNKNOWN, _USER)},
        eos=marks.get("eos"),
        ends=tuple(marks[key] for key in ENDS if key in marks),
        bos=marks.get("bos") if adds_bos else None,
        bos_token=marks.get("bos"),
        chat_template=fields.get("tokenizer.chat_template"),
        shown=tuple(names[i] for i in used if kinds[i] == _USER),
    )
    if model == "llama":
        normal = {name: i for name, i in tokens.items() if kinds[i] == _NORMAL}
        merges = merges_of_scores(normal, fields["tokenizer.ggml.scores"])
        adds_blank = fields.get("tokenizer.ggml.add_space_prefix", True)
        prefix: Prefix = "prepend" if adds_blank else "never"
        return make_sentencepiece(tokens=tokens, merges=merges, special=special, prefix=prefix)
    merges = fields["tokenizer.ggml.merges"]
    return make_tokenizer(
        tokens=tokens, merges=merges, special=special, pre=pre, whole_pieces=is_llama3
    )
