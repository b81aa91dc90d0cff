"""Export of a LoRA checkpoint as a PEFT adapter on the exported base, with Hugging Face's names.

GPT-2's queries, keys and values are one matrix there, so adapters on some of them become one
block-diagonal adapter: the rows of A are stacked, B maps each part to its own outputs, and the
ranks add up. Equality of the logits is shown in tests/test_export_peft.py.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline import lora
from pipeline.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, json_writer, read_tensors
from pipeline.classifier import GPTClassifier
from pipeline.directories import Writers
from pipeline.lora import LoRAConfig
from pipeline.models import Loaded
from pipeline.weights.fetch import PACKAGED
from pipeline.weights.huggingface_out import shifted_bias, tokenizer_writers
from pipeline.weights.names import Entry, entries, family_of

_SCORE, _NORM = "score", "transformer.ln_f"


def peft_writers(loaded: Loaded) -> Writers:
    """Writers of PEFT's two files, and of the tokenizer's, as the base's may differ.

    ValueError for a checkpoint without an adapter, or DoRA on a part of GPT-2's joined matrix.
    """
    if not loaded.meta["lora"]:
        raise ValueError(
            f"{loaded.path} holds no adapter; export it with --format huggingface, or give a "
            "checkpoint of a LoRA run."
        )
    config = LoRAConfig(**loaded.meta["lora"])
    given = read_tensors(loaded.path, ADAPTER_WEIGHTS)
    inner = "gpt." if isinstance(loaded.model, GPTClassifier) else ""
    prefix = f"{lora.PEFT_PREFIX}{inner}"
    adapters = {name.removeprefix(prefix): tensor for name, tensor in given.items()}
    tensors: dict[str, Tensor] = {}
    parts: dict[str, int] = {}  # their module -> how many of our adapters are in it
    for entry in entries(loaded.gpt.config, "huggingface"):
        if joined := _joined(entry, adapters, config):
            theirs = entry.theirs.removesuffix(".weight")
            tensors |= {f"{theirs}.{name}": tensor for name, tensor in joined.items()}
            parts[theirs] = len(joined["lora_A.weight"]) // config.rank
    assert sum(parts.values()) == sum(name.endswith(".lora_A.weight") for name in adapters)
    saved = _beside(loaded)
    values = _config(loaded, config, parts, sorted({n.rpartition(".")[0] for n in saved}))
    named = {f"{lora.PEFT_PREFIX}{name}": t.contiguous() for name, t in (tensors | saved).items()}
    return {
        ADAPTER_WEIGHTS: lambda path: save_file(named, path, metadata={"format": "pt"}),
        ADAPTER_CONFIG: json_writer(values),
        **tokenizer_writers(loaded),
    }


def _joined(entry: Entry, adapters: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """The adapters on the parts of one of their matrices, joined; empty if there are none."""
    modules = [name.removesuffix(".weight") for name in entry.ours]
    if len(modules) == 1:
        prefix = f"{modules[0]}."
        return {n.removeprefix(prefix): t for n, t in adapters.items() if n.startswith(prefix)}
    adapted = [m for m in modules if f"{m}.lora_A.weight" in adapters]
    if not adapted:
        return {}
    if config.dora:
        raise ValueError(
            f"DoRA on {', '.join(modules)} cannot be an adapter on {entry.theirs}, where they are "
            "joined: it normalises each alone. Use merge, and export the result."
        )
    # parts are equally wide: GPT-2 has as many key/value heads as heads
    none = adapters[f"{adapted[0]}.lora_B.weight"][:, :0]
    widen = [adapters.get(f"{module}.lora_B.weight", none) for module in modules]  # (C, rank)
    return {
        "lora_A.weight": torch.cat([adapters[f"{m}.lora_A.weight"] for m in adapted]),
        "lora_B.weight": torch.block_diag(*widen),  # (3 C, ranks)
    }


def _beside(loaded: Loaded) -> dict[str, Tensor]:
    """Tensors saved beside the adapter: a classifier's head, and the norm that holds its bias."""
    if not isinstance(loaded.model, GPTClassifier):
        return {}
    tensors = {f"{_SCORE}.weight": loaded.model.classifier.weight.detach()}
    if loaded.model.classifier.bias is not None:
        norm = loaded.gpt.final_norm.weight
        assert isinstance(norm, Tensor)
        tensors[f"{_NORM}.weight"] = norm.detach()
        tensors[f"{_NORM}.bias"] = shifted_bias(loaded.model)
    return tensors


def _config(
    loaded: Loaded, config: LoRAConfig, parts: Mapping[str, int], saved: list[str]
) -> dict[str, Any]:
    """The adapter_config.json; joined adapters keep the scale of their parts."""
    values = json.loads(lora.adapter_config_json(config))
    values["target_modules"] = sorted({_suffix(theirs) for theirs in parts})
    for theirs, n_parts in parts.items():
        if n_parts > 1:
            grown = math.sqrt(n_parts) if config.rslora else n_parts
            values["rank_pattern"][_suffix(theirs)] = config.rank * n_parts
            values["alpha_pattern"][_suffix(theirs)] = config.alpha * grown
    values["modules_to_save"] = [name.rpartition(".")[2] for name in saved] or None
    values["fan_in_fan_out"] = family_of(loaded.gpt.config) == "gpt2"  # its Conv1D is (in, out)
    values["task_type"] = "SEQ_CLS" if saved else "CAUSAL_LM"
    name, _, revision = ((loaded.meta["base"] or {}).get("name") or "").partition("@")
    values["base_model_name_or_path"] = name if name not in ("", *PACKAGED) else None
    values["revision"] = revision or None
    values["inference_mode"] = True
    return values


def _suffix(module: str) -> str:
    """The part of a name that tells modules apart: `attn.c_proj`, as the MLP has a c_proj, too."""
    return ".".join(module.split(".")[-2:])
