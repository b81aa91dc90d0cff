"""GGUF files: logits match transformers on the same dequantized weights, or one clear error."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from datamodules.chat_template import render
from datamodules.prompts import Message
from pipeline.layers.rotary import RopeScaling
from pipeline.models import load
from tests.published import (
    CHATML,
    EOS,
    START,
    fuzz,
    random_model,
    refusal,
    said_of,
    train,
    write_gguf,
)

LOGITS_TOLERANCE = 1e-5  # float32: logits are of size 1, and 64-term sums round at some 1e-6
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}  # K-quants' blocks
FLIPS = 400


@pytest.fixture(scope="module")
def bpe() -> Any:
    return train("smollm")


def n_tokens(bpe: Any) -> int:
    return int(bpe.get_vocab_size())


def logits_differ(source: Path, theirs: Any) -> float:
    ours = load(source).gpt
    n_vocab = theirs.config.vocab_size
    input_ids = torch.randint(n_vocab, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        difference = ours.head(ours(input_ids)) - theirs(input_ids).logits
    return float(difference.abs().max())


@pytest.mark.parametrize("kind", [*KINDS, *K_QUANTS])
def test_llama(kind: str, tmp_path: Path, bpe: Any) -> None:
    model = random_model("llama", n_tokens(bpe), **(WIDE if kind in K_QUANTS else {}))
    theirs = write_gguf(tmp_path / "a.gguf", model, bpe, kind=kind)
    # of K-quants any bits: weights up to 1, and sums of 256 terms of logits of size 100
    tolerance = 1e-3 if kind in K_QUANTS else LOGITS_TOLERANCE
    assert logits_differ(tmp_path / "a.gguf", theirs) < tolerance


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 4}, {"tie_word_embeddings": True}])
def test_llama_multi_head_and_tied(changes: dict[str, Any], tmp_path: Path, bpe: Any) -> None:
    theirs = write_gguf(tmp_path / "a.gguf", random_model("llama", n_tokens(bpe), **changes), bpe)
    assert logits_differ(tmp_path / "a.gguf", theirs) < LOGITS_TOLERANCE
    assert load(tmp_path / "a.gguf").gpt.config.tie_embeddings == ("tie_word_embeddings" in changes)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen2", {}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", {"head_dim": 16})],
)
def test_qwen(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    bpe = train("qwen2")
    model = random_model(family, n_tokens(bpe), **changes)
    theirs = write_gguf(tmp_path / "a.gguf", model, bpe, pre="qwen2")
    assert logits_differ(tmp_path / "a.gguf", theirs) < LOGITS_TOLERANCE


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_gpt2(kind: str, tmp_path: Path) -> None:
    bpe = train("gpt-2", special_first=False)
    model = random_model("gpt2", n_tokens(bpe))
    theirs = write_gguf(tmp_path / "a.gguf", model, bpe, pre="gpt-2", kind=kind)
    assert logits_differ(tmp_path / "a.gguf", theirs) < LOGITS_TOLERANCE


def test_linear_scaling(tmp_path: Path, bpe: Any) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    model = random_model("llama", n_tokens(bpe), rope_parameters=rope)

    def scale(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    theirs = write_gguf(tmp_path / "a.gguf", model, bpe, change=scale)
    assert logits_differ(tmp_path / "a.gguf", theirs) < LOGITS_TOLERANCE


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_scaling_of_no_kind_is_linear(key: str, tmp_path: Path, bpe: Any) -> None:
    """As llama.cpp takes it; the second key is an older one."""
    model = random_model("llama", n_tokens(bpe))
    for factor, expected in ((4.0, RopeScaling("linear", 4.0)), (1.0, None)):

        def scale(writer: gguf.GGUFWriter, factor: float = factor) -> None:
            writer.add_float32(f"llama.{key}", factor)

        write_gguf(tmp_path / "a.gguf", model, bpe, change=scale)
        assert load(tmp_path / "a.gguf").gpt.config.rope_scaling == expected


@pytest.mark.parametrize("factor", [4.0, 8.0, 32.0])
def test_llama_3s_factors_are_known(factor: float, tmp_path: Path, bpe: Any) -> None:
    """As convert_hf_to_gguf computes them."""
    base, head_size, original = 500000.0, 8, 8192
    rope = {"rope_type": "llama3", "rope_theta": base, "factor": factor}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": original}
    factors = []
    for i in range(0, head_size, 2):
        wavelength = 2 * torch.pi * base ** (i / head_size)
        smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < original / 4.0:
            factors.append(1.0)
        elif wavelength > original / 1.0:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    model = random_model("llama", n_tokens(bpe), rope_parameters=rope)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", torch.tensor(factors).numpy())

    theirs = write_gguf(tmp_path / "a.gguf", model, bpe, change=add)
    scaling = load(tmp_path / "a.gguf").gpt.config.rope_scaling
    assert scaling == RopeScaling("llama3", factor, 1.0, 4.0, original)
    assert logits_differ(tmp_path / "a.gguf", theirs) < LOGITS_TOLERANCE
    factors[0] *= 1.01
    write_gguf(tmp_path / "b.gguf", model, bpe, change=add)
    assert "no known Llama" in refusal(tmp_path / "b.gguf")
    factors.append(1.0)
    write_gguf(tmp_path / "c.gguf", model, bpe, change=add)
    assert "no known Llama" in refusal(tmp_path / "c.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, bpe: Any) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, random_model("llama", n_tokens(bpe), num_hidden_layers=1), bpe)
    return path


def test_the_tokenizer_and_what_it_says(whole: Path, bpe: Any, tmp_path: Path) -> None:
    folder = tmp_path / "Modèles de 中国 (1)"
    folder.mkdir()
    loaded = load(shutil.copy(whole, folder / "ein Modell.gguf"))
    vocabulary = loaded.tokenizer.vocabulary
    assert vocabulary.eos == EOS
    assert vocabulary.bos is None
    assert vocabulary.chat_template == CHATML
    assert loaded.meta["prompt_style"] == "template"
    assert loaded.tokenizer.encode("Hello,  12 中国") == bpe.encode("Hello,  12 中国").ids


def test_ids_that_nothing_has_and_a_leading_token(tmp_path: Path) -> None:
    """Rows beyond the vocabulary are unused tokens in a GGUF; Llama 3's texts have a first one."""
    bpe = train("llama-bpe")
    model = random_model("llama", n_tokens(bpe) + 2)

    def pad(writer: gguf.GGUFWriter) -> None:
        fields = writer.kv_data[0]
        del fields["tokenizer.ggml.add_bos_token"]
        fields["tokenizer.ggml.tokens"].value += ["[PAD1]", "[PAD2]"]
        fields["tokenizer.ggml.token_type"].value += [gguf.TokenType.UNUSED] * 2

    theirs = write_gguf(tmp_path / "a.gguf", model, bpe, pre="llama-bpe", change=pad)
    assert logits_differ(tmp_path / "a.gguf", theirs) < LOGITS_TOLERANCE
    loaded = load(tmp_path / "a.gguf")
    assert loaded.tokenizer.n_vocab == n_tokens(bpe)
    assert loaded.tokenizer.vocabulary.bos == "<|im_start|>"


