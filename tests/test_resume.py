"""An adapter goes on upon its own base alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import newest_valid
from tests.journey import Journey
from tests.training import LORA, classifier, fit, spam_data


def spam_lora(journey: Journey) -> tuple[Any, Any]:
    data = spam_data(journey.tokenizer)
    base = str(journey.best("pretrain"))
    return classifier(gpt=None, init_from=base, lora=LORA, trainable="lora"), data


def spam_full(journey: Journey) -> tuple[Any, Any]:
    return classifier(), spam_data(journey.tokenizer)


def test_another_base_is_refused(tiny: Journey, tmp_path: Path) -> None:
    module, data = spam_lora(tiny)
    fit(module, data, tmp_path, max_steps=2, limit_val_batches=0)
    path = newest_valid(tmp_path / "checkpoints")
    other = tiny.outcomes["instruct"]["outputs"]["best"]  # the base, with its adapter merged
    again = classifier(gpt=None, init_from=other, lora=LORA, trainable="lora")
    with pytest.raises(ValueError, match="which holds other weights"):
        fit(
            again,
            spam_data(tiny.tokenizer),
            tmp_path / "again",
            ckpt_path=path,
            max_steps=4,
            limit_val_batches=0,
        )
