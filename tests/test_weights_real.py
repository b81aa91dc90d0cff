"""SmolLM2-135M-Instruct from the user's cache matches transformers, in little memory."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from datamodules.chat_template import render
from datamodules.prompts import Message
from pipeline.decoding.generate import generate
from pipeline.decoding.sampling import Sampling
from pipeline.models import Loaded, load
from tests.published import gguf_name, pre_tokenizer

ROOT = Path(__file__).parents[1]
LOGITS_TOLERANCE = 1e-3  # float32 through 30 layers; logits are of size 20
N_NEW = 50
FLOAT32_BYTES = 4 * 134_515_008
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "1, 2, 3, 5, 8, 13,",
    "The three laws of thermodynamics say that",
    "Dear Sir or Madam,\n\nI am writing to",
    "Water boils at 100 degrees",
    "In 1969, two astronauts",
    "import numpy as np\n\ndef softmax(x):",
    "Spam messages can be told from others by",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> Loaded:
    return load(smollm2)


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    """transformers' model on what the gguf package dequantises, read by its own reader."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    stored = {t.name: t for t in gguf.GGUFReader(smollm2).tensors}
    for name, parameter in model.named_parameters():
        tensor = stored.pop(gguf_name(name))
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if "q_proj" in name or "k_proj" in name:  # llama.cpp pairs neighbours, others halves
            n_heads = 9 if "q_proj" in name else 3
            values = values.reshape(n_heads, -1, 2, 576).swapaxes(1, 2).reshape(-1, 576)
        parameter.data = torch.tensor(values)
    assert not stored
    return model


@torch.inference_mode()
def test_logits(ours: Loaded, theirs: Any) -> None:
    for prompt in PROMPTS[:3]:
        input_ids = torch.tensor([ours.tokenizer.encode(prompt)])
        difference = ours.gpt.head(ours.gpt(input_ids)) - theirs(input_ids).logits
        assert difference.abs().max() < LOGITS_TOLERANCE


def test_greedy_tokens(ours: Loaded, theirs: Any) -> None:
    for prompt in PROMPTS:
        ids = ours.tokenizer.encode(prompt)
        expected = theirs.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            do_sample=False,
            max_new_tokens=N_NEW,
            eos_token_id=None,
        )
        assert generate(ours.gpt, [ids], Sampling(max_new_tokens=N_NEW)) == [
            expected[0, len(ids) :].tolist()
        ]


def test_the_chat_template(ours: Loaded, smollm2: Path) -> None:
    fields = gguf.GGUFReader(smollm2).fields
    names = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    bpe = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    bpe.pre_tokenizer = pre_tokenizer("smollm")
    template = fields["tokenizer.chat_template"].contents()
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template)
    turns = [("system", "Be brief."), ("user", "Hi!  1 + 1?\n"), ("assistant", "2"), ("user", "?")]
    messages = [Message(role=role, content=content) for role, content in turns]
    for conversation in (messages, messages[1:], messages[:3], messages[1:2]):
        for opening in (True, False):
            assert render(ours.tokenizer, conversation, opening=opening) == (
                fast.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=opening
                )
            )


def test_loading_takes_little_memory(smollm2: Path) -> None:
    """All of a process, of which torch and the other modules alone are 0.44 of the float32 size."""
    modules, whole = peak(""), peak(f"load({str(smollm2)!r})")
    assert whole - modules < 1.15 * FLOAT32_BYTES, f"{(whole - modules) / 1e6:.0f} MB"
    assert whole < 1.56 * FLOAT32_BYTES, f"{whole / 1e6:.0f} MB"


def test_importing_takes_less_than_the_model(smollm2: Path, tmp_path: Path) -> None:
    """The command with all that it starts, MLflow too; one tensor is in memory at a time."""
    output = tmp_path / "imported"
    whole = peak(f"main(['import', '--source={smollm2}', '--output={output}'])")
    assert (output / "model.safetensors").stat().st_size > FLOAT32_BYTES
    assert whole < 1.1 * FLOAT32_BYTES, f"{whole / 1e6:.0f} MB"


def peak(statement: str) -> int:
    """Bytes of memory that a process had at most; ru_maxrss would count what it was forked from."""
    code = (
        "from pathlib import Path\nfrom pipeline.__main__ import main\n"
        f"from pipeline.models import load\nkept = {statement or None}\n"
        "print(Path('/proc/self/status').read_text())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert found
    return 1024 * int(found[1])
