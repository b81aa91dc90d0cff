"""Tiny models in the file formats of other tools, written by those tools, to test importing."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from datamodules.chat_template import render
from datamodules.prompts import TEMPLATE, Message, encode_conversation, encode_prompt
from pipeline.models import load

CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
EOS, START = "<|im_end|>", "<|im_start|>"
CHATML = (  # SmolLM2's
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (  # Llama 3's
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = (
    "the quick brown fox doesn't jump over 12 lazy dogs, and it'll say: 'Hello, World!'\n\n"
    "def main(arguments: list[str]) -> None:\n    return {'a': 1, 'b': [2, 3]}  # done\n"
    "Ünïcödé naïve café — 你好，世界！中国的人在这里。 こんにちは "
    "한국어 Привет мир नमस्ते العربية 😀👩‍👩‍👧\t\r\n"
)
POOLS = (
    "abcdefgh ABC the def print()[]{};:=+-*/<>!|&^%$#@~`\\_.,?\n\t ",
    "def f(x): return x\n    for i in range(10):\n\t\tif x >= 1: x += 2\r\n",
    "的一是不了人我在有他这中大来上国你好，世界！。「」",
    "😀😁🏳️‍🌈👩‍👩‍👧🇩🇪🏴\U000e0067\U000e0062\U000e007f©️❤️",
    "e\u0301\u0308a\u0323\u200d\ufe0fo\u0335ก็ำ\u1160\u0e31",
    " \t\n\r\u00a0\u2003\u3000\x85\u2028\x0b\x0c",
    "0123456789 ٠١٢٣ ०१२ ⅧⅣ ½¾ ²³ ①⑳ 𝟘𝟙 ೧೨ 一二 \n",
    "".join(map(chr, range(32))) + "\x7f\x80\x9f\xad\ufeff",
    "'s't're've'm'll'd'S'LL'Re ’s don't it's 'ſ'",
    "ñüßЖдשאבتहिन्दी한국어ไทยǅʰªº",
    "!?.,:;\"'()[]<>@#$%^&*_+-=`~|\\/…—",
    "\uf8ff\U000f0000\U00100000\U00040000\U000e0041\u0378\uffff",
)


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """By llama.cpp's names, in `tokenizers`' words."""
    byte_level = pre_tokenizers.ByteLevel
    if name == "gpt-2":
        return byte_level(add_prefix_space=False)
    if name == "smollm":
        first: Any = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([first, byte_level(add_prefix_space=False)])
    digits = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}[name]
    first = pre_tokenizers.Split(Regex(_WORDS.replace("DIGITS", digits)), "isolated")
    return pre_tokenizers.Sequence([first, byte_level(add_prefix_space=False, use_regex=False)])


def train(
    pre: str,
    special: tuple[str, ...] = ("<|endoftext|>", START, EOS),
    *,
    special_first: bool = True,
    every_byte: bool = True,
    vocab_size: int = 500,
) -> Tokenizer:
    """A real byte-level BPE, as its makers would train it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizer(pre)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special) if special_first else [],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()) if every_byte else [],
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 2 + list(fuzz(200, seed=1)), trainer)
    bpe.add_special_tokens(list(special))
    return bpe


@cache
def fuzz(n_strings: int, seed: int = 0) -> list[str]:
    """Strings of runs of characters from up to four pools each, the same for the same seed."""
    rng = random.Random(seed)
    return [_mixed(rng) for _ in range(n_strings)]


def _mixed(rng: random.Random) -> str:
    pools = rng.sample(POOLS, rng.randint(1, 4))
    runs = (rng.choice(rng.choice(pools)) * rng.choice((1, 1, 1, 2, 3, 7)) for _ in range(30))
    return "".join(list(runs)[: rng.randint(1, 30)])


def with_leading(bpe: Tokenizer, token: str) -> Tokenizer:
    """A tokenizer that puts a special token before every text, as Llama 3's does."""
    leading = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, bpe.token_to_id(token))]
    )
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), leading])
    return bpe


