"""Inputs that all contestants share: weights, and tokens in our training order."""

import json
import os
import shutil
import subprocess
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.batching import StepSampler
from datamodules.files import cache_dir
from datamodules.instruction import InstructionDataModule
from datamodules.pretraining import PretrainingDataModule
from datamodules.step_data_module import StepDataModule
from datamodules.text_classification import SpamDataModule
from datamodules.tokenizer import Tokenizer
from pipeline.directories import write_files, writing_directory
from pipeline.gpt import GPT, GPTConfig
from pipeline.models import Loaded
from pipeline.stages.export_stage import export_stage
from pipeline.stages.tokenizer_stage import train_stage
from pipeline.weights.huggingface_out import huggingface_writers
from pipeline.weights.reading import tokenizer_of

PROSE = "bundled:python-docs"
SMOLLM2 = "smollm2-135m-instruct"
INSTRUCTIONS = os.environ.get("INSTRUCTIONS", "bundled:instructions")
SMS = os.environ.get("SMS", "bundled:sms")
SEED = 1
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50304}
SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 4096}
STEPS: dict[str, int] = {
    "batch_size": 8,
    "max_tokens": 2048,
    "seed": SEED,
    "split_seed": 1,
    "num_workers": 0,
}


def folder() -> Path:
    """The folder for inputs, created if missing."""
    path = cache_dir() / "benchmarks"
    path.mkdir(parents=True, exist_ok=True)
    return path


def vocabulary() -> Path:
    """A vocabulary of 4,096 tokens, trained on the prose that ships with Python."""
    path = folder() / "vocabulary.json"
    if not path.exists():
        os.environ["GPT_PIPELINE_HOME"] = str(folder() / "runs")
        train_stage([PROSE], text_column="text", vocab_size=4096, min_frequency=2, output=path)
    return path


def gpt2(config: GPTConfig, name: str) -> Path:
    """Random weights of a GPT-2 model, in a directory that transformers reads."""
    path = folder() / name
    if not path.exists():
        torch.manual_seed(SEED)
        tokenizer = Tokenizer.load(vocabulary())
        meta = {"kind": "language_model", "gpt": asdict(config), "lora": None, "base": None}
        loaded = Loaded(GPT(config), tokenizer, meta, path)
        with writing_directory(path) as draft:
            write_files(draft, huggingface_writers(loaded, torch.float32))
    return path


def gpt2_config(**shape: int) -> GPTConfig:
    """GPT-2's architecture at another size, without dropout."""
    return GPTConfig(
        n_kv_head=shape["n_head"],
        mlp_hidden=4 * shape["n_embd"],
        norm="layernorm",
        norm_eps=1e-5,
        position="learned",
        rope_theta=10000.0,
        mlp="gelu",
        bias=True,
        tie_embeddings=True,
        dropout=0.0,
        causal=True,
        **shape,
    )


def prose(block_size: int, batch_size: int) -> PretrainingDataModule:
    """The prose, prepared as in configs/pretrain.yaml."""
    data = PretrainingDataModule(
        source=PROSE,
        text_column="text",
        tokenizer=str(vocabulary()),
        block_size=block_size,
        batch_size=batch_size,
        max_tokens=block_size * batch_size,
        val_fraction=0.05,
        near_duplicates=0.8,
        seed=SEED,
        num_workers=0,
    )
    data.setup("fit")
    return data


def validation_rows(block_size: int) -> Path:
    """Token ids (N, T) for validation; the last, shorter row is left out."""
    path = folder() / f"validation-{block_size}.npy"
    if not path.exists():
        held_out = prose(block_size, 1).val_set
        rows = [held_out[i]["input_ids"].numpy() for i in range(len(held_out) - 1)]  # type: ignore
        np.save(path, np.array(rows))
    return path


def pretraining_steps(block_size: int, batch_size: int, n_steps: int) -> Path:
    """Token ids (steps, B, T), in the order of `fit`."""
    path = folder() / f"steps-{block_size}x{batch_size}x{n_steps}.npy"
    if not path.exists():
        data = prose(block_size, batch_size)
        rows = [[s["input_ids"].numpy() for s in step] for step in islice(steps_of(data), n_steps)]
        np.save(path, np.array(rows))
    return path


