"""Export of a language model as a GGUF file for llama.cpp, with a Modelfile for Ollama beside it.

The file is read back in tests/test_export_gguf.py, and by llama.cpp itself in
tests/test_export_llama_cpp.py. With q8_0 llama.cpp rounds activations to 8 bits, too: one of four
greedy chats of SmolLM2-135M repeats itself endlessly there, while the same file answers here.
"""

from pathlib import Path
from typing import Literal

import gguf
from gguf import GGUFWriter
from torch import Tensor

from datamodules.prompts import TEMPLATE
from datamodules.tokenizer import Vocabulary
from pipeline.classifier import GPTClassifier
from pipeline.console import say
from pipeline.directories import Writers
from pipeline.gpt import GPTConfig
from pipeline.layers.rotary import RopeScaling, stretch_factors
from pipeline.models import Loaded
from pipeline.weights.fetch import EXPORTED_GGUF
from pipeline.weights.gguf_in import ENDS, ROPE_FACTORS
from pipeline.weights.huggingface_out import chat_template
from pipeline.weights.names import entries, family_of
from pipeline.weights.sentencepiece import scores_of
from pipeline.weights.templates import default_system, go, stop_words
from pipeline.weights.vocabulary import merges_of, pre_tokenizer_of, spelled

GGUFType = Literal["f32", "f16", "q8_0"]
MODEL, MODELFILE = EXPORTED_GGUF, "Modelfile"
_IN_FLOAT32 = ("position_embd.weight",)  # llama.cpp adds it to float32 embeddings
_LARGEST_F16 = 65504
_METASPACE = {"always": "where there is none", "first": "before a text that begins with none"}


def gguf_writers(loaded: Loaded, kind: GGUFType, *, name: str, license: str | None) -> Writers:
    """Writers of a language model's two files, the GGUF file and the Modelfile.

    Norms and biases stay in float32, whatever the kind; the license is an SPDX identifier.
    ValueError if llama.cpp does not support the model or its tokenizer, or a number is out of the
    range of `kind`.
    """
    family = family_of(loaded.gpt.config)
    _refuse_unknown(loaded, family)
    writer = GGUFWriter(None, family)
    writer.add_name(name)
    if license is not None:
        writer.add_license(license)
    _add_config(writer, loaded.gpt.config)
    _add_tokenizer(writer, loaded)
    _add_tensors(writer, loaded, kind)

    def write(path: Path) -> None:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    text = modelfile(loaded)
    return {MODEL: write, MODELFILE: lambda path: path.write_text(text, encoding="utf-8")}


def _refuse_unknown(loaded: Loaded, family: str) -> None:
    """Raises ValueError for what llama.cpp does not support, at all or for this family."""
    config = loaded.gpt.config
    width = f"whose {config.n_head} heads are {config.head_size} wide where the model is"
    unknown = {
        f"classifier such as {loaded.path}": isinstance(loaded.model, GPTClassifier),
        f"{family} with Llama 3's rope scaling": bool(_llama3(config)) and family != "llama",
        f"qwen2 {width} {config.n_embd}": family == "qwen2" and config.head_dim is not None,
    }
    for what, is_it in unknown.items():
        if is_it:
            raise ValueError(f"llama.cpp has no {what}; export it with --format huggingface.")


def _llama3(config: GPTConfig) -> RopeScaling | None:
    scaling = config.rope_scaling
    return scaling if scaling and scaling.kind == "llama3" else None


def modelfile(loaded: Loaded) -> str:
    """The Modelfile that `ollama create NAME -f Modelfile` reads."""
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
    if config.rope_scaling and not _llama3(config):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def _add_merging(writer: GGUFWriter, vocabulary: Vocabulary, names: list[str]) -> None:
    """Adds the scores or merges that turn text into tokens; `names` are the tokens of all ids."""
    if form := vocabulary.sentencepiece:
        scores = scores_of(vocabulary, form)
        if form.prefix in _METASPACE:
            say(
                "texts that begin with a blank, and conversations, may get other ids: llama.cpp "
                f"puts a blank before every text and behind every special token, the tokenizer "
                f"{vocabulary.name} only {_METASPACE[form.prefix]}"
            )
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([scores.get(name, 0.0) for name in names])
        writer.add_add_space_prefix(form.prefix != "never")
        return
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
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_merges([" ".join(pair) for pair in merges.pairs])


def _add_tokenizer(writer: GGUFWriter, loaded: Loaded) -> None:
    tokenizer, n_rows = loaded.tokenizer, loaded.gpt.config.vocab_size
    assert n_rows is not None
    tokens = [f"[PAD{i}]" for i in range(n_rows)]  # embedding rows without a token
    kinds = [gguf.TokenType.UNUSED] * n_rows
    for name, i in spelled(tokenizer.vocabulary).items():
        tokens[i], kinds[i] = name, gguf.TokenType.NORMAL
        if name in tokenizer.special_ids:
            is_shown = name in tokenizer.vocabulary.shown
            kinds[i] = gguf.TokenType.USER_DEFINED if is_shown else gguf.TokenType.CONTROL
    if form := tokenizer.vocabulary.sentencepiece:
        for i in form.byte_ids:
            kinds[i] = gguf.TokenType.BYTE
    _add_merging(writer, tokenizer.vocabulary, tokens)
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
    share = "ALL" if kind == "f32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{share}_{kind.upper()}"])
    config, tensors = loaded.gpt.config, loaded.gpt.tensors()
    if scaling := _llama3(config):
        factors = stretch_factors(config.rope_theta, config.head_size, scaling)
        writer.add_tensor(ROPE_FACTORS, factors.numpy())
    kept = []
    for entry in entries(config, "gguf"):
        tensor = entry.join(tensors).float()
        stored = _stored_as(entry.theirs, tensor, kind)
        if kind == "q8_0" and stored == "f16":
            kept.append(entry.theirs)
        as_kind = gguf.GGMLQuantizationType[stored.upper()]
        stored_tensor = gguf.quantize(tensor.numpy(), as_kind)
        writer.add_tensor(entry.theirs, stored_tensor, raw_dtype=as_kind)
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
