"""The README.md of an exported directory: what it is, what it was made from, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datamodules.prompts import TEMPLATE
from pipeline.classifier import GPTClassifier
from pipeline.models import Loaded
from pipeline.weights.names import family_of

_DIGITS = 12  # of a digest, that are shown
_USE = {
    "language_model": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```""",
    "classifier": """```python
from transformers import pipeline

classify = pipeline("text-classification", model="{name}")
print(classify("some text", truncation=True))
```""",
    "peft": """The base is the checkpoint that the adapter was trained on, exported too
(`gpt-pipeline export --ckpt BASE --format huggingface`).

```python
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("BASE"{labels})
model = PeftModel.from_pretrained(base, "{name}")
```""",
    "gguf": """```sh
llama-cli -m model.gguf    # llama.cpp
ollama create {name} -f Modelfile && ollama run {name}    # Ollama
```""",
}


def card(loaded: Loaded, steps: Sequence[dict[str, Any]], *, name: str, form: str) -> str:
    """The text of a model card.

    Args:
        loaded: what is exported.
        steps: its lineage.
        name: name of the exported directory.
        form: huggingface, peft or gguf.
    """
    sections = [
        _head(loaded, steps, form),
        f"# {name}",
        _what(loaded, form),
        "## Use",
        _use(loaded, name, form),
        "## Made from",
        _table(
            ["what", "digest", "trained on"],
            [[step["name"], f"`{step['digest'][:_DIGITS]}`", _data(step)] for step in steps],
        ),
        *_training_data(steps[0]),
        *_metrics(steps[0]),
        "Written by gpt-pipeline; `export.json` has the SHA-256 of every file and whole digests.",
    ]
    return "\n\n".join(sections) + "\n"


def license_of(steps: Sequence[dict[str, Any]]) -> str | None:
    """Licence of the weights that all began with, where that is known."""
    return steps[-1].get("license")


def _head(loaded: Loaded, steps: Sequence[dict[str, Any]], form: str) -> str:
    task = "text-classification" if _is_classifier(loaded) else "text-generation"
    library = {"huggingface": "transformers", "peft": "peft", "gguf": "gguf"}[form]
    known = license_of(steps)
    lines = [f"license: {known}"] if known else []
    lines += [f"library_name: {library}", f"pipeline_tag: {task}", "tags: [gpt-pipeline]"]
    return "\n".join(["---", *lines, "---"])


def _what(loaded: Loaded, form: str) -> str:
    config, meta = loaded.gpt.config, loaded.meta
    kind = "classifier" if _is_classifier(loaded) else "language model"
    text = (
        f"A {kind} of the {family_of(config)} architecture, {loaded.gpt.n_parameters():,} "
        f"parameters, context {config.block_size} tokens, vocabulary {loaded.tokenizer.n_vocab}"
        f"{', as a LoRA adapter' if form == 'peft' else ''}."
    )
    if _is_classifier(loaded):
        text += f" Labels: {', '.join(meta['label_names'])}; texts of up to {meta['max_length']} "
        text += "tokens"
        text += f", each followed by {meta['suffix']!r}." if meta.get("suffix") else "."
    elif "prompt_style" in meta:
        style = meta["prompt_style"]
        text += " It answers prompts in the style "
        text += "of its tokenizer's makers" if style == TEMPLATE else style
        text += ", which its chat template writes."
    return text


def _use(loaded: Loaded, name: str, form: str) -> str:
    is_classifier = _is_classifier(loaded)
    kind = "classifier" if is_classifier else "language_model"
    return _USE[kind if form == "huggingface" else form].format(
        name=name,
        auto_class=f"AutoModelFor{'SequenceClassification' if is_classifier else 'CausalLM'}",
        labels=f", num_labels={len(loaded.meta['label_names'])}" if is_classifier else "",
    )


def _data(step: dict[str, Any]) -> str:
    data = step.get("data")
    return f"{data['source']} (`{data['digest'][:_DIGITS]}`)" if data else ""


def _training_data(step: dict[str, Any]) -> list[str]:
    data = step.get("data")
    if not data:
        return []
    counts = [[key, str(value)] for key, value in data["counts"].items()]
    origin = f"{data['source']}, SHA-256 of the samples `{data['digest']}`"
    return ["## Training data", origin, _table(["count", ""], counts)]


def _metrics(step: dict[str, Any]) -> list[str]:
    metrics = step.get("metrics")
    if not metrics or not step.get("data"):
        return []
    rows = [[key, f"{value:.4g}"] for key, value in metrics.items()]
    return ["## Metrics of the run", _table(["metric", ""], rows)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _is_classifier(loaded: Loaded) -> bool:
    return isinstance(loaded.model, GPTClassifier)
