"""`import`: a checkpoint written tensor by tensor equals one written from a whole model."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import WEIGHTS, verify_checkpoint, write_checkpoint
from pipeline.layers.rotary import RopeScaling, stretched
from pipeline.models import load
from pipeline.runs.journal import metric_history
from pipeline.weights.huggingface_in import WEIGHTS as THEIRS
from pipeline.weights.reading import open_foreign, weights_writer
from tests.journey import said
from tests.published import random_model, save_tokenizer, train, write_gguf


def with_factors(writer: gguf.GGUFWriter) -> None:
    """Llama 3.1's, of heads of 8 numbers."""
    scaling = RopeScaling("llama3", 8.0, original_context=8192)
    frequencies = 500000.0 ** -(torch.arange(0, 8, 2) / 8)
    factors = frequencies / stretched(frequencies, scaling)
    writer.add_tensor("rope_freqs.weight", factors.numpy())


@pytest.fixture(params=["gpt2", "llama", "llama.gguf"])
def published(request: Any, tmp_path: Path) -> Path:
    """A model of others, as a directory or as a file."""
    family, _, is_file = request.param.partition(".")
    bpe = train("smollm" if family == "llama" else "gpt-2")
    model = random_model(family, bpe.get_vocab_size())
    path = tmp_path / request.param
    if is_file:
        model.config.rope_parameters["rope_theta"] = 500000.0
        write_gguf(path, model, bpe, kind="Q8_0", change=with_factors)
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
    (run,) = (tmp_path / "mlruns" / "import").iterdir()
    assert metric_history(run) == {"n_parameters": {0: model.n_parameters()}}


def test_what_cannot_be_read_is_not_taken_for_what_cannot_be_written(
    published: Path, tmp_path: Path
) -> None:
    foreign = open_foreign(published)
    published.rename(tmp_path / "gone")
    output = tmp_path / "imported"
    with pytest.raises(ValueError, match=f"{published} cannot be used: it could not be read"):
        write_checkpoint(output, {WEIGHTS: weights_writer(foreign, published)})
    assert not output.exists()


def test_the_mapping_names_every_tensor(published: Path, tmp_path: Path) -> None:
    """Masks, a tied head and scaling factors with why they are left out; old names as they are."""
    left_out = with_more(published)
    code, _, err = said("import", f"--source={published}")
    assert code == 0, err
    (file,) = tmp_path.glob("mlruns/import/*/mapping.json")
    found = json.loads(file.read_text())
    shapes = shapes_of(published)
    assert found.keys() == shapes.keys()
    assert {n: fate["left_out"] for n, fate in found.items() if "left_out" in fate} == left_out
    assert f"left out: {', '.join(left_out)}" in err
    used = {name: fate for name, fate in found.items() if name not in left_out}
    assert {name: tuple(fate["shape"]) for name, fate in used.items()} == {
        name: shape for name, shape in shapes.items() if name in used
    }
    ours = [name for fate in used.values() for name in fate["ours"]]
    assert sorted(ours) == sorted(load(published).gpt.tensors())
    (embedding,) = (name for name, fate in used.items() if "token_embedding" in fate["ours"][0])
    assert embedding in ("wte.weight", "model.embed_tokens.weight", "token_embd.weight")


def with_more(path: Path) -> dict[str, str]:
    """Adds tensors that carry nothing, of GPT-2 under the names of the first years; why."""
    if path.is_file():
        return {"rope_freqs.weight": "part of the configuration"}
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(path / THEIRS).items()}
    if path.name == "gpt2":
        more = {"h.0.attn.bias": torch.ones(1, 1, 64, 64).tril()}
        more["lm_head.weight"] = tensors["wte.weight"].clone()
    else:
        more = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | more, path / THEIRS)
    return {n: "the embedding again" if "lm_head" in n else "computed anew" for n in more}


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    if path.is_file():
        return {t.name: tuple(map(int, t.shape[::-1])) for t in gguf.GGUFReader(path).tensors}
    return {name: tuple(tensor.shape) for name, tensor in load_file(path / THEIRS).items()}


@pytest.mark.parametrize("published", ["llama"], indirect=True)
def test_what_is_seen_half_way_leaves_nothing(published: Path, tmp_path: Path) -> None:
    tensors = load_file(published / THEIRS)
    tensors["lm_head.weight"][-1, -1] = torch.nan
    save_file(tensors, published / THEIRS)
    code, out, err = said("import", f"--source={published}", f"--output={tmp_path / 'imported'}")
    assert (code, out) == (2, "")
    assert f"{published} cannot be used: its tensor lm_head.weight holds values that are not" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "mlruns"]