def save_tokenizer(
    bpe: Tokenizer, folder: Path, *, eos: str = EOS, template: str | None = CHATML, **tokens: str
) -> PreTrainedTokenizerFast:
    """Written by transformers."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=eos, chat_template=template, **tokens
    )
    fast.save_pretrained(folder)
    return fast


def random_model(family: str, vocab_size: int, **changes: Any) -> Any:
    """transformers' GPT-2, or another with grouped queries, every parameter random but fixed."""
    shared: dict[str, Any] = {
        "vocab_size": vocab_size,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    if family == "gpt2":
        small = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64}
        model: Any = GPT2LMHeadModel(GPT2Config(**{**shared, **small, **changes}))
    else:
        small = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        small |= {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
        config_class, model_class = CLASSES[family]
        model = model_class(config_class(**{**shared, **small, **changes}))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        tensor.data.normal_(float("norm" in name or "ln_" in name), 0.15, generator=generator)
    return model.eval()


def write_gguf(
    path: Path,
    model: Any,
    bpe: Tokenizer | None,
    *,
    pre: str = "smollm",
    kind: str = "F32",
    change: Any = None,
    chat_template: str | None = CHATML,
) -> Any:
    """A model as llama.cpp's convert_hf_to_gguf writes it; transformers' with the same numbers.

    Args:
        path: of the file.
        model: of transformers.
        bpe: its tokenizer, unless `change` adds one.
        pre: llama.cpp's name of the pre-tokenizer.
        kind: how matrices are stored.
        change: called with the writer before the file is written.
        chat_template: Jinja source, if any.
    """
    config, is_gpt2 = model.config, model.config.model_type == "gpt2"
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if not is_gpt2:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        if config.model_type == "llama":
            writer.add_rope_dimension_count(config.head_dim)
        if config.model_type == "qwen3":
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if bpe is not None:
        _add_tokenizer(writer, bpe, pre, chat_template)
    if change:
        change(writer)
    stored = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values, back = _as_llama_cpp(name, tensor.float().numpy(), config)
        how = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        is_k_quant = how.name.endswith("_K")
        raw = _random_blocks(values.shape, how) if is_k_quant else gguf.quantize(values, how)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=how)
        stored[name] = torch.from_numpy(back(gguf.dequantize(raw, how)).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(stored, strict=False)
    return model


def _add_tokenizer(writer: gguf.GGUFWriter, bpe: Tokenizer, pre: str, template: str | None) -> None:
    special = {token.content for token in bpe.get_added_tokens_decoder().values()}
    names = [bpe.id_to_token(i) for i in range(bpe.get_vocab_size())]
    merges = json.loads(bpe.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if name in special else gguf.TokenType.NORMAL for name in names]
    )
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(names.index(EOS))
    writer.add_bos_token_id(names.index(START))
    writer.add_add_bos_token(False)
    if template:
        writer.add_chat_template(template)


def _as_llama_cpp(name: str, values: Any, config: Any) -> tuple[Any, Any]:
    """A tensor as it lies in the file, and how it is laid back."""
    heads = {"q_proj": config.num_attention_heads}
    heads["k_proj"] = getattr(config, "num_key_value_heads", 0)
    part = name.split(".")[-2]
    if part in heads and config.model_type == "llama":
        halves, pairs = (heads[part], 2, -1), (heads[part], -1, 2)
        rows, width = values.shape

        def swap(matrix: Any, halves: tuple[int, int, int]) -> Any:
            return matrix.reshape(*halves, width).swapaxes(1, 2).reshape(rows, width)

        return swap(values, halves), lambda matrix: swap(matrix, pairs)
    if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return values.T.copy(), lambda matrix: matrix.T
    return values, lambda matrix: matrix


def gguf_name(name: str) -> str:
    kind = {"model.": gguf.MODEL_ARCH.QWEN3}.get(name[:6], gguf.MODEL_ARCH.GPT2)
    found = _gguf_names(kind).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found, name
    return found


@cache
def _gguf_names(kind: gguf.MODEL_ARCH) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(kind, 64)


def _random_blocks(shape: tuple[int, ...], how: gguf.GGMLQuantizationType) -> Any:
    """Blocks of K-quants, which gguf cannot make of numbers: any bits, with scales of any size."""
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[how]
    rng = np.random.default_rng(0)
    blocks = rng.integers(256, size=(*shape[:-1], shape[-1] // n_values, n_bytes), dtype=np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for place in places[how.name]:
        scales = rng.uniform(1e-4, 1e-3, blocks.shape[:-1]).astype(np.float16)
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def said_of(source: Path) -> str | None:
    """What is said of a source in one line that names it; nothing where it is a model."""
    try:
        load(source)
    except ValueError as error:
        message = str(error)
    else:
        return None
    assert str(source) in message
    assert "\n" not in message
    return message


def refusal(source: Path) -> str:
    """The line that refuses a source."""
    message = said_of(source)
    assert message is not None
    return message


def conversation(
    ours: Any, theirs: Any, messages: list[Message], reply: str
) -> tuple[list[int], list[int]]:
    """Ids of a prompt, labels with the reply: asserts that text and ids are transformers'."""
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render(ours, messages, opening=True) == text
    prompt = encode_prompt(ours, TEMPLATE, messages)
    assert prompt == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    replied = [*messages, Message(role="assistant", content=reply)]
    ids, labels = encode_conversation(ours, TEMPLATE, replied, supervise="response")
    assert ids == theirs.apply_chat_template(replied, return_dict=False)
    assert ids[: len(prompt)] == prompt
    return prompt, labels
