"""The README.md of an exported directory: what it is, what it was made from, how to load it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from datamodules.prompts import TEMPLATE
from pipeline.classifier import GPTClassifier
from pipeline.models import Loaded
from pipeline.weights.names import family_of

_LIBRARIES = {"huggingface": "transformers", "peft": "peft", "gguf": "gguf"}


def card(loaded: Loaded, steps: Sequence[dict[str, Any]], *, name: str, form: str) -> str:
    """The text of a model card; `steps` are the lineage."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    is_classifier, config = isinstance(loaded.model, GPTClassifier), loaded.gpt.config
    facts = ModelCardData(
        license=steps[-1].get("license"),  # of the weights that it all started from
        library_name=_LIBRARIES[form],
        pipeline_tag="text-classification" if is_classifier else "text-generation",
        tags=["gpt-pipeline"],
    )
    return environment.get_template("card.md.j2").render(
        facts=facts.to_yaml(),
        name=name,
        ollama_name=re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "model",
        form=form,
        is_classifier=is_classifier,
        auto_class=f"AutoModelFor{'SequenceClassification' if is_classifier else 'CausalLM'}",
        family=family_of(config),
        block_size=config.block_size,
        n_parameters=loaded.gpt.n_parameters(),
        n_vocab=loaded.tokenizer.n_vocab,
        meta=loaded.meta,
        template_style=TEMPLATE,
        steps=steps,
        last=steps[0],
    )
