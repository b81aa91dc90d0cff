"""`import`: a checkpoint written tensor by tensor is the one that a whole model would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import WEIGHTS, verify_checkpoint
from pipeline.models import load
from pipeline.weights.huggingface_in import WEIGHTS as THEIRS
from tests.journey import said
from tests.published import random_model, save_tokenizer, train, write_gguf


@pytest.fixture(params=["gpt2", "llama", "llama.gguf"])
def published(request: Any, tmp_path: Path) -> Path:
    """A model of others, as a directory or as a file."""
    family, _, is_file = request.param.partition(".")
    bpe = train("smollm" if family == "llama" else "gpt-2")
    model = random_model(family, bpe.get_vocab_size())
    path = tmp_path / request.param
    if is_file:
        write_gguf(path, model, bpe, kind="Q8_0")
    else:
        model.save_pretrained(path)
        save_tokenizer(bpe, path)
    return path


def test_the_same_bytes_as_of_a_whole_model(published: Path, tmp_path: Path) -> None:
    output = tmp_path / "imported"
    code, _, err = said("import", f"--source={published}", f"--output={output}")
    assert code == 0, err
    verify_checkpoint(output)
    model = load(published).gpt
    save_file(model.tensors(), tmp_path / "whole")
    assert (output / WEIGHTS).read_bytes() == (tmp_path / "whole").read_bytes()
    assert f"became {model.n_parameters():,} parameters" in err


@pytest.mark.parametrize("published", ["llama"], indirect=True)
def test_what_is_seen_half_way_leaves_nothing(published: Path, tmp_path: Path) -> None:
    tensors = load_file(published / THEIRS)
    tensors["lm_head.weight"][-1, -1] = torch.nan
    save_file(tensors, published / THEIRS)
    code, out, err = said("import", f"--source={published}", f"--output={tmp_path / 'imported'}")
    assert (code, out) == (2, "")
    assert f"{published} cannot be used: its tensor lm_head.weight holds values that are not" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "mlruns"]
