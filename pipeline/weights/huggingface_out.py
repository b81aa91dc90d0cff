"""Export of a model as a Hugging Face directory, which transformers, vLLM and others load.

A classifier becomes a ...ForSequenceClassification, whose head has no bias. Ours has one only with
GPT-2, where shifting the final norm's bias by d with W (h + d) = W h + b replaces it without loss.
Logits, decisions and ids are compared with transformers' in tests/test_export_huggingface.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from datamodules.prompts import stop_ids
from datamodules.tokenizer import Vocabulary
from pipeline.checkpoint import json_writer
from pipeline.classifier import GPTClassifier
from pipeline.directories import Writers
from pipeline.gpt import GPTConfig
from pipeline.models import Loaded
from pipeline.weights import huggingface_in as hf
from pipeline.weights.names import Family, entries, family_of
from pipeline.weights.sentencepiece import tokenizer_json_parts
from pipeline.weights.templates import jinja
from pipeline.weights.vocabulary import PRE_TOKENIZERS, merges_of, pre_tokenizer_of, spelled

_CLASSES = {
    "llama": ("LlamaForCausalLM", "LlamaForSequenceClassification"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
}
_BIASES = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",)}
_NEVER_SHORTENS = int(1e30)  # transformers' own value for a tokenizer that never truncates


def huggingface_writers(loaded: Loaded, dtype: torch.dtype) -> Writers:
    """Writers of all files; ValueError if model or tokenizer has no counterpart in transformers."""
    tensors = {name: t.to(dtype) for name, t in huggingface_tensors(loaded).items()}
    return {
        hf.CONFIG: json_writer(_config(loaded, dtype)),
        hf.WEIGHTS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
        **tokenizer_writers(loaded),
    }


def tokenizer_writers(loaded: Loaded) -> Writers:
    """Writers of the tokenizer's files, and a language model's generation options and template."""
    tokenizer, meta = loaded.tokenizer, loaded.meta
    suffix = tokenizer.encode(meta.get("suffix") or "", tokenizer.encode("a"))  # after any text
    writers = {
        hf.TOKENIZER: json_writer(tokenizer_json(tokenizer.vocabulary, suffix)),
        hf.TOKENIZER_CONFIG: json_writer(_tokenizer_config(loaded)),
    }
    if isinstance(loaded.model, GPTClassifier):
        return writers
    ends = {"eos_token_id": stop_ids(tokenizer, meta.get("prompt_style"))}
    writers[hf.GENERATION_CONFIG] = json_writer(_token_ids(loaded) | ends)
    if template := chat_template(loaded):
        writers[hf.CHAT_TEMPLATE] = lambda path: path.write_text(template, encoding="utf-8")
    return writers


def huggingface_tensors(loaded: Loaded) -> dict[str, Tensor]:
    """Every tensor by transformers' name, in its layout."""
    model, config = loaded.model, loaded.gpt.config
    tensors, head = loaded.gpt.tensors(), {}
    if isinstance(model, GPTClassifier):
        head["score.weight"] = model.classifier.weight.detach()
        if model.classifier.bias is not None:
            tensors["final_norm.bias"] = shifted_bias(model)
    table = [entry for entry in entries(config, "huggingface") if set(entry.ours) <= set(tensors)]
    return {entry.theirs: entry.join(tensors) for entry in table} | head


@torch.no_grad()
def shifted_bias(model: GPTClassifier) -> Tensor:
    """The final norm's bias (C,), shifted to replace the head's; ValueError if it cannot be."""
    head, norm = model.classifier, model.gpt.final_norm
    weight, bias = head.weight.double(), head.bias.double()
    shift = torch.linalg.pinv(weight) @ bias
    if not torch.allclose(weight @ shift, bias, rtol=1e-6, atol=1e-9):
        raise ValueError(
            "the rows of the classifier's head depend on one another, so its bias cannot be "
            "written without one; train it further."
        )
    assert isinstance(norm.bias, Tensor)
    return (norm.bias.double() + shift).to(norm.bias.dtype)


def tokenizer_json(vocabulary: Vocabulary, suffix: Sequence[int] = ()) -> dict[str, Any]:
    """A tokenizer.json for the `tokenizers` library, which adds the suffix's ids to every text.

    The library recognises special tokens in plain text, which the tokenizer here never does;
    transformers leaves that off for a classifier, as `_tokenizer_config` tells it to.
    ValueError for a vocabulary that it cannot run with the same ids.
    """
    form = vocabulary.sentencepiece
    parts = tokenizer_json_parts(vocabulary, form) if form else _byte_level_parts(vocabulary)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": name not in vocabulary.shown}
            for name, i in sorted(vocabulary.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": _around(vocabulary, suffix),
        "decoder": parts["decoder"],
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token")),
            **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix")),
            "fuse_unk": False,
            "byte_fallback": form is not None,
            "ignore_merges": parts["ignore_merges"],
            "vocab": spelled(vocabulary),
            "merges": parts["merges"],
        },
    }


