"""LoRA through PEFT: attach adapters to a GPT, read and write them in PEFT's standard files, merge.

Sources: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024).
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.gpt import GPT
from pipeline.resume import check_tensors

PEFT_PREFIX = "base_model.model."  # before every name in PEFT's standard files
ADAPTER = "default"


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on linear layers.

    Args:
        rank: rank of the adapters, PEFT's r.
        alpha: the update is multiplied by alpha / rank (alpha / sqrt(rank) with rslora).
        dropout: dropout probability, on the adapter's input.
        targets: names of linear layers in the blocks; [all-linear] stands for all of them, never
            for embeddings or heads.
        rslora: scale by alpha / sqrt(rank) (rank-stabilised LoRA).
        dora: train weight-decomposed adapters (DoRA).
    """

    rank: int
    alpha: float
    dropout: float
    targets: list[str]
    rslora: bool
    dora: bool

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"model.lora.rank is {self.rank}; give at least 1.")
        if not self.alpha > 0:
            raise ValueError(f"model.lora.alpha is {self.alpha}; give a positive number.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.lora.dropout is {self.dropout}; give a probability in [0, 1).")


def attach(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """Attaches adapters to the targets, in place, and freezes all else; outputs do not change.

    Returns the configuration with `all-linear` spelled out; ValueError if a target names no linear
    layer of the blocks.
    """
    from peft import inject_adapter_in_model

    linears = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "blocks." in name
    }
    targets = linears if config.targets == ["all-linear"] else set(config.targets)
    if not targets or targets - linears:
        short = {name: name.removesuffix("_proj") for name in sorted(targets - linears)}
        ours = [f"{name} is {of}" for name, of in short.items() if of in linears]
        hint = f" ({', '.join(ours)} here)" if ours else ""
        raise ValueError(
            f"model.lora.targets {sorted(short)} match no layer of this model; "
            f"choose from {sorted(linears)}{hint} or give [all-linear]."
        )
    resolved = replace(config, targets=sorted(targets))
    theirs = peft_config(resolved)
    if not config.dora and not config.dropout:
        from pipeline.layers.fused_lora import FusedLinear

        theirs._register_custom_module({nn.Linear: FusedLinear})
    inject_adapter_in_model(theirs, model, adapter_name=ADAPTER)
    for gpt in (module for module in model.modules() if isinstance(module, GPT)):
        gpt.draws_dropout |= config.dropout > 0
    return resolved


def hold_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts frozen weights to the dtype that autocast computes in, once instead of at every step.

    Adapters stay in float32. PEFT's cast of their input to float32 is disabled, as autocast would
    only cast it back; but DoRA takes the norms of its weights in that dtype.
    """
    from peft.tuners.lora import LoraLayer

    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = any(module.use_dora.values())


def peft_config(config: LoRAConfig) -> Any:
    """The same as PEFT's LoraConfig."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT takes floats
        lora_dropout=config.dropout,
        target_modules=config.targets,
        use_rslora=config.rslora,
        use_dora=config.dora,
    )


def is_adapter_key(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_" in name


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors (not copies) under their names in PEFT's standard file."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    return {PEFT_PREFIX + name: tensor for name, tensor in state.items()}


def load_adapter(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Fills attached adapters from PEFT's standard file; ValueError unless names and shapes fit."""
    own = adapter_state(model)
    check_tensors("the adapter", tensors, own)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def adapter_config_json(config: LoRAConfig) -> str:
    """PEFT's adapter_config.json, of a configuration that `attach` returned."""
    values = peft_config(config).to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
    return json.dumps(plain, indent=1, sort_keys=True)


def merge(model: nn.Module) -> None:
    """Adds every adapter to its base weight, in place, and removes it; all is trainable again.

    ValueError if a weight is not float32: merging in bf16 changes logits visibly.
    """
    from peft.tuners.lora import LoraLayer

    adapted = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, module in adapted.items():
        if module.get_base_layer().weight.dtype != torch.float32:
            raise ValueError(
                f"{name} is {module.get_base_layer().weight.dtype}; merge in float32, "
                "with model.float() before."
            )
    for name, module in adapted.items():
        module.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)