def steps_of(data: StepDataModule) -> Any:
    """The samples of every step of the first epoch."""
    for keys in StepSampler(data.train_order(), batch_size=data.batch_size):
        yield [data.train_set[key] for key in keys]


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in a directory that transformers reads."""
    path = folder() / SMOLLM2
    if not path.exists():
        os.environ["GPT_PIPELINE_HOME"] = str(folder() / "runs")
        export_stage(SMOLLM2, form="huggingface", dtype="float32", output=path)
    return path


def smollm2_gguf(kind: str) -> Path:
    """The same in GGUF for llama.cpp, by our own export, with weights in `kind`."""
    path = folder() / f"{SMOLLM2}-{kind}"
    if not path.exists():
        os.environ["GPT_PIPELINE_HOME"] = str(folder() / "runs")
        export_stage(SMOLLM2, form="gguf", dtype=kind, output=path)
    return path / "model.gguf"


def smollm2_for_litgpt(python: str) -> Path:
    """The same, converted by litgpt; from a folder of any other name it would add a BOS token.

    Args:
        python: interpreter of an environment that has litgpt.
    """
    path = folder() / f"litgpt-{SMOLLM2}"
    if not path.exists():
        with writing_directory(path) as draft:
            shutil.copytree(smollm2(), draft, dirs_exist_ok=True)
            convert = [python, "-m", "litgpt", "convert_to_litgpt", str(draft)]
            subprocess.run([*convert, "--model_name", "SmolLM2-135M-Instruct"], check=True)
            (draft / "model.safetensors").unlink()
    return path


def instructions() -> InstructionDataModule:
    """The instruction data, as in configs/instruct.yaml but with SmolLM2's tokenizer."""
    data = InstructionDataModule(
        source=INSTRUCTIONS,
        tokenizer=tokenizer_of(SMOLLM2),
        prompt_style="alpaca",
        supervise="response",
        max_length=512,
        train_fraction=0.8,
        val_fraction=0.1,
        shuffle_split=True,
        **STEPS,
    )
    data.setup("fit")
    return data


def instruction_entries(n_steps: int) -> Path:
    """JSON: prompts and completions as text, in training order."""
    data, entries = instructions(), []
    for samples in islice(steps_of(data), n_steps):
        for sample in samples:
            ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
            start = next(i for i, label in enumerate(labels) if label >= 0)
            texts = data.tokenizer.decode(ids[:start]), data.tokenizer.decode(ids[start:-1])
            entries.append(dict(zip(("prompt", "completion"), texts, strict=True)))
    path = folder() / f"instructions-{n_steps}.json"
    path.write_text(json.dumps(entries))
    return path


def spam() -> SpamDataModule:
    """The messages, prepared as in configs/run/smollm2.yaml."""
    data = SpamDataModule(
        source=SMS,
        tokenizer=tokenizer_of(SMOLLM2),
        max_length=128,
        suffix="\n",
        train_fraction=0.7,
        val_fraction=0.1,
        balance=True,
        **STEPS,
    )
    data.setup("fit")
    return data


def spam_steps(n_steps: int) -> Path:
    """JSON: token ids and label of every message, step by step."""
    steps = [
        [{"input_ids": s["input_ids"].tolist(), "label": int(s["label"])} for s in samples]
        for samples in islice(steps_of(spam()), n_steps)
    ]
    path = folder() / f"spam-{n_steps}.json"
    path.write_text(json.dumps(steps))
    return path


def questions(n_questions: int) -> Path:
    """JSON: the users' questions, in training order."""
    data = instructions()
    asked = [item["messages"][0]["content"] for item in data.items("train")]
    path = folder() / f"questions-{n_questions}.json"
    path.write_text(json.dumps(asked[:n_questions]))
    return path


def prompts(n_prompts: int) -> Path:
    """JSON: token ids of prompts of different lengths."""
    ids = []
    for samples in steps_of(instructions()):
        for sample in samples:
            labels = sample["labels"].tolist()
            start = next(i for i, label in enumerate(labels) if label >= 0)
            ids.append(sample["input_ids"][:start].tolist())
    path = folder() / f"prompts-{n_prompts}.json"
    path.write_text(json.dumps(ids[:n_prompts]))
    return path
