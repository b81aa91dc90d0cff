"""GGUF files read back by our own reader: bits, hyperparameters, tokenizer, and the Modelfile."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from datamodules.prompts import stop_ids
from datamodules.tokenizer import ENDOFTEXT, Tokenizer
from pipeline.gpt import GPT
from pipeline.layers.rotary import RopeScaling
from pipeline.weights.gguf_out import gguf_writers
from pipeline.weights.reading import open_foreign, read_model
from tests.exporting import (
    N_ROWS,
    MakeGPT,
    classifier,
    loaded,
    vocabulary,
    with_whole_pieces,
    write,
)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2, untied": ("gpt2", {"tie_embeddings": False}),
    "llama, grouped": ("llama", {}),
    "llama, tied": ("llama", {"tie_embeddings": True, "n_kv_head": 1}),
    "llama, linear": ("llama", {"rope_scaling": RopeScaling("linear", 4.0)}),
    "llama, llama3": ("llama", {"rope_scaling": RopeScaling("llama3", 8.0)}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
# float16 has 11 bits; a block of Q8_0 is rounded to its largest value / 127, itself a float16
BOUNDS = {"f32": 0.0, "f16": 2.0**-11, "q8_0": 0.5 / 127 + 2.0**-11}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def model(request: pytest.FixtureRequest, tiny_gpt: MakeGPT) -> GPT:
    family, changes = request.param
    return tiny_gpt(family, vocab_size=N_ROWS, **changes)


@pytest.mark.parametrize("kind", BOUNDS)
def test_what_is_written_is_read_back(model: GPT, tmp_path: Path, kind: Any) -> None:
    tokenizer = vocabulary(bos="<|system|>")
    exported = loaded(model, tokenizer, prompt_style="chatml")
    writers = gguf_writers(exported, kind, name="tiny", license="mit")
    path = write(writers, tmp_path / "ö ut") / "model.gguf"
    foreign = open_foreign(path)
    assert foreign.config == model.config
    assert foreign.license == "mit"
    again = read_model(foreign, path, torch.float32).tensors()
    assert again.keys() == model.tensors().keys()
    for name, tensor in model.tensors().items():
        in_float32 = tensor.dim() == 1 or name.startswith("position") or kind == "f32"
        bound = 0.0 if in_float32 else BOUNDS[kind] * float(tensor.abs().max())
        assert float((again[name] - tensor).abs().max()) <= bound, name

    theirs = foreign.tokenizer.vocabulary
    assert theirs.more_ends == ("<|im_end|>",)  # as the template says, which is known by name here
    source = {n: getattr(theirs, n) for n in ("name", "chat_template", "more_ends")}
    assert theirs == replace(tokenizer.vocabulary, **source)
    assert theirs.chat_template
    assert "<|im_start|>user" in theirs.chat_template


def test_metadata(tiny_gpt: MakeGPT, tmp_path: Path) -> None:
    """What llama.cpp stops at: EOS, and the style's own end where that is another token."""
    tokenizer = vocabulary()
    for style, eot in (("chatml", "<|im_end|>"), ("alpaca", None)):
        exported = loaded(tiny_gpt("llama", vocab_size=N_ROWS), tokenizer, prompt_style=style)
        writers = gguf_writers(exported, "q8_0", name="tiny", license=None)
        path = write(writers, tmp_path / style) / "model.gguf"
        fields = {n: f.contents() for n, f in gguf.GGUFReader(path).fields.items()}
        assert fields["general.architecture"] == "llama"
        assert fields["general.name"] == "tiny"
        assert "general.license" not in fields
        assert fields["tokenizer.ggml.pre"] == "qwen2"
        assert fields["tokenizer.ggml.add_bos_token"] is False
        assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
        found = fields.get("tokenizer.ggml.eot_token_id")
        assert found == (tokenizer.special_ids[eot] if eot else None)
        assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{N_ROWS - 1}]"


def test_all_that_ends_a_text(tiny_gpt: MakeGPT, tmp_path: Path) -> None:
    known = replace(vocabulary().vocabulary, more_ends=("<|im_end|>", "<|system|>"))
    exported = loaded(tiny_gpt("llama", vocab_size=N_ROWS), Tokenizer.of(known))
    writers = gguf_writers(exported, "f32", name="tiny", license=None)
    again = open_foreign(write(writers, tmp_path / "out") / "model.gguf").tokenizer
    assert again.vocabulary.more_ends == known.more_ends
    assert stop_ids(again, None) == stop_ids(exported.tokenizer, None)
    assert len(stop_ids(again, None)) == 3


def test_ends_that_have_no_room_are_named(
    tiny_gpt: MakeGPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = ("<|assistant|>", "<|im_end|>", "<|im_start|>", "<|system|>")
    known = replace(vocabulary().vocabulary, more_ends=ends)
    exported = loaded(tiny_gpt("llama", vocab_size=N_ROWS), Tokenizer.of(known))
    path = write(gguf_writers(exported, "f32", name="tiny", license=None), tmp_path / "out")
    kept = open_foreign(path / "model.gguf").tokenizer.vocabulary.more_ends
    _, said = capsys.readouterr()
    assert len(kept) == 2
    left_out = said.strip().rpartition("not among them: ")[2].split(", ")
    assert sorted([*kept, *left_out]) == sorted(ends)


LLAMA3 = RopeScaling("llama3", 4.0, low_freq_factor=2.0, high_freq_factor=3.0, original_context=16)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {"rope_scaling": LLAMA3}, "no qwen2 with Llama 3's rope scaling"),
        ("qwen3", {"rope_scaling": LLAMA3}, "no qwen3 with Llama 3's rope scaling"),
        ("qwen2", {"head_dim": 12}, "no qwen2 whose 4 heads are 12 wide"),
    ],
)
def test_what_llama_cpp_has_for_other_families_alone(
    family: str, changes: dict[str, Any], message: str, tiny_gpt: MakeGPT
) -> None:
    """It would refuse such a file: "wrong number of tensors"."""
    model = tiny_gpt(family, vocab_size=N_ROWS, n_head=4, **changes)
    with pytest.raises(ValueError, match=message):
        gguf_writers(loaded(model, vocabulary()), "f32", name="tiny", license=None)


