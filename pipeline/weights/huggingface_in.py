"""Hugging Face directories: config.json, safetensors (also sharded), tokenizer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from datamodules.tokenizer import Tokenizer
from pipeline.gpt import GPTConfig, RopeScaling
from pipeline.weights.foreign import Foreign
from pipeline.weights.names import entries
from pipeline.weights.vocabulary import make_tokenizer, name_of_steps

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, CARD = "chat_template.jinja", "README.md"
FILES = (CONFIG, WEIGHTS, INDEX, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, "model-*.safetensors")
# masks that old GPT-2 files kept among their weights
_MASKS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")


def open_huggingface(path: Path) -> Foreign:
    """A directory that transformers would read, its metadata read and checked.

    Raises:
        ValueError: where a file is missing or damaged, or the model of a kind that is not
            supported.
    """
    settings = _read_json(path / CONFIG)
    config = _config(settings)
    files = _tensor_files(path)
    own_prefix = "transformer." if settings["model_type"] == "gpt2" else ""
    # the first GPT-2 files name their tensors without the prefix
    names = {_with_prefix(name, own_prefix): (name, file) for name, file in files.items()}
    shapes = {name: _shape(file, given) for name, (given, file) in names.items()}
    skipped = [name for name in shapes if _MASKS.fullmatch(name)]
    if config.tie_embeddings and "lm_head.weight" in shapes:
        skipped.append("lm_head.weight")  # the embedding again
    wanted = {name: shape for name, shape in shapes.items() if name not in skipped}

    def read(name: str) -> Tensor:
        given, file = names[name]
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(given)
        return tensor

    tokenizer = _tokenizer(path, settings)
    return Foreign(
        config,
        tokenizer,
        entries(config, "huggingface"),
        wanted,
        read,
        skipped,
        license=_license(path),
    )


def _with_prefix(name: str, prefix: str) -> str:
    return name if name.startswith((prefix, "lm_head.")) else prefix + name


def _config(settings: dict[str, Any]) -> GPTConfig:
    kind = settings.get("model_type")
    if kind == "gpt2":
        return _gpt2_config(settings)
    if kind == "llama":
        return _llama_config(settings)
    raise ValueError(
        f"its architecture is {kind} ({CONFIG}: model_type); there are llama and gpt2."
    )


def _gpt2_config(settings: dict[str, Any]) -> GPTConfig:
    _expect(settings, "activation_function", "gelu_new")
    _expect(settings, "scale_attn_weights", True)
    _expect(settings, "scale_attn_by_inverse_layer_idx", False)
    width, n_head = settings["n_embd"], settings["n_head"]
    return GPTConfig(
        n_layer=settings["n_layer"],
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=width,
        block_size=settings["n_positions"],
        vocab_size=settings["vocab_size"],
        norm="layernorm",
        norm_eps=settings.get("layer_norm_epsilon", 1e-5),
        position="learned",
        rope_theta=10000.0,
        mlp="gelu",
        mlp_hidden=settings.get("n_inner") or 4 * width,
        bias=True,
        tie_embeddings=settings.get("tie_word_embeddings", True),
        dropout=0.0,
        causal=True,
    )


def _llama_config(settings: dict[str, Any]) -> GPTConfig:
    _expect(settings, "hidden_act", "silu")
    _expect(settings, "attention_bias", False)
    _expect(settings, "mlp_bias", False)
    width, n_head = settings["hidden_size"], settings["num_attention_heads"]
    _expect(settings, "head_dim", width // n_head)
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    return GPTConfig(
        n_layer=settings["num_hidden_layers"],
        n_head=n_head,
        n_kv_head=settings.get("num_key_value_heads") or n_head,
        n_embd=width,
        block_size=settings["max_position_embeddings"],
        vocab_size=settings["vocab_size"],
        norm="rmsnorm",
        norm_eps=settings["rms_norm_eps"],
        position="rope",
        rope_theta=float(rope.get("rope_theta") or settings.get("rope_theta", 10000.0)),
        mlp="swiglu",
        mlp_hidden=settings["intermediate_size"],
        bias=False,
        tie_embeddings=settings.get("tie_word_embeddings", False),
        dropout=0.0,
        causal=True,
        rope_scaling=_rope_scaling(rope),
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
    raise ValueError(f"its rope scaling is {kind}; there are linear and llama3.")


def _expect(settings: dict[str, Any], key: str, value: Any) -> None:
    found = settings.get(key)
    if found is not None and found != value:
        raise ValueError(f"its {CONFIG} has {key} {found}; only {value} is supported.")


def _tensor_files(path: Path) -> dict[str, Path]:
    """File of every tensor, by its name there."""
    if (path / INDEX).is_file():
        places = _read_json(path / INDEX)["weight_map"]
        outside = [file for file in places.values() if Path(file).name != file]
        if outside:
            raise ValueError(f"its {INDEX} names a file in another folder, {outside[0]!r}.")
        found = {name for file in set(places.values()) for name in _names(path / file)}
        if found != set(places):
            odd = min(found ^ set(places))
            raise ValueError(f"its {INDEX} and its files differ: {odd} is only in one of them.")
        return {name: path / file for name, file in places.items()}
    if not (path / WEIGHTS).is_file():
        pickles = sorted(file.name for file in path.glob("*.bin"))
        remedy = (
            f"{pickles[0]} is a pickle, which is never read: convert it with transformers' "
            "save_pretrained(..., safe_serialization=True)."
            if pickles
            else "give a directory that has one."
        )
        raise ValueError(f"it has no {WEIGHTS}; {remedy}")
    return dict.fromkeys(_names(path / WEIGHTS), path / WEIGHTS)


def _names(file: Path) -> Iterable[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            names: list[str] = opened.keys()
            return names
    except (SafetensorError, OSError) as error:
        raise ValueError(f"its {file.name} is missing or damaged ({error}).") from error


def _shape(file: Path, name: str) -> tuple[int, ...]:
    with safe_open(file, framework="pt") as opened:
        return tuple(opened.get_slice(name).get_shape())


def _tokenizer(path: Path, settings: dict[str, Any]) -> Tokenizer:
    content, options = _read_json(path / TOKENIZER), _read_json(path / TOKENIZER_CONFIG, {})
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece-like BPE" if model.get("byte_fallback") else model.get("type")
        raise ValueError(f"its tokenizer is {kind}, not byte-level BPE.")
    if content.get("normalizer"):
        raise ValueError(f"its tokenizer normalises text ({content['normalizer']['type']}).")
    added = {token["content"]: token for token in content.get("added_tokens", [])}
    plain = [name for name, token in added.items() if not token["special"]]
    if plain:
        raise ValueError(f"its tokenizer has {plain[0]!r}, a token that is added but not special.")
    special = {name: token["id"] for name, token in added.items()}
    by_id = {i: name for name, i in special.items()}
    eos_id = settings.get("eos_token_id")
    eos_id = eos_id[0] if isinstance(eos_id, list) else eos_id
    return make_tokenizer(
        tokens=model["vocab"],
        merges=model["merges"],
        special_tokens=special,
        pre=name_of_steps(content.get("pre_tokenizer")),
        eos=_name(options.get("eos_token")) or by_id.get(eos_id),
        bos=_leading_token(content.get("post_processor"), special),
        chat_template=_chat_template(path, options),
    )


def _name(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _leading_token(processor: Any, special: dict[str, int]) -> str | None:
    """The special token that a post-processor puts before every text."""
    for step in (processor or {}).get("processors", [processor or {}]):
        first: dict[str, Any] = next(iter(step.get("single", [])), {})
        if "SpecialToken" in first and first["SpecialToken"]["id"] in special:
            name: str = first["SpecialToken"]["id"]
            return name
    return None


def _chat_template(path: Path, options: dict[str, Any]) -> str | None:
    if (path / TEMPLATE).is_file():
        return (path / TEMPLATE).read_text(encoding="utf-8")
    template = options.get("chat_template")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def _license(path: Path) -> str | None:
    """What the head of its model card says, where it has one."""
    if not (path / CARD).is_file():
        return None
    text = (path / CARD).read_text(encoding="utf-8", errors="replace")
    head = text.partition("\n---")[0] if text.startswith("---") else ""
    found = re.search(r"^license:[ \t]*(\S+)", head, re.MULTILINE)
    return found[1] if found else None


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not path.is_file():
        return default
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"it has no {path.name}.") from error
    except ValueError as error:
        raise ValueError(f"its {path.name} is no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"its {path.name} holds no JSON object.")
    return content
