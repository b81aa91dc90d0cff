"""A PEFT adapter on the exported base gives the same logits as the LoRA checkpoint."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline import lora
from pipeline.checkpoint import ADAPTER_WEIGHTS, tensors_writer
from pipeline.classifier import GPTClassifier
from pipeline.gpt import GPT
from pipeline.lora import LoRAConfig
from pipeline.models import Loaded
from pipeline.weights.huggingface_out import huggingface_writers
from pipeline.weights.peft_out import peft_writers
from tests.exporting import N_ROWS, MakeGPT, classifier, loaded, rows, vocabulary, write

# float32: an adapter that is not merged rounds otherwise than one that is; logits are of size 1
TOLERANCE = 1e-4
PLAIN = LoRAConfig(rank=4, alpha=8.0, dropout=0.1, targets=["q", "v"], rslora=False, dora=False)
ALL = replace(PLAIN, targets=["all-linear"])
CASES = {
    "llama, all": ("llama", ALL),
    "llama, rslora": ("llama", replace(ALL, rslora=True)),
    "llama, dora": ("llama", replace(PLAIN, dora=True)),
    "gpt2, q and v": ("gpt2", PLAIN),
    "gpt2, k": ("gpt2", replace(PLAIN, targets=["k"])),
    "gpt2, all": ("gpt2", ALL),
    "gpt2, all, rslora": ("gpt2", replace(ALL, rslora=True)),
    "gpt2, o, dora": ("gpt2", replace(PLAIN, targets=["o", "up"], dora=True)),
}
Adapted = tuple[Loaded, Path]


@pytest.fixture
def adapt(tiny_gpt: MakeGPT, tmp_path: Path) -> Callable[..., Adapted]:
    """A merged model as it is loaded from a LoRA checkpoint, and its exported base."""

    def make(family: str, config: LoRAConfig, wrap: Callable[[GPT], Any]) -> Adapted:
        tokenizer = vocabulary()
        base = tiny_gpt(family, vocab_size=N_ROWS)
        path = write(huggingface_writers(loaded(base, tokenizer), torch.float32), tmp_path / "base")
        model = wrap(base)
        resolved = lora.attach(model, config)
        torch.manual_seed(2)
        for tensor in lora.adapter_state(model).values():
            if tensor.dim() > 1:
                nn.init.normal_(tensor, std=0.2)
        (tmp_path / "ckpt").mkdir()
        tensors_writer(lora.adapter_state(model))(tmp_path / "ckpt" / ADAPTER_WEIGHTS)
        lora.merge(model.eval())
        meta = {"lora": vars(resolved), "base": {"name": "owner/base@v2"}}
        return replace(loaded(model, tokenizer, **meta), path=tmp_path / "ckpt"), path

    return make


@pytest.mark.filterwarnings("error::UserWarning")  # PEFT warns of keys that it does not find
@pytest.mark.parametrize(("family", "config"), CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_language_model(
    adapt: Callable[..., Adapted], tmp_path: Path, family: str, config: LoRAConfig
) -> None:
    ours, published = adapt(family, config, lambda gpt: gpt)
    path = write(peft_writers(ours), tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(published)
    before = plain(rows()).logits
    theirs = PeftModel.from_pretrained(plain, path).eval()
    found, wanted = theirs(rows()).logits, ours.gpt.head(ours.gpt(rows()))
    assert (found - wanted).abs().max() < TOLERANCE
    assert (wanted - before).abs().max() > 0.05, "the adapter does something"
    settings = json.loads((path / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("owner/base", "v2")
    for base in ({"name": "smollm2-135m-instruct"}, {}):
        meta = {**ours.meta, "base": base}
        folder = write(peft_writers(replace(ours, meta=meta)), tmp_path / f"of {len(base)} names")
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] is None, "no repository of the hub"
    assert settings["fan_in_fan_out"] == (family == "gpt2")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_classifier(adapt: Callable[..., Adapted], tmp_path: Path, family: str) -> None:
    """Its head comes with the adapter, and for GPT-2 the norm that holds the head's bias."""
    ours, base = adapt(family, ALL, classifier)
    assert isinstance(ours.model, GPTClassifier)
    path = write(peft_writers(ours), tmp_path / "adapter")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    theirs = PeftModel.from_pretrained(plain, path).eval()
    assert (theirs(rows()).logits - ours.model(rows())).abs().max() < TOLERANCE


def test_dora_on_a_part_of_gpt2s_matrix_is_refused(adapt: Callable[..., Adapted]) -> None:
    ours, _ = adapt("gpt2", replace(PLAIN, dora=True), lambda gpt: gpt)
    with pytest.raises(ValueError, match=r"DoRA on .*attention\.q, .* on transformer\.h\.0\.attn"):
        peft_writers(ours)


def test_a_model_without_an_adapter_is_refused(tiny_gpt: MakeGPT) -> None:
    with pytest.raises(ValueError, match="made-up holds no adapter; export it with --format hugg"):
        peft_writers(loaded(tiny_gpt("llama", vocab_size=N_ROWS), vocabulary()))