def test_the_usual_scaling_of_llama_3s_kind_is_read_back(tiny_gpt: MakeGPT, tmp_path: Path) -> None:
    """A GGUF has factors alone, from which the usual constants can be told, others not."""
    usual = RopeScaling("llama3", 4.0)
    exported = loaded(tiny_gpt("llama", vocab_size=N_ROWS, rope_scaling=usual), vocabulary())
    path = write(gguf_writers(exported, "f32", name="tiny", license=None), tmp_path / "out")
    assert open_foreign(path / "model.gguf").config.rope_scaling == usual
    other = loaded(tiny_gpt("llama", vocab_size=N_ROWS, rope_scaling=LLAMA3), vocabulary())
    path = write(gguf_writers(other, "f32", name="tiny", license=None), tmp_path / "other")
    with pytest.raises(ValueError, match="those of no known Llama; take its Hugging Face"):
        open_foreign(path / "model.gguf")


def test_composed_characters_and_shown_marks(
    tiny_gpt: MakeGPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp composes none, which is said."""
    known = replace(vocabulary().vocabulary, nfc=True, shown=("<|user|>",))
    exported = loaded(tiny_gpt("qwen2", vocab_size=N_ROWS), Tokenizer.of(known))
    path = write(gguf_writers(exported, "f32", name="tiny", license=None), tmp_path / "out")
    assert "which llama.cpp does not" in capsys.readouterr().err
    again = open_foreign(path / "model.gguf").tokenizer.vocabulary
    assert again == replace(known, name=again.name, nfc=False)


def test_tokens_that_no_merge_makes(tiny_gpt: MakeGPT, tmp_path: Path) -> None:
    """llama.cpp leaves a piece that is a token whole with Llama 3's pre-tokenizer alone."""
    tokenizer, other = with_whole_pieces("llama-bpe"), with_whole_pieces("qwen2")
    model = tiny_gpt("llama", vocab_size=tokenizer.n_vocab)
    options: dict[str, Any] = {"name": "tiny", "license": None}
    path = write(gguf_writers(loaded(model, tokenizer), "f32", **options), tmp_path / "out")
    again = open_foreign(path / "model.gguf").tokenizer.vocabulary
    assert again == replace(tokenizer.vocabulary, name=again.name)
    with pytest.raises(ValueError, match="that no merge makes, for which llama"):
        gguf_writers(loaded(model, other), "f32", **options)


def test_a_bos_of_its_template_alone(tiny_gpt: MakeGPT, tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    known = replace(vocabulary().vocabulary, chat_template=template, template_bos="<|system|>")
    exported = loaded(tiny_gpt("llama", vocab_size=N_ROWS), Tokenizer.of(known))
    writers = gguf_writers(exported, "f32", name="tiny", license=None)
    again = open_foreign(write(writers, tmp_path / "out") / "model.gguf").tokenizer.vocabulary
    assert again == replace(known, name=again.name)


def test_rows_that_q8_0_cannot_hold_stay_f16(
    tiny_gpt: MakeGPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_gpt("llama", vocab_size=N_ROWS, mlp_hidden=80)
    writers = gguf_writers(loaded(model, vocabulary()), "q8_0", name="tiny", license=None)
    path = write(writers, tmp_path / "out") / "model.gguf"
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"
    said = capsys.readouterr().err
    assert "2 tensors stay f16" in said
    assert "blk.0.ffn_down.weight, blk.1.ffn_down.weight" in said


def test_refusals(tiny_gpt: MakeGPT) -> None:
    model = tiny_gpt("gpt2", vocab_size=N_ROWS)
    options: dict[str, Any] = {"name": "tiny", "license": None}
    with pytest.raises(ValueError, match=r"llama\.cpp has no classifier such as"):
        gguf_writers(loaded(classifier(model), vocabulary()), "f32", **options)
    large = tiny_gpt("llama", vocab_size=N_ROWS)
    with torch.no_grad():
        large.blocks[0].mlp.up.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight has numbers beyond 65504"):
        gguf_writers(loaded(large, vocabulary()), "f16", **options)


@pytest.mark.parametrize(
    ("style", "lines"),
    [
        (None, ['TEMPLATE """{{ .Prompt }}"""', f'PARAMETER stop "{ENDOFTEXT}"']),
        ("phi3", [f'PARAMETER stop "{ENDOFTEXT}"', 'PARAMETER stop "<|end|>"']),
    ],
)
def test_modelfile(tiny_gpt: MakeGPT, tmp_path: Path, style: str | None, lines: list[str]) -> None:
    meta = {"prompt_style": style} if style else {}
    exported = loaded(tiny_gpt("llama", vocab_size=N_ROWS), vocabulary(), **meta)
    path = write(gguf_writers(exported, "f32", name="tiny", license=None), tmp_path / "out")
    written = (path / "Modelfile").read_text()
    assert written.startswith("FROM ./model.gguf\nTEMPLATE ")
    assert [line for line in written.splitlines() if line in lines] == lines