def test_a_bos_of_its_template_alone(tmp_path: Path, bpe: Any) -> None:
    model = random_model("llama", n_tokens(bpe), num_hidden_layers=1)
    write_gguf(tmp_path / "a.gguf", model, bpe, chat_template="{{ bos_token }}" + CHATML)
    tokenizer = load(tmp_path / "a.gguf").tokenizer
    assert tokenizer.bos_ids == []
    message = Message(role="user", content="hi")
    assert render(tokenizer, [message], opening=True).startswith(START * 2)


def set_field(name: str, value: Any) -> Callable[[gguf.GGUFWriter], None]:
    def change(writer: gguf.GGUFWriter) -> None:
        field = writer.kv_data[0].get(name)
        if value is None:
            del writer.kv_data[0][name]
        elif field:
            field.value = value
        else:
            writer.add_uint32(name, value)

    return change


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("general.architecture", "gemma", "architecture is gemma"),
        ("general.architecture", None, "lacks 'general.architecture'"),
        ("llama.block_count", None, "lacks 'llama.block_count'"),
        ("llama.block_count", 2, "missing"),
        ("llama.block_count", 2**31, "2147483648 layers"),
        ("llama.context_length", 2**31, "context"),
        ("llama.embedding_length", 2**31, "heads are 536870912 wide"),
        ("llama.feed_forward_length", 2**31, "mlp_hidden"),
        ("llama.attention.head_count", 2**20, "its rope.dimension_count is 8"),
        ("llama.feed_forward_length", 32, "ffn_gate.weight has the shape (64, 32)"),
        ("llama.attention.head_count", 0, "damaged"),
        ("llama.attention.head_count", 2, "its rope.dimension_count is 8"),
        ("llama.attention.head_count_kv", 4, "attn_k.weight"),
        ("llama.expert_count", 8, "mixture of experts"),
        ("llama.attention.causal", 0, "sees later tokens"),
        ("tokenizer.ggml.model", "bert", "'bert'; supported: gpt2, llama"),
        ("tokenizer.ggml.pre", "deepseek-llm", "'deepseek-llm'"),
        ("tokenizer.ggml.pre", None, "tokenizer.ggml.pre"),
        ("tokenizer.ggml.merges", ["t h"], "parts without an id"),
        ("tokenizer.ggml.tokens", ["a", "b"], "2 tokens, but kinds of 500"),
        ("tokenizer.ggml.token_type", [7] * 500, "of a kind"),
        ("tokenizer.ggml.token_type", [4] * 500, "'!', added but neither special nor <a mark>"),
        ("tokenizer.ggml.eos_token_id", 2**32 - 1, "eos_token_id is 4294967295, but it has 500"),
        ("tokenizer.ggml.eos_token_id", 50, "not among its special tokens"),
        ("tokenizer.ggml.eos_token_id", None, "eos_token"),
        ("general.alignment", 0, "alignment"),
    ],
)
def test_what_is_refused(name: str, value: Any, named: str, tmp_path: Path, bpe: Any) -> None:
    path, model = tmp_path / "a.gguf", random_model("llama", n_tokens(bpe), num_hidden_layers=1)
    write_gguf(path, model, bpe, change=set_field(name, value))
    assert named in refusal(path)


