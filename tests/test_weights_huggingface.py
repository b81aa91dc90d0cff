"""Hugging Face directories: read bit for bit as transformers wrote them, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.layers.rotary import RopeScaling, rotary_frequencies, rotary_table
from pipeline.models import load
from pipeline.weights.huggingface_in import CONFIG, INDEX, WEIGHTS
from pipeline.weights.huggingface_out import huggingface_writers
from pipeline.weights.names import entries
from pipeline.weights.reading import open_foreign
from tests.exporting import write
from tests.published import CHATML, EOS, random_model, refusal, said_of, save_tokenizer, train

LOGITS_TOLERANCE = 1e-5  # float32: logits are of size 1, and 64-term sums round at some 1e-6
N_VOCAB = 512
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 48}),
    "llama, grouped": ("llama", {}),
    "llama, multi-head, tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama, linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama, llama3": ("llama", {"rope_parameters": SCALED}),
    "llama, wide heads": ("llama", {"head_dim": 12}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}

# ids of the tokenizer, which the models above do not name; what only training looks at
OF_THE_EXPORT = {"bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path"}
OF_THE_EXPORT |= {"attn_pdrop", "embd_pdrop", "resid_pdrop"}


def published(folder: Path, family: str = "llama", **changes: Any) -> Any:
    """A directory as transformers writes it; its model."""
    model = random_model(family, N_VOCAB, **changes)
    model.save_pretrained(folder)
    save_tokenizer(train("smollm" if family == "llama" else "gpt-2"), folder)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to copy and to damage."""
    folder = tmp_path_factory.mktemp("llama")
    published(folder)
    return folder


@pytest.fixture
def damaged(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "damaged"))


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def logits_differ(folder: Path, theirs: Any) -> float:
    ours = load(folder).gpt
    input_ids = torch.randint(N_VOCAB, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        difference = ours.head(ours(input_ids)) - theirs(input_ids).logits
    return float(difference.abs().max())


@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES.keys())
def test_logits_and_every_bit(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = published(tmp_path, family, **changes)
    assert logits_differ(tmp_path, theirs) < LOGITS_TOLERANCE
    loaded = load(tmp_path)
    assert loaded.meta["prompt_style"] == "template"
    assert loaded.tokenizer.vocabulary.chat_template == CHATML
    assert loaded.tokenizer.vocabulary.eos == EOS
    ours, stored = loaded.gpt.tensors(), load_file(tmp_path / WEIGHTS)
    written = {e.theirs: e.join(ours) for e in entries(loaded.gpt.config, "huggingface")}
    assert written.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES.keys())
def test_there_and_back_through_the_exporter(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """The same file of weights, and a configuration that is the same to transformers."""
    published(tmp_path / "theirs", family, **changes)
    writers = huggingface_writers(load(tmp_path / "theirs"), torch.float32)
    write(writers, tmp_path / "again")
    stored, again = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "again"))
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name].view(torch.int32), tensor.view(torch.int32)), name
    before, after = (
        AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("theirs", "again")
    )
    if family == "gpt2":
        before["n_inner"] = before["n_inner"] or 4 * before["n_embd"]
        before["n_ctx"] = before["n_positions"]  # is read by llama.cpp's converter
    assert {key for key in before if before[key] != after[key]} <= OF_THE_EXPORT
    assert before.keys() == after.keys()


@pytest.mark.parametrize("window", [None, 48])
def test_mistral_as_far_as_its_window(window: int | None, tmp_path: Path) -> None:
    """Up to there it is a Llama, and so it is exported; that it be not used is Qwen's to say."""
    theirs = published(tmp_path / "theirs", "mistral", sliding_window=window, head_dim=12)
    edit(tmp_path / "theirs" / CONFIG, lambda found: found.update(use_sliding_window=False))
    ours = load(tmp_path / "theirs")
    assert ours.gpt.config.block_size == (window or 64)
    input_ids = torch.randint(
        N_VOCAB, (2, window or 64), generator=torch.Generator().manual_seed(1)
    )
    again = write(huggingface_writers(ours, torch.float32), tmp_path / "again")
    with torch.inference_mode():
        logits = ours.gpt.head(ours.gpt(input_ids))
        for other in (theirs, AutoModelForCausalLM.from_pretrained(again)):
            assert (logits - other(input_ids).logits).abs().max() < LOGITS_TOLERANCE


