"""Exported Hugging Face directories: same bits read back, same logits in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from datamodules.prompts import Message, encode_prompt, encode_text
from pipeline.gpt import GPT
from pipeline.layers.rotary import RopeScaling
from pipeline.weights.huggingface_out import huggingface_writers
from pipeline.weights.reading import open_foreign, read_model
from tests.exporting import (
    N_ROWS,
    MakeGPT,
    classifier,
    loaded,
    rows,
    smollm2,
    strings,
    vocabulary,
    write,
)

LOGITS_TOLERANCE = 1e-5  # float32, logits of size 1: the same products, summed in another order
LLAMA3 = RopeScaling("llama3", 8.0, original_context=8)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2, untied": ("gpt2", {"tie_embeddings": False}),
    "llama, grouped": ("llama", {}),
    "llama, tied": ("llama", {"tie_embeddings": True, "n_kv_head": 1}),
    "llama, linear": ("llama", {"rope_scaling": RopeScaling("linear", 4.0)}),
    "llama, llama3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0}),
    "llama, wide heads": ("llama", {"head_dim": 12}),
    "qwen2": ("qwen2", {}),
    "qwen3, tied": ("qwen3", {"tie_embeddings": True}),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def model(request: pytest.FixtureRequest, tiny_gpt: MakeGPT) -> GPT:
    family, changes = request.param
    return tiny_gpt(family, vocab_size=N_ROWS, **changes)


@torch.inference_mode()
def test_transformers_gives_the_same_logits_and_we_the_same_bits(
    model: GPT, tmp_path: Path
) -> None:
    path = write(huggingface_writers(loaded(model, vocabulary()), torch.float32), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(path)
    assert theirs.dtype == torch.float32
    difference = theirs(rows()).logits - model.head(model(rows()))
    assert difference.abs().max() < LOGITS_TOLERANCE
    if theirs.config.model_type == "gpt2":
        assert json.loads((path / "config.json").read_text())["n_ctx"] == model.config.block_size

    foreign = open_foreign(path)
    again = read_model(foreign, path, torch.float32).tensors()
    assert foreign.config == model.config
    assert again.keys() == model.tensors().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.tensors().items())


def test_bfloat16(tiny_gpt: MakeGPT, tmp_path: Path) -> None:
    model = tiny_gpt("llama", vocab_size=N_ROWS)
    path = write(huggingface_writers(loaded(model, vocabulary()), torch.bfloat16), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(path)
    assert theirs.dtype == torch.bfloat16
    again = read_model(open_foreign(path), path, torch.float32).tensors()
    for name, tensor in model.tensors().items():
        assert torch.equal(again[name], tensor.bfloat16().float())


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("bos", [None, "<|system|>"])
@pytest.mark.parametrize("suffix", ["", "\n", "\n\nIs it odd?\n"])
@torch.inference_mode()
def test_a_classifier_decides_the_same(
    tiny_gpt: MakeGPT, tmp_path: Path, family: str, bos: str | None, suffix: str
) -> None:
    """From text: tokenizer, truncation, suffix, padding, last real token, the head's bias."""
    model = classifier(tiny_gpt(family, vocab_size=N_ROWS, tie_embeddings=False))
    tokenizer = vocabulary(bos=bos)
    exported = loaded(model, tokenizer, suffix=suffix)
    path = write(huggingface_writers(exported, torch.float32), tmp_path / "out")
    theirs = AutoModelForSequenceClassification.from_pretrained(path)
    reads = AutoTokenizer.from_pretrained(path)
    assert theirs.config.id2label == {0: "ham", 1: "spam", 2: "odd"}
    assert theirs.config.label2id == {"ham": 0, "spam": 1, "odd": 2}

    texts = [*strings(60), "no<|endoftext|>", "<|endoftext|>", "a <|user|> said"]
    batch = reads(texts, padding=True, truncation=True, return_tensors="pt")
    found = theirs(**batch).logits
    wanted, n_cut = [], 0
    for row, text in enumerate(texts):
        ids, is_cut = encode_text(tokenizer, text, suffix, exported.meta["max_length"])
        assert batch.input_ids[row][batch.attention_mask[row] == 1].tolist() == ids
        wanted.append(model(torch.tensor([ids]))[0])
        n_cut += is_cut
    assert n_cut
    # GPT-2's bias goes through the head once more, in float32: 3-term sums become 32-term ones
    assert (found - torch.stack(wanted)).abs().max() < 1e-4
    decisions = found.argmax(-1).tolist()
    assert decisions == torch.stack(wanted).argmax(-1).tolist()
    assert len(set(decisions)) > 1, "one decision for all shows nothing"


def test_a_bias_that_nothing_can_hold_is_refused(tiny_gpt: MakeGPT) -> None:
    model = classifier(tiny_gpt("gpt2", vocab_size=N_ROWS))
    with torch.no_grad():
        model.classifier.weight[1] = model.classifier.weight[0]
    with pytest.raises(ValueError, match="depend on one another"):
        huggingface_writers(loaded(model, vocabulary()), torch.float32)


def test_a_mixture_that_nobody_knows_is_refused(tiny_gpt: MakeGPT) -> None:
    model = tiny_gpt("llama", norm="layernorm", vocab_size=N_ROWS)
    with pytest.raises(ValueError, match="only some architectures"):
        huggingface_writers(loaded(model, vocabulary()), torch.float32)


@pytest.mark.parametrize(
    ("style", "stops"),
    [(None, ["<|endoftext|>"]), ("chatml", ["<|endoftext|>", "<|im_end|>"])],
)
def test_generation_stops_where_answers_end(
    tiny_gpt: MakeGPT, tmp_path: Path, style: str | None, stops: list[str]
) -> None:
    tokenizer = vocabulary()
    meta = {"prompt_style": style} if style else {}
    exported = loaded(tiny_gpt("llama", vocab_size=N_ROWS), tokenizer, **meta)
    path = write(huggingface_writers(exported, torch.float32), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(path)
    assert theirs.generation_config.eos_token_id == sorted(
        tokenizer.special_ids[name] for name in stops
    )
    assert theirs.generation_config.pad_token_id == tokenizer.eos_id
    assert (path / "chat_template.jinja").exists() == bool(style)
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.slow
@torch.inference_mode()
def test_smollm2(tmp_path: Path) -> None:
    """The real thing: logits, ids of 10,000 texts, its chat template, and the same bits back."""
    real = smollm2()
    path = write(huggingface_writers(real, torch.float32), tmp_path / "out")
    theirs, reads = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    texts = strings(10_000)
    ids = [real.tokenizer.encode(text) for text in texts]
    found = reads(texts).input_ids
    wrong = [text for text, a, b in zip(texts, ids, found, strict=True) if a != b]
    assert not wrong, f"{len(wrong)} texts have other ids, such as {wrong[:3]}"

    messages = [Message(role="user", content="What is the capital of France?")]
    prompt = encode_prompt(real.tokenizer, "template", messages)
    rendered = reads.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert rendered == prompt
    row = torch.tensor([prompt])
    difference = float((theirs(row).logits - real.gpt.head(real.gpt(row))).abs().max())
    print(f"logits differ by up to {difference:.2g}")
    assert difference < 1e-3  # float32, logits of size 40, 30 layers

    again = read_model(open_foreign(path), path, torch.float32).tensors()
    assert all(torch.equal(again[name], t) for name, t in real.gpt.tensors().items())
