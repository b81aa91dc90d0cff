"""Import of Hugging Face directories: config.json, safetensors (also sharded), tokenizer.json."""

import json
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from yaml import YAMLError

from datamodules.tokenizer import ENDOFTEXT, Tokenizer
from pipeline.arguments import load_yaml
from pipeline.gpt import GPTConfig
from pipeline.layers.rotary import RopeScaling
from pipeline.weights.foreign import Foreign
from pipeline.weights.names import TRAITS, Family, head_dim
from pipeline.weights.sentencepiece import make_sentencepiece, prefix_of
from pipeline.weights.vocabulary import Special, make_tokenizer, name_of_steps

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE, CARD = "chat_template.jinja", "README.md"
GENERATION_CONFIG = "generation_config.json"
FILES = (CONFIG, WEIGHTS, INDEX, TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, "model-*.safetensors")
OPTIONAL_FILES = (CARD, GENERATION_CONFIG, SPECIAL_TOKENS)  # a cache without them is complete
_HEAD = "lm_head.weight"
_WINDOW = 4096  # default sliding window of Mistral's and Qwen's configurations
_KINDS: dict[str, Family] = {**{family: family for family in TRAITS}, "mistral": "llama"}
# buffers that old files store beside the weights: GPT-2's masks, Llama's rotary frequencies
_DERIVED = re.compile(
    r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"
    r"|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)


def open_huggingface(path: Path) -> Foreign:
    """Opens a directory in transformers' format and reads its metadata.

    ValueError if a file is missing or damaged, or the model is not supported.
    """
    settings = _read_json(path / CONFIG)
    _refuse_classifier(settings)
    config = _config(settings)
    prefix = "transformer." if settings["model_type"] == "gpt2" else ""
    embedding = f"{prefix}wte.weight" if prefix else "model.embed_tokens.weight"
    files = _tensor_files(path)
    # the first GPT-2 files name their tensors without the prefix
    known = (prefix, "lm_head.")
    stored = {name if name.startswith(known) else prefix + name: name for name in files}
    if len(stored) < len(files):
        raise ValueError(f"it has a tensor twice, with and without {prefix} before its name.")
    shapes = {name: files[given].shape for name, given in stored.items()}
    skipped = {name: "computed anew" for name in shapes if _DERIVED.fullmatch(name)}
    is_tied = config.tie_embeddings and _HEAD in shapes
    if is_tied:
        skipped[_HEAD] = "the embedding again"
    wanted = {name: shape for name, shape in shapes.items() if name not in skipped}
    _refuse_quantised(settings, wanted)

    def rows_of(name: str, rows: slice) -> Tensor:
        given = stored[name]
        with safe_open(files[given].file, framework="pt") as opened:
            tensor: Tensor = opened.get_slice(given)[rows]
        if not tensor.is_floating_point():
            raise ValueError(f"its tensor {name} is {tensor.dtype}; only plain weights are read.")
        return tensor

    def is_head(tensor: Tensor, rows: slice) -> bool:
        same_shape = shapes[_HEAD] == shapes[embedding]
        return same_shape and torch.equal(rows_of(_HEAD, rows).double(), tensor.double())

    def read(name: str, rows: slice) -> Tensor:
        tensor = rows_of(name, rows)
        if is_tied and name == embedding and not is_head(tensor, rows):
            raise ValueError(
                f"its {files[_HEAD].file.name} has a {_HEAD} other than {embedding}, but its "
                f"{CONFIG} ties the two; set tie_word_embeddings to false there if both are meant."
            )
        return tensor

    return Foreign(
        config,
        _tokenizer(path, settings),
        wanted,
        read,
        "huggingface",
        skipped={stored[name]: why for name, why in skipped.items()},
        stored_as=stored,
        license=_license(path),
    )


def _refuse_classifier(settings: dict[str, Any]) -> None:
    for name in settings.get("architectures") or ():
        if str(name).endswith("Classification"):
            raise ValueError(
                f"it is a classifier ({CONFIG}: architectures, {name}); only language models are "
                "read. One that was exported from a checkpoint is used by that checkpoint."
            )


def _refuse_quantised(settings: dict[str, Any], names: Iterable[str]) -> None:
    """Refuses quantised weights; a configuration may still call them so after dequantisation."""
    stated = settings.get("quantization_config")
    if stated and any(not name.endswith((".weight", ".bias")) for name in names):
        raise ValueError(
            f"its weights are quantised ({CONFIG}: quantization_config, "
            f"{stated.get('quant_method')}); only plain ones are read: give the model that they "
            "were made from."
        )


def _config(settings: dict[str, Any]) -> GPTConfig:
    _expect(settings, is_causal=True)
    kind = str(settings.get("model_type"))
    if kind not in _KINDS:
        raise ValueError(
            f"its architecture is {kind} ({CONFIG}: model_type); supported: {', '.join(_KINDS)}."
        )
    return _gpt2_config(settings) if kind == "gpt2" else _llama_config(settings, _KINDS[kind])


def _gpt2_config(settings: dict[str, Any]) -> GPTConfig:
    _expect(settings, activation_function="gelu_new")
    _expect(settings, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    width, n_head = settings["n_embd"], settings["n_head"]
    return GPTConfig(
        n_layer=settings["n_layer"],
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=width,
        block_size=settings["n_positions"],
        vocab_size=settings["vocab_size"],
        norm_eps=settings.get("layer_norm_epsilon", 1e-5),
        rope_theta=10000.0,
        mlp_hidden=settings.get("n_inner") or 4 * width,
        tie_embeddings=settings.get("tie_word_embeddings", True),
        dropout=0.0,
        **TRAITS["gpt2"],
    )


def _llama_config(settings: dict[str, Any], family: Family) -> GPTConfig:
    _expect(settings, hidden_act="silu", attention_bias=False, mlp_bias=False)
    width, n_head = settings["hidden_size"], settings["num_attention_heads"]
    context = settings["max_position_embeddings"]
    if settings["model_type"] == "mistral" or settings.get("use_sliding_window"):
        # within a context no longer than the window, all tokens are visible
        context = min(context, settings.get("sliding_window", _WINDOW) or context)
    # where both exist, the older name was added by hand: transformers prefers it, too
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    return GPTConfig(
        n_layer=settings["num_hidden_layers"],
        n_head=n_head,
        n_kv_head=settings.get("num_key_value_heads") or n_head,
        n_embd=width,
        block_size=context,
        vocab_size=settings["vocab_size"],
        norm_eps=settings["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or settings.get("rope_theta", 10000.0)),
        mlp_hidden=settings["intermediate_size"],
        tie_embeddings=settings.get("tie_word_embeddings", False),
        dropout=0.0,
        rope_scaling=_rope_scaling(rope),
        head_dim=head_dim(settings.get("head_dim"), width, n_head),
        **TRAITS[family],
    )


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_context=int(rope["original_max_position_embeddings"]),
        )
    raise ValueError(f"its rope scaling is {kind}; supported: linear, llama3.")


def _expect(settings: dict[str, Any], file: str = CONFIG, **supported: Any) -> None:
    for key, value in supported.items():
        if settings.get(key) not in (None, value):
            raise ValueError(f"its {file} has {key} {settings[key]}; only {value} is supported.")


class _Stored(NamedTuple):
    file: Path
    shape: tuple[int, ...]


def _tensor_files(path: Path) -> dict[str, _Stored]:
    """Where every tensor is stored, by its name there."""
    if (path / WEIGHTS).is_file():  # before INDEX, as in transformers
        return _stored_in(path / WEIGHTS)
    if not (path / INDEX).is_file():
        raise ValueError(no_weights(file.name for file in path.iterdir()))
    places = _read_json(path / INDEX)["weight_map"]
    if outside := [file for file in places.values() if Path(file).name != file]:
        raise ValueError(f"its {INDEX} names a file in another folder, {outside[0]!r}.")
    files = sorted(set(places.values()))
    found = [item for file in files for item in _stored_in(path / file).items()]
    # they also differ if a tensor is in two files
    if odd := places.items() ^ {(name, stored.file.name) for name, stored in found}:
        raise ValueError(f"its {INDEX} and its files differ, such as in {min(odd)[0]}.")
    return dict(found)


def no_weights(names: Iterable[str]) -> str:
    """The error message for a folder of files with these names, which hold no readable weights."""
    found = sorted(names)
    remedy = "give a directory that has one."
    if pickles := [name for name in found if name.endswith(".bin")]:
        remedy = (
            f"{pickles[0]} is a pickle, which is never read: convert it with transformers' "
            "save_pretrained(..., safe_serialization=True)."
        )
    elif ggufs := [name for name in found if name.endswith(".gguf")]:
        remedy = f"give the path of one of its .gguf files, downloaded, such as {ggufs[0]}."
    return f"it has no {WEIGHTS}; {remedy}"


def _stored_in(file: Path) -> dict[str, _Stored]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: _Stored(file, tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"its {file.name} is missing or damaged ({error}).") from error


def _tokenizer(path: Path, settings: dict[str, Any]) -> Tokenizer:
    if not (path / TOKENIZER).is_file():
        raise ValueError(
            f"it has no {TOKENIZER}; a tokenizer.model is not read: write one beside it with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    content = _read_json(path / TOKENIZER)
    model = content["model"]
    is_sentencepiece = model.get("byte_fallback", False)
    _check_algorithm(model, is_sentencepiece)
    options = _read_json(path / TOKENIZER_CONFIG, {})
    if "added_tokens_decoder" not in options:  # with it, transformers ignores the map
        options |= _read_json(path / SPECIAL_TOKENS, {})
    special = _special(path, settings, content, options)
    parts = {"tokens": model["vocab"], "merges": model["merges"], "special": special}
    if is_sentencepiece:
        prefix = prefix_of(content)
        _expect(options, TOKENIZER_CONFIG, add_prefix_space=prefix != "never")
        return make_sentencepiece(**parts, prefix=prefix)
    _expect(options, TOKENIZER_CONFIG, add_prefix_space=False)
    normalizer = (content.get("normalizer") or {"type": None})["type"]
    if normalizer not in (None, "NFC"):
        raise ValueError(f"its tokenizer normalises text ({normalizer}); only NFC is supported.")
    pre, whole_pieces = name_of_steps(content.get("pre_tokenizer")), model.get("ignore_merges")
    return make_tokenizer(
        **parts, pre=pre, whole_pieces=bool(whole_pieces), nfc=normalizer == "NFC"
    )


def _special(
    path: Path, settings: dict[str, Any], content: dict[str, Any], options: dict[str, Any]
) -> Special:
    added = {token["content"]: token for token in content.get("added_tokens", [])}
    for name, token in added.items():
        if token.get("lstrip") or token.get("rstrip"):
            raise ValueError(f"its tokenizer has {name!r}, which strips blanks.")
    kind = str(options.get("tokenizer_class") or settings["model_type"]).lower()
    usual = {"gpt2": ("bos_token", "eos_token"), "qwen": ("eos_token",)}.get(kind[:4], ())
    if ENDOFTEXT in added:  # the default of these classes, whose files may not say so
        options = dict.fromkeys(usual, ENDOFTEXT) | options
    ids = {name: token["id"] for name, token in added.items()}
    names = {i: name for name, i in ids.items()}
    end_ids = _end_ids(path, settings)
    if odd := [i for i in end_ids if i not in names]:
        raise ValueError(
            f"its eos_token_id {odd[0]} is none of the tokens that {TOKENIZER} adds; correct it in "
            f"{CONFIG}, or in {GENERATION_CONFIG} where that has it."
        )
    return Special(
        ids,
        eos=_name(options.get("eos_token")) or names.get(next(iter(end_ids), None)),
        ends=tuple(names[i] for i in end_ids),
        bos=_leading_token(content.get("post_processor")),
        bos_token=_name(options.get("bos_token")),
        chat_template=_chat_template(path, options),
        shown=tuple(name for name, token in added.items() if not token["special"]),
    )


def _end_ids(path: Path, settings: dict[str, Any]) -> list[int]:
    """Ids that end a text: those of the model's configuration, then the generation options'."""
    both = (settings, _read_json(path / GENERATION_CONFIG, {}))
    found = [options.get("eos_token_id") for options in both]
    lists = [ids if isinstance(ids, list) else [ids] for ids in found if ids is not None]
    return [i for i in dict.fromkeys(chain(*lists)) if i is not None]


def _check_algorithm(model: dict[str, Any], is_sentencepiece: bool) -> None:
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its tokenizer is {model['type']}; only BPE is supported.")
    # byte fallback makes unk_token irrelevant, but tokens that no merge makes are not supported
    odd = "ignore_merges" if is_sentencepiece else "unk_token"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", odd):
        if model.get(key):
            raise ValueError(f"its tokenizer has {key} {model[key]!r}, which is not supported.")


def _name(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _leading_token(processor: Any) -> str | None:
    """The special token that a post-processor puts before every text."""
    given = processor or {"type": "ByteLevel"}
    steps = given["processors"] if given["type"] == "Sequence" else [given]
    leading: str | None = None
    for step in steps:
        match step["type"], step.get("single"):
            case ("ByteLevel", _) | ("TemplateProcessing", [{"Sequence": _}]):
                pass
            case "TemplateProcessing", [{"SpecialToken": token}, {"Sequence": _}]:
                leading = token["id"]
            case _:
                raise ValueError(f"its post-processor {step['type']} adds more than a first token.")
    return leading


def _chat_template(path: Path, options: dict[str, Any]) -> str | None:
    if (path / CHAT_TEMPLATE).is_file():
        return (path / CHAT_TEMPLATE).read_text(encoding="utf-8")
    template = options.get("chat_template")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def _license(path: Path) -> str | None:
    """The license stated in the front matter of its model card, if it has one."""
    if not (path / CARD).is_file():
        return None
    text = (path / CARD).read_text(encoding="utf-8", errors="replace")
    head = text[3:].partition("\n---")[0] if text.startswith("---") else ""
    try:
        stated = load_yaml(head)
    except (ValueError, YAMLError):
        return None
    found = stated.get("license") if isinstance(stated, dict) else None
    return found if isinstance(found, str) else None


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not path.is_file():
        return default
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"it has no {path.name}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {path.name} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"its {path.name} holds no JSON object.")
    return content
