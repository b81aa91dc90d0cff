"""lm-evaluation-harness gets from `serve` what it gets from its transformers backend.

Needs lm-evaluation-harness in the Python that GPT_PIPELINE_LM_EVAL names
(`pip install 'lm_eval[api,hf]'`). The tasks are local files: nothing is downloaded.
"""

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.weights.huggingface_out import huggingface_writers
from tests.exporting import MakeGPT, loaded, python_named, smollm2, vocabulary, write
from tests.serving import Served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
QUESTIONS = [
    ("What is the capital of France?", ["Paris", "Rome", "a river", "1789"]),
    ("Name three colours.", ["red, green, blue", "one, two, three", "a b c", "Paul"]),
    ("2 + 2 =", ["4", "5", "22", "two"]),
    ("The opposite of hot is", ["cold", "warm", "a fire", "the sun"]),
]
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\n",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}\n",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="session")
def python() -> str:
    return python_named("GPT_PIPELINE_LM_EVAL", "lm-evaluation-harness")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of tasks over one file of questions."""
    folder, draw = tmp_path / "tasks", random.Random(0)
    folder.mkdir()
    rows = []
    for question, (right, *wrong) in QUESTIONS:
        choices = draw.sample([right, *wrong], 4)
        rows.append({"question": question, "choices": choices, "label": choices.index(right)})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}}
    for name, task in TASKS.items():
        content = {"task": name, "dataset_path": "json", "test_split": "test", **data, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(content))  # which is YAML
    return folder


def answers(python: str, tasks: Path, kind: str, arguments: str) -> dict[str, list[Any]]:
    """What a model answered, by task."""
    out = tasks / kind
    words = ["--model", kind, "--model_args", arguments, "--include_path", str(tasks)]
    words += ["--tasks", ",".join(TASKS), "--output_path", str(out), "--log_samples"]
    ended = subprocess.run(
        [python, "-m", "lm_eval", "run", "--device", "cpu", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        | {"HF_HOME": str(tasks / "home"), "OPENAI_API_KEY": "none"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = {}
    for name in TASKS:
        (path,) = out.glob(f"**/samples_{name}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        found[name] = [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
    return found


@pytest.mark.parametrize("name", ["random", "smollm2"])
def test_figures_are_those_of_transformers(
    python: str, tasks: Path, tiny_gpt: MakeGPT, tmp_path: Path, name: str
) -> None:
    if name == "smollm2":
        model = smollm2()
    else:
        tokenizer = vocabulary()
        model = loaded(tiny_gpt("llama", vocab_size=tokenizer.n_vocab, block_size=256), tokenizer)
    path = write(huggingface_writers(model, torch.float32), tmp_path / "out")
    theirs = answers(python, tasks, "hf", f"pretrained={path},dtype=float32")
    served = Served(tmp_path, f"--ckpt={path}", "--name=it", "--precision=32-true")
    try:
        asked = f"model=it,base_url={served.url}/v1/completions,tokenizer={path},num_concurrent=4"
        ours = answers(python, tasks, "local-completions", asked)
    finally:
        served.process.kill()
    if name == "smollm2":  # another writes special tokens in between, which the harness leaves out
        assert ours["answers"] == theirs["answers"]
    assert len(ours["choices"]) == len(QUESTIONS)
    for mine, other in zip(flat(ours["choices"]), flat(theirs["choices"]), strict=True):
        assert float(mine[0]) == pytest.approx(float(other[0]), abs=2e-3)
        assert mine[1] == other[1], "whether it is what the model would say"
    for mine, other in zip(flat(ours["texts"]), flat(theirs["texts"]), strict=True):
        assert float(mine) == pytest.approx(float(other), abs=2e-3)


def flat(found: list[Any]) -> list[Any]:
    """Answers to each request, of all questions."""
    return [answer for of_question in found for (answer,) in of_question]
