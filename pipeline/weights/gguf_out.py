"""A language model as a GGUF file that llama.cpp loads, and a Modelfile for Ollama beside it.

What is written is read back in tests/test_export_gguf.py; llama.cpp itself reads it in
tests/test_export_llama_cpp.py. With q8_0 llama.cpp rounds activations to 8 bits too: one of four
greedy chats of SmolLM2-135M goes round in a loop there, though the file, read here, answers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from datamodules.prompts import TEMPLATE
from datamodules.tokenizer import Vocabulary
from pipeline.classifier import GPTClassifier
from pipeline.console import say
from pipeline.directories import Writers
from pipeline.gpt import GPTConfig
from pipeline.layers.rotary import stretch_factors
from pipeline.models import Loaded
from pipeline.weights.fetch import EXPORTED_GGUF
from pipeline.weights.gguf_in import ENDS, ROPE_FACTORS, STRETCH, STRETCH_FIELD
from pipeline.weights.huggingface_out import chat_template
from pipeline.weights.names import entries, family_of
from pipeline.weights.sentencepiece import scores_of
from pipeline.weights.templates import default_system, go, stop_words
from pipeline.weights.vocabulary import merges_of, pre_tokenizer_of, spelled

if TYPE_CHECKING:
    from gguf import GGUFWriter

GGUFType = Literal["f32", "f16", "q8_0"]
MODEL, MODELFILE = EXPORTED_GGUF, "Modelfile"
_IN_FLOAT32 = ("position_embd.weight",)  # llama.cpp adds it to what it has in float32
_LARGEST_F16 = 65504
_METASPACE = {"always": "where there is none", "first": "before a text that begins with none"}


def gguf_writers(loaded: Loaded, kind: GGUFType, *, name: str, license: str | None) -> Writers:
    """A writer for each of the two files.

    Args:
        loaded: a language model, plain.
        kind: type of the matrices; norms and biases stay in float32.
        name: name of the model.
        license: licence of the weights, as an SPDX identifier, if known.

    Raises:
        ValueError: where llama.cpp has no such model, or cannot run its tokenizer.
    """
    if isinstance(loaded.model, GPTClassifier):
        raise ValueError(
            f"{loaded.path} is a classifier, which llama.cpp cannot run; "
            "export it with --format huggingface."
        )
    family = family_of(loaded.gpt.config)
    _check_family(family, loaded.gpt.config)
    add_merging = _merging(loaded.tokenizer.vocabulary)

    def write(path: Path) -> None:
        from gguf import GGUFWriter

        writer = GGUFWriter(path, family)
        writer.add_name(name)
        if license is not None:
            writer.add_license(license)
        _add_config(writer, loaded.gpt.config)
        _add_tokenizer(writer, loaded, add_merging)
        _add_tensors(writer, loaded, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    text = modelfile(loaded)
    return {MODEL: write, MODELFILE: lambda path: path.write_text(text, encoding="utf-8")}


def _check_family(family: str, config: GPTConfig) -> None:
    """Refuses what llama.cpp has for other families alone."""
    if family != "llama" and _is_llama3(config):
        raise ValueError(
            f"llama.cpp has no {family} with Llama 3's rope scaling; export it with --format "
            "huggingface."
        )
    if family == "qwen2" and config.head_dim is not None:
        raise ValueError(
            f"llama.cpp has no qwen2 whose {config.n_head} heads are {config.head_size} wide where "
            f"the model is {config.n_embd}; export it with --format huggingface."
        )


def _is_llama3(config: GPTConfig) -> bool:
    return config.rope_scaling is not None and config.rope_scaling.kind == "llama3"


def modelfile(loaded: Loaded) -> str:
    """What `ollama create NAME -f Modelfile` reads."""
    tokenizer, style = loaded.tokenizer, loaded.meta.get("prompt_style")
    lines = [f"FROM ./{MODEL}"]
    if style is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif template := go(tokenizer, style):
        lines.append(f'TEMPLATE """{template}"""')
        if style == TEMPLATE and (system := default_system(tokenizer)):
            lines.append(f'SYSTEM """{system}"""')
    else:
        lines.append(f"# no TEMPLATE: Ollama compares the one in {MODEL} with those that it knows")
    stops = stop_words(tokenizer, style)
    return "\n".join([*lines, *(f'PARAMETER stop "{word}"' for word in stops)]) + "\n"


def _add_config(writer: GGUFWriter, config: GPTConfig) -> None:
    from gguf import RopeScalingType

    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.mlp_hidden)
    writer.add_head_count(config.n_head)
    if config.position == "learned":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    assert config.vocab_size is not None
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_size)
    if config.head_dim is not None:
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    if config.rope_scaling is not None and _is_llama3(config):
        low, high, original = (STRETCH_FIELD.format(key) for key in STRETCH)
        # for our own reader: llama.cpp has the factors alone
        writer.add_float64(low, config.rope_scaling.low_freq_factor)
        writer.add_float64(high, config.rope_scaling.high_freq_factor)
        writer.add_uint32(original, config.rope_scaling.original_context)


def _merging(vocabulary: Vocabulary) -> Callable[[GGUFWriter, list[str]], None]:
    """Writes what makes tokens of a text, given the names of all ids."""
    if form := vocabulary.sentencepiece:
        scores = scores_of(vocabulary, form)
        if form.prefix in ("always", "first"):
            say(
                "texts that begin with a blank, and conversations, may get other ids: llama.cpp "
                f"puts a blank before every text and behind every special token, the tokenizer "
                f"{vocabulary.name} only {_METASPACE[form.prefix]}"
            )

        def by_scores(writer: GGUFWriter, names: list[str]) -> None:
            writer.add_tokenizer_model("llama")
            writer.add_tokenizer_pre("default")
            writer.add_token_scores([scores.get(name, 0.0) for name in names])
            writer.add_add_space_prefix(form.prefix != "never")

        return by_scores
    pre, merges = pre_tokenizer_of(vocabulary), merges_of(vocabulary)
    if merges.whole is not None and pre != "llama-bpe":
        raise ValueError(
            f"the tokenizer {vocabulary.name} has a token {merges.whole!r} that no merge makes, "
            "for which llama.cpp would give other ids; export it with --format huggingface."
        )

    if vocabulary.nfc:
        say(
            f"the tokenizer {vocabulary.name} first composes characters (NFC), which llama.cpp "
            "does not: texts with combining marks may get other ids there"
        )

    def by_merges(writer: GGUFWriter, names: list[str]) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(pair) for pair in merges.pairs])

    return by_merges


def _add_tokenizer(
    writer: GGUFWriter, loaded: Loaded, add_merging: Callable[[GGUFWriter, list[str]], None]
) -> None:
    from gguf import TokenType

    tokenizer, n_rows = loaded.tokenizer, loaded.gpt.config.vocab_size
    assert n_rows is not None
    tokens = [f"[PAD{i}]" for i in range(n_rows)]  # rows of the embedding that no text has
    kinds = [TokenType.UNUSED] * n_rows
    for name, i in spelled(tokenizer.vocabulary).items():
        tokens[i], kinds[i] = name, TokenType.NORMAL
        if name in tokenizer.special_ids:
            is_shown = name in tokenizer.vocabulary.shown
            kinds[i] = TokenType.USER_DEFINED if is_shown else TokenType.CONTROL
    if form := tokenizer.vocabulary.sentencepiece:
        for i in form.byte_ids:
            kinds[i] = TokenType.BYTE
    add_merging(writer, tokens)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.eos_id)
    stops = stop_words(tokenizer, loaded.meta.get("prompt_style"))
    more = [stop for stop in stops if stop != tokenizer.vocabulary.eos]
    for key, stop in zip(ENDS, more, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", tokenizer.special_ids[stop])
    if left_out := more[len(ENDS) :]:
        say(f"a GGUF names {len(ENDS) + 1} ends of a text; not among them: {', '.join(left_out)}")
    writer.add_add_bos_token(bool(tokenizer.bos_ids))
    if bos := tokenizer.vocabulary.bos_token:
        writer.add_bos_token_id(tokenizer.special_ids[bos])
    if template := chat_template(loaded):
        writer.add_chat_template(template)


def _add_tensors(writer: GGUFWriter, loaded: Loaded, kind: GGUFType) -> None:
    from gguf import GGMLQuantizationType, LlamaFileType, quants

    file_types = {
        "f32": LlamaFileType.ALL_F32,
        "f16": LlamaFileType.MOSTLY_F16,
        "q8_0": LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_file_type(file_types[kind])
    config, tensors = loaded.gpt.config, loaded.gpt.tensors()
    if config.rope_scaling is not None and _is_llama3(config):
        factors = stretch_factors(config.rope_theta, config.head_size, config.rope_scaling)
        writer.add_tensor(ROPE_FACTORS, factors.numpy())
    kept = []
    for entry in entries(config, "gguf"):
        tensor = entry.join(tensors).float()
        stored = _stored_as(entry.theirs, tensor, kind)
        if kind == "q8_0" and stored == "f16":
            kept.append(entry.theirs)
        quantised = GGMLQuantizationType[stored.upper()]
        writer.add_tensor(
            entry.theirs, quants.quantize(tensor.numpy(), quantised), raw_dtype=quantised
        )
    if kept:
        say(
            f"{len(kept)} tensors stay f16, as q8_0 needs rows of a multiple of 32 numbers: "
            f"{', '.join(kept)}"
        )


def _stored_as(name: str, tensor: Tensor, kind: GGUFType) -> GGUFType:
    if tensor.dim() == 1 or name in _IN_FLOAT32:
        return "f32"
    stored: GGUFType = "f16" if kind == "q8_0" and tensor.shape[-1] % 32 else kind
    if stored == "f16" and float(tensor.abs().max()) > _LARGEST_F16:
        raise ValueError(f"{name} has numbers beyond {_LARGEST_F16}, the largest f16; give f32.")
    return stored
