"""What runs on a CUDA device; `make gpu-test` on a machine that has one. Untested where none is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from pipeline.generate import generate
from pipeline.gpt import GPT
from pipeline.inference import label_probabilities, load_classifier
from pipeline.models import load
from pipeline.packed import pack
from pipeline.sampling import Sampling
from tests.journey import Journey
from tests.training import LORA, classifier, language_model, pretraining_data, spam_data

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytestmark = [pytestmark, pytest.mark.skip("no CUDA device")]

PROMPTS = [[5, 6, 7], [11], list(range(20, 33))]


def trained(module: Any, data: Any, folder: Path, precision: str) -> Any:
    trainer = pl.Trainer(
        accelerator="cuda",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=5,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=str(folder),
    )
    trainer.fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_pretraining(precision: str, tiny: Journey, tmp_path: Path) -> None:
    data = pretraining_data(tiny.tokenizer, tiny.folder / "prose")
    module = trained(language_model(), data, tmp_path, precision)
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_adapters(precision: str, tiny: Journey, tmp_path: Path) -> None:
    data = spam_data(tiny.tokenizer)
    base = str(tiny.best("pretrain"))
    module = classifier(gpt=None, init_from=base, lora=LORA, trainable="lora")
    trained(module, data, tmp_path, precision)
    changed = [p for p in module.parameters() if p.requires_grad]
    assert changed
    assert all(bool(torch.isfinite(p).all()) for p in changed)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_text_of_a_cpu(tiny_gpt: Callable[..., GPT], family: str) -> None:
    settings = Sampling(max_new_tokens=30)
    expected = generate(tiny_gpt(family), PROMPTS, settings)
    assert generate(pack(tiny_gpt(family).to("cuda")), PROMPTS, settings) == expected


def test_the_labels_of_a_cpu(tiny: Journey) -> None:
    path, texts = tiny.best("spam"), ["Win a prize now", "See you at six", "ok"]
    there, here = load_classifier(str(path)), load(path)
    assert there.device.type == "cuda"
    assert label_probabilities(there, texts) == [
        pytest.approx(row, abs=1e-4) for row in label_probabilities(here, texts)
    ]