def test_layers_of_different_sizes_are_refused(tmp_path: Path, bpe: Any) -> None:
    def vary(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["llama.attention.head_count_kv"]
        writer.add_head_count_kv([2, 1])

    path = tmp_path / "a.gguf"
    write_gguf(path, random_model("llama", n_tokens(bpe)), bpe, change=vary)
    assert "its attention.head_count_kv is of each layer ([2, 1]...), which is" in refusal(path)


@pytest.mark.parametrize(
    ("pre", "same"),
    [("deepseek-r1-qwen", "qwen2"), ("llama3", "llama-bpe"), ("llama-v3", "llama-bpe")],
)
def test_other_names_of_a_pre_tokenizer(pre: str, same: str, tmp_path: Path) -> None:
    """As llama.cpp has them: of DeepSeek's distilled Qwen, of early files of Llama 3."""
    theirs = train(same)
    theirs.encode_special_tokens = True
    model = random_model("llama", n_tokens(theirs), num_hidden_layers=1)
    write_gguf(tmp_path / "a.gguf", model, theirs, pre=pre)
    tokenizer = load(tmp_path / "a.gguf").tokenizer
    texts = fuzz(300)
    assert [tokenizer.encode(text) for text in texts] == [theirs.encode(text).ids for text in texts]


def test_a_part_of_a_model_is_said_to_be_one(tmp_path: Path, bpe: Any) -> None:
    """All but the first part have little more than their number."""
    model = random_model("llama", n_tokens(bpe), num_hidden_layers=1)

    def number(i: int) -> Callable[[gguf.GGUFWriter], None]:
        def change(writer: gguf.GGUFWriter) -> None:
            if i:
                writer.kv_data[0].clear()
            writer.add_uint16("split.no", i)
            writer.add_uint16("split.count", 3)
            writer.add_int32("split.tensors.count", 12)

        return change

    for i in range(3):
        path = tmp_path / f"a-{i + 1:05d}-of-00003.gguf"
        write_gguf(path, model, bpe, change=number(i))
        assert f"it is part {i + 1} of 3; join them" in refusal(path)


def test_tensors_that_cannot_be(tmp_path: Path, bpe: Any) -> None:
    path, model = tmp_path / "a.gguf", random_model("llama", n_tokens(bpe), num_hidden_layers=1)

    def add(name: str, tensor: torch.Tensor) -> Callable[[gguf.GGUFWriter], None]:
        return lambda writer: writer.add_tensor(name, tensor.numpy())

    write_gguf(path, model, bpe, change=add("blk.0.attn_q.bias", torch.ones(32)))
    assert "attn_q.bias" in refusal(path)
    write_gguf(path, model, bpe, change=add("rope_freqs.weight", torch.ones(4, dtype=torch.int8)))
    assert "rope_freqs.weight: I8 cannot be dequantised" in refusal(path)
    model.model.norm.weight.data[3] = torch.inf
    write_gguf(path, model, bpe)
    assert "output_norm.weight holds values that are not finite" in refusal(path)


def test_truncated_anywhere(whole: Path, tmp_path: Path) -> None:
    content, path = whole.read_bytes(), tmp_path / "a.gguf"
    starts = (*range(0, 200), *range(200, len(content), len(content) // 100), len(content) - 1)
    for n_bytes in starts:
        path.write_bytes(content[:n_bytes])
        refusal(path)
    for magic in (b"GGML", b"FUGG", b"PK\3\4"):
        path.write_bytes(magic + content[4:])
        assert "does not begin" in refusal(path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + content[8:])
    assert "version is 1" in refusal(path)
    path.write_bytes(b"GGUF" + struct.pack(">I", 3) + content[8:])
    assert "version" in refusal(path)


@pytest.mark.timeout(60)  # a length of 2^60 is no reason to count up to it
def test_flipped_bits_of_the_header(whole: Path, tmp_path: Path) -> None:
    """Each ends in a model, where only a name or a number changed, or in one line."""
    content, path = whole.read_bytes(), tmp_path / "a.gguf"
    header = content.index(b"token_embd.weight") + 600
    positions = [
        *range(60),
        *range(60, header, header // (FLIPS - 60)),
        *range(header - 600, header, 9),
    ]
    n_refused = 0
    for i, position in enumerate(positions):
        data = bytearray(content)
        data[position] ^= 1 << (7 - i) % 8
        path.write_bytes(data)
        n_refused += said_of(path) is not None
    assert n_refused > FLIPS // 2