def _byte_level_parts(vocabulary: Vocabulary) -> dict[str, Any]:
    steps = [
        {**step, "trim_offsets": True} if step["type"] == "ByteLevel" else step
        for step in PRE_TOKENIZERS[pre_tokenizer_of(vocabulary)].steps
    ]
    merges = merges_of(vocabulary)
    return {
        "normalizer": {"type": "NFC"} if vocabulary.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if steps[1:] else steps[0],
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "ignore_merges": merges.whole is not None,
        "merges": merges.pairs,
    }


def _around(vocabulary: Vocabulary, suffix: Sequence[int]) -> dict[str, Any] | None:
    """A post-processor that puts BOS before a text, and a suffix after it."""
    before = {bos: [vocabulary.special_tokens[bos]]} if (bos := vocabulary.bos) else {}
    after = {"suffix": list(suffix)} if suffix else {}
    if not before | after:
        return None
    names = {i: name for name, i in spelled(vocabulary).items()}

    def parts(text: str, segment: int) -> list[dict[str, Any]]:
        return [
            {"Sequence" if name == text else "SpecialToken": {"id": name, "type_id": segment}}
            for name in (*before, text, *after)
        ]

    return {
        "type": "TemplateProcessing",
        "single": parts("A", 0),
        "pair": parts("A", 0) + parts("B", 1),
        "special_tokens": {
            name: {"id": name, "ids": own, "tokens": [names[i] for i in own]}
            for name, own in (before | after).items()
        },
    }


def _tokenizer_config(loaded: Loaded) -> dict[str, Any]:
    vocabulary = loaded.tokenizer.vocabulary
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": vocabulary.eos,
        "pad_token": vocabulary.eos,  # never made from text, so no real token looks like padding
        **({"bos_token": vocabulary.bos_token} if vocabulary.bos_token else {}),
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": isinstance(loaded.model, GPTClassifier),  # a chat's are meant
        "model_max_length": loaded.meta.get("max_length", _NEVER_SHORTENS),
    }


def _token_ids(loaded: Loaded) -> dict[str, Any]:
    eos_id, bos_ids = loaded.tokenizer.eos_id, loaded.tokenizer.bos_ids
    bos_id = bos_ids[0] if bos_ids else None
    return {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}


def chat_template(loaded: Loaded) -> str | None:
    """Jinja source of the style that the model was tuned with, or of its published template.

    A tuned model answers without thinking, as in tuning, even if the template has a switch for it.
    """
    style, published = loaded.meta.get("prompt_style"), loaded.tokenizer.vocabulary.chat_template
    source = jinja(loaded.tokenizer, style) if style else published
    thinks = source is not None and "enable_thinking" in source and loaded.meta.get("dataset")
    return f"{{%- set enable_thinking = false %}}{source}" if thinks else source


def _config(loaded: Loaded, dtype: torch.dtype) -> dict[str, Any]:
    config, is_classifier = loaded.gpt.config, isinstance(loaded.model, GPTClassifier)
    family = family_of(config)
    values = {
        "architectures": [_CLASSES[family][is_classifier]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **_token_ids(loaded),
        **(_gpt2_config(config) if family == "gpt2" else _llama_config(config, family)),
    }
    if is_classifier:
        names: list[str] = loaded.meta["label_names"]
        values["id2label"] = {str(i): name for i, name in enumerate(names)}
        values["label2id"] = {name: i for i, name in enumerate(names)}
        values["problem_type"] = "single_label_classification"
    return values


def _gpt2_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # llama.cpp's converter reads this
        "n_inner": config.mlp_hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
    }


def _llama_config(config: GPTConfig, family: Family) -> dict[str, Any]:
    # not a field of Qwen2's configuration, though its model uses it if present
    heads = {"head_dim": config.head_size} if config.head_dim or family != "qwen2" else {}
    return {
        **heads,
        **dict.fromkeys(_BIASES.get(family, ()), False),
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_hidden,
        "max_position_embeddings": config.block_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config),
        "attention_dropout": 0.0,
    }


def _rope_scaling(config: GPTConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        values["low_freq_factor"] = scaling.low_freq_factor
        values["high_freq_factor"] = scaling.high_freq_factor
        values["original_max_position_embeddings"] = scaling.original_context
    return values