@pytest.mark.parametrize(
    ("family", "uses"), [("mistral", {}), ("qwen2", {"use_sliding_window": True})]
)
def test_a_window_that_is_not_said(family: str, uses: dict[str, bool], tmp_path: Path) -> None:
    published(tmp_path, family, max_position_embeddings=8192, max_window_layers=0, **uses)
    edit(tmp_path / CONFIG, lambda settings: settings.pop("sliding_window"))
    assert AutoConfig.from_pretrained(tmp_path).sliding_window == 4096
    assert load(tmp_path).gpt.config.block_size == 4096


def test_a_window_that_is_not_used(tmp_path: Path) -> None:
    for uses, expected in ((False, 64), (True, 32)):
        folder = tmp_path / str(uses)
        published(folder, "qwen2", sliding_window=32, use_sliding_window=uses, max_window_layers=1)
        edit(folder / CONFIG, lambda settings: settings.update(sliding_window=32))
        assert load(folder).gpt.config.block_size == expected


def test_a_scaling_that_was_added_to_a_newer_configuration(tmp_path: Path) -> None:
    published(tmp_path)
    added = {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
    edit(tmp_path / CONFIG, lambda settings: settings.update(added))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits_differ(tmp_path, theirs) < LOGITS_TOLERANCE
    assert load(tmp_path).gpt.config.rope_scaling == RopeScaling("linear", 4.0)


def test_a_table_of_positions_is_exact_where_weights_are_not(tmp_path: Path) -> None:
    """Lightning makes a model's parts in the type of its weights."""
    published(tmp_path)
    expected = load(tmp_path).gpt.config
    torch.set_default_dtype(torch.bfloat16)
    try:
        frequencies = rotary_frequencies(expected.rope_theta, expected.head_size)
        table = rotary_table(frequencies, 1024)
    finally:
        torch.set_default_dtype(torch.float32)
    wanted = rotary_frequencies(expected.rope_theta, expected.head_size)
    assert torch.equal(frequencies, wanted)
    assert all(map(torch.equal, table, rotary_table(wanted, 1024)))


def test_shards(tmp_path: Path) -> None:
    theirs = published(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert not (tmp_path / WEIGHTS).exists()
    assert logits_differ(tmp_path, theirs) < LOGITS_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_in_half_and_read_into_half(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = published(tmp_path)
    theirs.to(dtype).save_pretrained(tmp_path)
    theirs = type(theirs).from_pretrained(tmp_path, dtype=torch.float32)
    assert logits_differ(tmp_path, theirs) < LOGITS_TOLERANCE
    half = load(tmp_path, dtype).gpt
    stored = load_file(tmp_path / WEIGHTS)
    assert torch.equal(half.token_embedding.weight, stored["model.embed_tokens.weight"])


def test_a_gpt2_directory_of_the_first_years(tmp_path: Path) -> None:
    """Names without a prefix, masks among the weights, settings that have defaults by now."""
    theirs = published(tmp_path, "gpt2")
    stored = load_file(tmp_path / WEIGHTS)
    old = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    for layer in range(2):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(old, tmp_path / WEIGHTS)
    kept = ("model_type", "n_layer", "n_head", "n_embd", "n_positions", "vocab_size")

    def forget(settings: dict[str, Any]) -> None:
        for key in settings.keys() - {*kept}:
            del settings[key]

    edit(tmp_path / CONFIG, forget)
    assert logits_differ(tmp_path, theirs) < LOGITS_TOLERANCE

    again = {"transformer.wte.weight": stored["transformer.wte.weight"].clone()}
    save_file(old | again, tmp_path / WEIGHTS)
    assert "a tensor twice" in refusal(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_head_beside_the_embedding_that_it_is_tied_to(family: str, tmp_path: Path) -> None:
    """Equal it is nothing new, also in another type; other than the embedding one is wrong."""
    theirs = published(tmp_path, family, tie_word_embeddings=True)
    stored = load_file(tmp_path / WEIGHTS)
    (name,) = (name for name in stored if name.endswith(("wte.weight", "embed_tokens.weight")))
    stored[name] = stored[name].bfloat16()
    theirs.get_input_embeddings().weight.data.copy_(stored[name])

    def with_head(head: Tensor) -> None:
        save_file(stored | {"lm_head.weight": head}, tmp_path / WEIGHTS)

    head = stored[name].float()
    with_head(head)
    assert logits_differ(tmp_path, theirs) < LOGITS_TOLERANCE
    changed = head.clone()
    changed[-1, -1] += 2**-10
    for other in (changed, head[:-1].clone(), head.T.contiguous()):
        with_head(other)
        assert f"its {WEIGHTS} has a lm_head.weight other than {name}" in refusal(tmp_path)


def test_a_llama_directory_of_the_first_years(tmp_path: Path) -> None:
    theirs = published(tmp_path)
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    save_file(load_file(tmp_path / WEIGHTS) | frequencies, tmp_path / WEIGHTS)

    def older(settings: dict[str, Any]) -> None:
        del settings["rope_parameters"], settings["head_dim"]
        settings.update(rope_theta=1e4, rope_scaling=None)

    edit(tmp_path / CONFIG, older)
    assert logits_differ(tmp_path, theirs) < LOGITS_TOLERANCE


def test_any_path(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Modèles de 中国 (1)" / "ein Modell"
    shutil.copytree(llama, folder)
    assert load(folder).path == folder


@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("llama", {"model_type": "gemma"}, "gemma"),
        ("llama", {"model_type": None}, "None"),
        ("llama", {"head_dim": 16}, "q_proj.weight has the shape"),
        ("llama", {"head_dim": 5}, "even head size"),
        ("qwen3", {"head_dim": 2**40}, "head_dim is 4398046511104"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "factor 0.0"),
        ("llama", {"model_type": "qwen2"}, "missing, such as model.layers.0.self_attn.k_proj.bias"),
        ("qwen3", {"model_type": "llama"}, "_norm.weight"),
        ("llama", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"mlp_bias": True}, "mlp_bias True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("llama", {"is_causal": False}, "is_causal False"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "'factor'"),
        ("llama", {"hidden_size": 30, "head_dim": None}, "n_embd"),
        ("llama", {"hidden_size": 36, "head_dim": None}, "even head size"),
        ("llama", {"hidden_size": 24, "head_dim": None}, "embed_tokens.weight has the shape"),
        ("llama", {"hidden_size": "32"}, "damaged"),
        ("llama", {"num_attention_heads": 0}, "n_head is 0"),
        ("llama", {"num_hidden_layers": 10**9}, "1000000000 layers"),
        ("llama", {"num_hidden_layers": 1}, "not known"),
        ("llama", {"num_hidden_layers": 3}, "missing"),
        ("llama", {"num_key_value_heads": 4}, "k_proj.weight has the shape (16, 32)"),
        ("llama", {"max_position_embeddings": 2**40}, "context"),
        ("llama", {"vocab_size": 600}, "vocab_size is 600"),
        ("llama", {"vocab_size": 100}, "do not belong together"),
        ("llama", {"intermediate_size": 2**62}, "mlp_hidden"),
        ("gpt2", {"activation_function": "relu"}, "activation_function relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False"),
        ("gpt2", {"n_embd": 36}, "shape"),
        ("gpt2", {"n_positions": 65}, "wpe.weight has the shape (64, 32)"),
    ],
)
def test_other_models_are_refused(
    family: str, settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    published(tmp_path, family)
    edit(tmp_path / CONFIG, lambda found: found.update(settings))
    assert named in refusal(tmp_path)


@pytest.mark.parametrize(
    ("method", "suffix"), [("awq", "qweight"), ("bitsandbytes", "weight.absmax")]
)
def test_quantised_weights_are_said_to_be(method: str, suffix: str, damaged: Path) -> None:
    """But not plain ones that were."""
    stated = {"quantization_config": {"quant_method": method}}
    edit(damaged / CONFIG, lambda settings: settings.update(stated))
    assert said_of(damaged) is None
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    save_file(load_file(damaged / WEIGHTS) | {name: torch.ones(4)}, damaged / WEIGHTS)
    assert f"its weights are quantised (config.json: quantization_config, {method})" in refusal(
        damaged
    )


def test_tensors_that_cannot_be(damaged: Path) -> None:
    def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> str:
        tensors = load_file(damaged / WEIGHTS)
        save_file(tensors | (change(dict(tensors)) or {}), damaged / "changed")
        kept = (damaged / WEIGHTS).read_bytes()
        shutil.move(damaged / "changed", damaged / WEIGHTS)
        said = refusal(damaged)
        (damaged / WEIGHTS).write_bytes(kept)
        return said

    norm, matrix = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    assert "extra" in with_tensors(lambda t: {"extra": torch.ones(1)})
    assert norm in with_tensors(lambda t: {norm: torch.ones(31)})
    assert matrix in with_tensors(lambda t: {matrix: t[matrix].T.contiguous()})
    assert matrix in with_tensors(lambda t: {matrix: torch.full_like(t[matrix], torch.nan)})
    assert matrix in with_tensors(
        lambda t: {matrix: t[matrix].index_fill(0, torch.tensor(3), 1e999)}
    )
    assert "torch.int8" in with_tensors(lambda t: {matrix: t[matrix].to(torch.int8)})

    tensors = load_file(damaged / WEIGHTS)
    del tensors[matrix]
    save_file(tensors, damaged / WEIGHTS)
    said = refusal(damaged)
    assert matrix in said
    assert "1 of its 21 tensors" in said


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "tokenizer.json"])
def test_truncated_or_empty(name: str, damaged: Path) -> None:
    whole = (damaged / name).read_bytes().rstrip()
    for part in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (damaged / name).write_bytes(whole[:part])
        assert name in refusal(damaged)
    (damaged / name).unlink()
    if name != CONFIG:
        assert name in refusal(damaged)
    else:
        with pytest.raises(ValueError, match="not a whole checkpoint"):
            load(damaged)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.timeout(120)
def test_flipped_bits(name: str, damaged: Path) -> None:
    """Each ends in a model, where only a number changed, or in one line."""
    whole = (damaged / name).read_bytes()
    n_header = 8 + int.from_bytes(whole[:8], "little") if name == WEIGHTS else len(whole)
    n_refused = 0
    for i in range(80):
        data, position = bytearray(whole), i * 7919 % n_header if i > 8 else i
        data[position] ^= 1 << i % 8
        (damaged / name).write_bytes(data)
        n_refused += said_of(damaged) is not None
    assert n_refused > 30


def test_an_index_that_lies(damaged: Path) -> None:
    tensors = load_file(damaged / WEIGHTS)
    shutil.move(damaged / WEIGHTS, damaged / "model-1.safetensors")
    places = dict.fromkeys(tensors, "model-1.safetensors")

    def said(changes: dict[str, Any]) -> str:
        (damaged / INDEX).write_text(json.dumps({"weight_map": {**places, **changes}}))
        return refusal(damaged)

    assert "another folder" in said({"model.norm.weight": "../model-1.safetensors"})
    assert "another folder" in said({"model.norm.weight": str(damaged / "model-1.safetensors")})
    assert "model-2.safetensors is missing" in said({"model.norm.weight": "model-2.safetensors"})
    assert "extra" in said({"extra": "model-1.safetensors"})
    name = "model.norm.weight"
    twice = {name: tensors[name], "extra": tensors[name].clone()}
    save_file(twice, damaged / "model-2.safetensors")
    places["extra"] = "model-2.safetensors"
    assert f"its files differ, such as in {name}" in said({})
    del places["extra"]
    del places["model.norm.weight"]
    assert "model.norm.weight" in said({})
    (damaged / INDEX).write_text("[]")
    assert INDEX in refusal(damaged)
    (damaged / INDEX).write_text('{"weight_map": ["model-1.safetensors"]}')
    assert "damaged" in refusal(damaged)


def test_a_pickle_is_never_opened(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (damaged / WEIGHTS).unlink()
    (damaged / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch PROOF'\ntR.")
    monkeypatch.chdir(damaged)
    said = refusal(damaged)
    assert "pytorch_model.bin is a pickle" in said
    assert "safe_serialization=True" in said
    assert not (damaged / "PROOF").exists()


def test_directories_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load(tmp_path)
    (tmp_path / CONFIG).write_text("{}")
    assert "architecture is None" in refusal(tmp_path)


def test_of_shards_and_one_file_the_one(tmp_path: Path) -> None:
    """As transformers does, which leaves the index of what it wrote before."""
    random_model("llama", N_VOCAB).save_pretrained(tmp_path, max_shard_size="20KB")
    torch.manual_seed(1)
    model = published(tmp_path)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / INDEX).exists()
    assert logits_differ(tmp_path, model) < LOGITS_TOLERANCE


@pytest.mark.parametrize(
    ("head", "license"),
    [
        ("license: mit", "mit"),
        ("license: 'mit'  # SPDX", "mit"),
        ("license: [mit, apache-2.0]", None),
        ("license:\n- mit\n- apache-2.0", None),
        ("license: {", None),
    ],
)
def test_a_license_is_a_name(head: str, license: str | None, tmp_path: Path) -> None:
    published(tmp_path)
    (tmp_path / "README.md").write_text(f"---\nlanguage: en\n{head}\n---\n# A model\n")
    assert open_foreign(tmp_path).license == license
